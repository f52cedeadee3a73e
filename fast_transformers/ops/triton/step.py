"""One token of generation: absorb a key and a value, look a query up, in one pass of the state.

The state is all that matters: it is read once and written once, tile by tile. A tile absorbed
into, stored, and looked up while it is in registers. The features of a query are taken relative
to the largest one so far, by which what was looked up before is corrected.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ..formula import LOG2E, Formula
from ..kinds import KINDS
from .functions import functions_of

Sums = tuple[Tensor, Tensor, Tensor | None]
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
TILE = 2048  # elements of the state in the registers of 4 warps


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def project(q, k, weights, d, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr):
    """Products of a query and a key with the directions ``d``."""
    of_query = tl.zeros(d.shape, tl.float32)
    of_key = tl.zeros(d.shape, tl.float32)
    for start in tl.static_range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        inside = (e < E)[:, None] & (d < K)[None, :]
        omega = tl.load(weights + e[:, None] * K + d[None, :], inside, 0.0)
        omega = omega.to(q.dtype.element_ty).to(tl.float32)  # as products of matrices are given it
        x = tl.load(q + e, e < E, 0.0).to(tl.float32)
        y = tl.load(k + e, e < E, 0.0).to(tl.float32)
        x, y = tl.reduce((x[:, None] * omega, y[:, None] * omega), 0, add_both)
        of_query, of_key = of_query + x, of_key + y
    return of_query, of_key


@triton.jit
def read(kv, z, shift, f, exists, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows ``f`` of the sums; zeros without a state."""
    m = tl.arange(0, BLOCK_M)
    if kv is None:
        tile = tl.zeros((f.shape[0], BLOCK_M), tl.float32)
        sums = tl.zeros(f.shape, tl.float32)
    else:  # not by way of L1, which keeps the projection
        inside = exists[:, None] & (m < M)[None, :]
        tile = tl.load(kv + f[:, None] * M + m[None, :], inside, 0.0, cache_modifier=".cg")
        sums = tl.load(z + f, exists, 0.0)
    past = tl.full(f.shape, LOWEST, tl.float32)
    if shift is not None:
        past = tl.load(shift + f, exists, LOWEST)
    return tile, sums, past


@triton.jit
def absorb(
    tile, sums, past, a, b, v, to_kv, to_z, to_shift, f, exists,
    M: tl.constexpr, EXPONENTIAL: tl.constexpr,
):  # fmt: skip
    """Add a key's features ``a`` with its value to rows ``f`` and store them; also the features
    of the query, in the units of the sums."""
    if EXPONENTIAL:
        a, b = tl.where(exists, a, float("-inf")), tl.where(exists, b, float("-inf"))
        new = tl.maximum(past, a)
        decay = tl.exp2(past - new)
        a, b = tl.exp2(a - new), b + new
        tile, sums = tile * decay[:, None], sums * decay
        tl.store(to_shift + f, new, exists)
    else:
        a, b = tl.where(exists, a, 0.0), tl.where(exists, b, 0.0)
    tile += a[:, None] * v[None, :]
    sums += a
    m = tl.arange(0, tile.shape[1])
    tl.store(to_kv + f[:, None] * M + m[None, :], tile, exists[:, None] & (m < M)[None, :])
    tl.store(to_z + f, sums, exists)
    return tile, sums, b


@triton.jit
def step(
    q, k, v, q_n, q_h, k_n, k_h, v_n, v_h, heads, weights, scale, first, second, eps,
    kv, z, shift, to_kv, to_z, to_shift, out,
    KIND: tl.constexpr, VALUE: tl.constexpr, EXPONENTIAL: tl.constexpr, E: tl.constexpr,
    K: tl.constexpr, F: tl.constexpr, M: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, SQUARE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program per head. K directions make F features, one or two each.

    ``first`` and ``second`` are numbers of the kind: factor of |x|^2 and constant of
    "hyperbolic", amplitude of the waves and the constant feature of "fourier".
    """
    pid = tl.program_id(0)
    n, h = (pid // heads).to(tl.int64), (pid % heads).to(tl.int64)
    pid = pid.to(tl.int64)
    q, k, v = q + n * q_n + h * q_h, k + n * k_n + h * k_h, v + n * v_n + h * v_h
    if kv is not None:
        kv, z = kv + pid * F * M, z + pid * F
        if EXPONENTIAL:
            shift += pid * F
    to_kv, to_z = to_kv + pid * F * M, to_z + pid * F
    if EXPONENTIAL:
        to_shift += pid * F
    m = tl.arange(0, BLOCK_M)
    value = tl.load(v + m, m < M, 0.0).to(tl.float32)
    if KIND == "hyperbolic":
        e = tl.arange(0, SQUARE)
        x = tl.load(k + e, e < E, 0.0).to(tl.float32)
        common = -first * tl.sum(x * x) - second
    top = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    bottom = tl.zeros((BLOCK_K,), tl.float32)
    offset = LOWEST
    for start in range(0, K, BLOCK_K):
        f = start + tl.arange(0, BLOCK_K)
        exists = f < K
        tile, sums, past = read(kv, z, shift, f, exists, M, BLOCK_M)
        if PAIRS:
            tile_2, sums_2, past_2 = read(kv, z, shift, K + f, exists, M, BLOCK_M)
        if weights is None:
            b = tl.load(q + f, exists, 0.0).to(tl.float32) * scale
            a = tl.load(k + f, exists, 0.0).to(tl.float32) * scale
        else:
            b, a = project(q, k, weights, f, E, K, BLOCK_E)
            b, a = b * scale, a * scale
        a_2, b_2 = a, b
        if KIND == "hyperbolic":  # what all features of a query have in common cancels
            a, a_2, b_2 = common + a, common - a, -b
        elif KIND == "fourier":
            a, a_2 = first * tl.cos(a), first * tl.sin(a)
            b, b_2 = first * tl.cos(b), first * tl.sin(b)
        elif not EXPONENTIAL:
            a, b = VALUE(a), VALUE(b)
        tile, sums, b = absorb(
            tile, sums, past, a, b, value, to_kv, to_z, to_shift, f, exists, M, EXPONENTIAL
        )
        if PAIRS:
            tile_2, sums_2, b_2 = absorb(
                tile_2, sums_2, past_2, a_2, b_2, value, to_kv, to_z, to_shift, K + f, exists, M,
                EXPONENTIAL,
            )  # fmt: skip
        if EXPONENTIAL:
            raised = tl.maximum(offset, tl.max(tl.maximum(b, b_2) if PAIRS else b, 0))
            decay = tl.exp2(offset - raised)
            top, bottom, offset = top * decay, bottom * decay, raised
            b = tl.exp2(b - offset)
        top, bottom = top + b[:, None] * tile, bottom + b * sums
        if PAIRS:
            if EXPONENTIAL:
                b_2 = tl.exp2(b_2 - offset)
            top, bottom = top + b_2[:, None] * tile_2, bottom + b_2 * sums_2
    top, bottom = tl.sum(top, 0), tl.sum(bottom, 0)
    if KIND == "fourier" and F > 2 * K:  # the constant feature
        last, total = second * value, second
        if kv is not None:
            last += tl.load(kv + 2 * K * M + m, m < M, 0.0)
            total += tl.load(z + 2 * K)
        tl.store(to_kv + 2 * K * M + m, last, m < M)
        tl.store(to_z + 2 * K, total)
        top, bottom = top + second * last, bottom + second * total
    if not EXPONENTIAL:
        bottom += eps
    top = tl.where(bottom == 0.0, 0.0, top / tl.where(bottom == 0.0, 1.0, bottom))
    tl.store(out + pid * M + m, top.to(out.dtype.element_ty), m < M)


def warps_for(block_m: int) -> int:
    """Warps of a program, for tiles of so many values."""
    return 4 if block_m <= 128 else 8


def launch(
    formula: Formula, eps: float, q: Tensor, k: Tensor, v: Tensor, state: Sums | None, to: Sums
) -> Tensor:
    """Values (N, H, M) in the dtype of ``q``; ``state`` and the key go to ``to``, maybe the same.

    Sums are contiguous and in float32. Nothing but the values is allocated, and nothing is read
    back, so a CUDA graph can hold it.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    n, h, e = k.shape
    m, features = v.shape[-1], KINDS[formula.kind].width(formula, e)
    out = torch.empty(n, h, m, dtype=q.dtype, device=q.device)
    name, function, directions = "elementwise", formula.kind, e
    weights, scale, first, second = None, 1.0, 0.0, 0.0
    if formula.projection is not None:
        weights, directions = formula.projection.contiguous(), formula.projection.shape[1]
        name, _, function = formula.kind.partition("_")
        scale = formula.numbers[0] ** 0.5
        if name == "hyperbolic":
            first, second, scale = scale**2 * LOG2E / 2, math.log2(features) / 2, scale * LOG2E
        elif name != "projected":
            name, first = "fourier", directions**-0.5
            second = formula.numbers[1] ** 0.5 if features > 2 * directions else 0.0
    elif formula.kind == "logarithm":
        scale = LOG2E
    exponential, pairs = KINDS[formula.kind].exponential, name in ("hyperbolic", "fourier")
    value, _ = functions_of(function)
    block_m = max(16, next_power_of_2(m))
    warps = warps_for(block_m)
    block_k = min(TILE * warps // 4 // block_m, max(16, next_power_of_2(directions)))
    registers = None  # of a thread; as few as let more programs run at once, without spilling
    if block_m <= 64 and (pairs or (weights is None and not exponential)):
        registers = 128 if pairs else 64
    kv, z, shift = (None, None, None) if state is None else state
    if n * h:
        kernel: Any = step
        kernel[n * h,](
            q, k, v, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], h, weights, scale, first,
            second, eps, kv, z, shift, *to, out,
            KIND=name, VALUE=value, EXPONENTIAL=exponential, E=e,
            K=directions, F=features, M=m, BLOCK_E=min(64, max(16, next_power_of_2(e))),
            BLOCK_K=block_k, BLOCK_M=block_m, SQUARE=next_power_of_2(e),
            PAIRS=pairs, num_warps=warps, maxnreg=registers,
        )  # fmt: skip
    return out
