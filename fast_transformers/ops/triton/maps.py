"""Feature maps inside the kernels: features of a tile of rows, and the gradient of the rows.

Features are worked on in blocks of directions. A direction gives one feature, or a pair of them
(exp(u) and exp(-u), or cos u and sin u), whose two members are called parts; they share u.
Exponential features are given as logarithms to base 2, those of queries up to a constant per
query, and are pulled back from the gradient of the natural logarithm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..choose import INTERPRETED

ON_GPU = tl.constexpr(not INTERPRETED)


class Rows(NamedTuple):
    """A tensor (N, length, H, dim) of any strides."""

    ptr: Any
    n: Any
    l: Any  # noqa: E741
    h: Any
    d: Any


class Gradient(NamedTuple):
    """Of rows, and of their products u with trained weights, (N, length, H, PAIRS), or None."""

    x: Rows
    u: Rows | None


def rows(x: Tensor) -> Rows:
    return Rows(x, *x.stride())


def gradient(x: Tensor, u: Tensor | None) -> Gradient:
    return Gradient(rows(x), None if u is None else rows(u))


class Map(NamedTuple):
    """A feature map; the upper case is known when a kernel is compiled.

    Attributes:
        weights: (E, PAIRS) that rows are multiplied by, None for element-wise maps.
        scale: of the product, in the units of its kind.
        back: of the product, as its gradient needs it.
        first, second: numbers of the kind: factor of |x|^2 and constant of "hyperbolic",
            amplitude of the waves and the constant of "fourier".
        KIND: "elementwise", "projected", "logarithm", "hyperbolic" or "fourier".
        VALUE, SLOPE: the function of element-wise and projected maps, and its derivative.
        E, F: numbers of dimensions and features; BLOCK_E is the power of 2 above E.
        PARTS, PAIRS: features of a direction, and directions. If 1 is left of F it is a
            constant, which counts as one more direction.
        BLOCK, BLOCKS: directions in a block, and blocks.
        OPERAND: dtype of the factors of all products but the first, and PRECISION of those in
            float32.
        STAGES: of loops that load what they need ahead of time.
    """

    weights: Any
    scale: Any
    back: Any
    first: Any
    second: Any
    KIND: Any
    VALUE: Any
    SLOPE: Any
    E: Any
    F: Any
    BLOCK_E: Any
    PARTS: Any
    PAIRS: Any
    BLOCK: Any
    BLOCKS: Any
    OPERAND: Any
    PRECISION: Any
    STAGES: Any


@triton.jit
def once(x):
    """x in float32, computed once: in another layout it is moved, not computed again from what was
    loaded, as the compiler would have it."""
    if ON_GPU:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], tl.float32, is_pure=False, pack=1
        )
    return x


@triton.jit
def operand(x, map):
    """A tile as a factor of products."""
    if x.dtype == tl.float32:
        if map.OPERAND == tl.bfloat16:  # two at a time: one by one takes as long as exponentials
            x = tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, is_pure=True, pack=2
            )
        elif ON_GPU and map.PRECISION == "tf32":  # products cut off what they do not take
            x = tl.inline_asm_elementwise(
                "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1
            )
    else:
        x = x.to(map.OPERAND)
    return x


@triton.jit
def load_rows(x, n, h, start, valid, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns ``first`` to ``first + BLOCK`` of the C rows from ``start`` on; 0 where ``valid``
    (C,) is not."""
    r, d = tl.arange(0, valid.shape[0]), tl.arange(0, BLOCK) + first
    base = x.ptr + n * x.n + tl.cast(h, tl.int64) * x.h + tl.cast(start, tl.int64) * x.l
    inside = valid[:, None] & (d < D)[None, :]
    return tl.load(base + (r[:, None] * x.l + d[None, :] * x.d), mask=inside, other=0.0)


@triton.jit
def store_rows(x, tile, n, h, start, valid, first, D: tl.constexpr):
    """As :func:`load_rows`."""
    r, d = tl.arange(0, valid.shape[0]), tl.arange(0, tile.shape[1]) + first
    base = x.ptr + n * x.n + tl.cast(h, tl.int64) * x.h + tl.cast(start, tl.int64) * x.l
    inside = valid[:, None] & (d < D)[None, :]
    at = base + (r[:, None] * x.l + d[None, :] * x.d)
    tl.store(at, tile.to(x.ptr.dtype.element_ty), inside)


@triton.jit
def load_given(x, n, h, start, valid, map):
    """Whole rows (C, BLOCK_E), for maps that multiply them by weights."""
    rows = None
    if map.weights is not None:
        rows = load_rows(x, n, h, start, valid, 0, map.E, map.BLOCK_E)
        rows = rows.to(map.weights.dtype.element_ty)
    return rows


@triton.jit
def load_weights(map, block):
    """Weights (E, BLOCK) of a block of directions; None without any."""
    weights = None
    if map.weights is not None:
        e, d = tl.arange(0, map.BLOCK_E), tl.arange(0, map.BLOCK) + block * map.BLOCK
        inside = (e < map.E)[:, None] & (d < map.PAIRS)[None, :]
        weights = tl.load(
            map.weights + e[:, None] * map.PAIRS + d[None, :], mask=inside, other=0.0
        )
    return weights


@triton.jit
def project(x, n, h, start, valid, given, weights, block, map, ACROSS: tl.constexpr):
    """u (C, BLOCK) of a block of directions, or (BLOCK, C) ``ACROSS``."""
    if map.weights is None:
        u = load_rows(x, n, h, start, valid, block * map.BLOCK, map.F, map.BLOCK).to(tl.float32)
        if ACROSS:
            u = tl.trans(u)
    elif ACROSS:
        u = tl.dot(tl.trans(weights), tl.trans(given), input_precision=map.PRECISION)
    else:
        u = tl.dot(given, weights, input_precision=map.PRECISION)
    if map.weights is not None and map.KIND != "hyperbolic":  # whose features include the scale
        u *= map.scale
    return u


@triton.jit
def offset_of(given, valid, map):
    """What all log-features of a key have in common; for queries it cancels."""
    offset = None
    if map.KIND == "hyperbolic":
        x = given.to(tl.float32)
        offset = tl.where(valid, -map.first * tl.sum(x * x, 1) - map.second, float("-inf"))
    return offset


@triton.jit
def beside(x, y):
    """(C, 2 D) of two tiles (C, D)."""
    both = tl.permute(tl.join(x, y), (0, 2, 1))
    return tl.reshape(both, (x.shape[0], 2 * x.shape[1]))


@triton.jit
def apart(x):
    """The two tiles that are :func:`beside` each other."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def features_at(block, part, map):
    """Numbers of the features of a block, and whether they exist: (BLOCK,) of one part, or
    (PARTS * BLOCK,) of all, without ``part``."""
    if part is None:
        d = tl.arange(0, map.PARTS * map.BLOCK)
        part = d // map.BLOCK
        d = d % map.BLOCK + block * map.BLOCK
    else:
        d = tl.arange(0, map.BLOCK) + block * map.BLOCK
    f, exists = d + part * map.PAIRS, d < map.PAIRS
    if map.F > map.PARTS * map.PAIRS:
        f = tl.where(d == map.PAIRS, map.F - 1, f)
        exists |= (d == map.PAIRS) & (part == 0)
    return f, exists


@triton.jit
def load_features(pointer, f, exists, other, map):
    """Numbers (BLOCK,) of features, ``other`` where none exist; unmasked where all do."""
    if map.F == map.PARTS * map.BLOCK * map.BLOCKS:
        numbers = tl.load(pointer + f)
    else:
        numbers = tl.load(pointer + f, mask=exists, other=other)
    return numbers


@triton.jit
def encode(u, offset, valid, block, part, map, ACROSS: tl.constexpr):
    """Features of a block. Those that do not exist are 0, or -inf if they are logarithms, and so
    are those of keys that are not ``valid``. Of queries, without ``valid``, all are given."""
    f, exists = features_at(block, part, map)
    none = 0.0
    if map.KIND == "logarithm":
        phi, none = u * 1.4426950408889634, float("-inf")
    elif map.KIND == "hyperbolic":
        phi, none = u * (map.scale * (1.0 - 2.0 * part)), float("-inf")
        if valid is not None:
            phi += offset[None, :] if ACROSS else offset[:, None]
    elif map.KIND == "fourier":
        wave = tl.where(part == 0, tl.cos(u), tl.sin(u))
        constant = f == 2 * map.PAIRS
        constant = constant[:, None] if ACROSS else constant[None, :]
        phi = tl.where(constant, map.second, map.first * wave)
    else:
        phi = map.VALUE(u)
    if map.F != map.PARTS * map.BLOCK * map.BLOCKS:
        phi = tl.where(exists[:, None] if ACROSS else exists[None, :], phi, none)
    if valid is not None and map.KIND != "hyperbolic":
        phi = tl.where(valid[None, :] if ACROSS else valid[:, None], phi, none)
    return phi


@triton.jit
def encode_all(u, offset, valid, block, map):
    """The same (C, PARTS * BLOCK) of all parts."""
    phi = encode(u, offset, valid, block, 0, map, False)
    if map.PARTS == 2:
        phi = beside(phi, encode(u, offset, valid, block, 1, map, False))
    return phi


@triton.jit
def slope(gradient, u, part: tl.constexpr, map):
    """Gradient of u (C, BLOCK) from that of the features of one part."""
    if map.KIND == "elementwise" or map.KIND == "projected":
        gradient *= map.SLOPE(u)
    elif map.KIND == "hyperbolic" and part == 1:
        gradient = -gradient
    elif map.KIND == "fourier":
        gradient *= map.first * (-tl.sin(u) if part == 0 else tl.cos(u))
    return gradient


@triton.jit
def pull_back(dx, to, du, n, h, start, valid, weights, block, map):
    """Add to the gradient of rows (C, BLOCK_E), or store the columns of an element-wise map."""
    if to.u is not None:
        store_rows(to.u, du, n, h, start, valid, block * map.BLOCK, map.PAIRS)
    if map.weights is None:
        store_rows(to.x, du, n, h, start, valid, block * map.BLOCK, map.F)
    else:
        weights = tl.trans(weights.to(map.OPERAND))
        dx = tl.dot(operand(du, map), weights, dx, input_precision=map.PRECISION)
    return dx
