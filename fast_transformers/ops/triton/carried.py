"""Causal attention, and the gradients of its queries, of features that are so few that the sums
stay in registers.

A program walks along a segment of a sequence, from the sums before it, and adds each chunk to
them when its queries have been answered: no sums are stored on the way. For features that are no
exponentials, in one block, with one tile of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maps import (
    encode,
    load_given,
    load_rows,
    load_weights,
    once,
    operand,
    project,
    pull_back,
    slope,
    store_rows,
)
from .sums import at_row, is_kept, load_sums, locate, store_numbers, store_sums


@triton.jit
def features_of(x, n, h, start, valid, kept, weights, map):
    """phi (C, F) of a chunk, and u; the features of keys that are not ``kept`` are 0."""
    given = load_given(x, n, h, start, valid, map)
    u = project(x, n, h, start, valid, given, weights, 0, map, False)
    return encode(u, None, kept, 0, 0, map, False), u


@triton.jit
def first_column(x):
    """(D, 16) of (D,), and zeros: a factor, to add up by a product, which keeps threads from
    waiting for each other."""
    return tl.where(tl.arange(0, 16)[None, :] == 0, x[:, None], 0.0)


@triton.jit
def begin_segment(
    table, parts, size, length, heads, starts, map,
    GROUPS: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Query head and key head of a program, batch row, sequence, the first row and the end of its
    segment, the end of the sequence, and the sums before the segment."""
    pid = tl.program_id(0)
    h = pid % heads
    of_key = h // GROUPS
    batch, sequence, first, end, _, stop, _ = locate(
        table, pid // heads, parts, size, length, CHUNK
    )
    index = pid // heads * (heads // GROUPS) + of_key
    kv, z, _ = load_sums(starts, index, 0, 0, 0, map, M, BLOCK_M)
    return h, of_key, batch, sequence, first, end, stop, kv, z


@triton.jit(do_not_specialize=["length", "heads", "parts", "size", "mask_n"])
def attend_along(
    q, k, v, mask, mask_n, length, heads, table, parts, size, starts, end_sums, out, norm, eps,
    map,
    GROUPS: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Values and norms of the queries of a segment, as ``forward.attend``."""
    h, of_key, batch, sequence, first, end, stop, kv, z = begin_segment(
        table, parts, size, length, heads, starts, map, GROUPS, M, BLOCK_M, CHUNK
    )
    weights = load_weights(map, 0)
    r = tl.arange(0, CHUNK)
    ones = first_column(tl.full(r.shape, 1.0, map.OPERAND))
    z = first_column(z)
    for start in tl.range(first, end, CHUNK, num_stages=map.STAGES):
        valid = start + r < end
        kept = is_kept(mask, mask_n, batch, start + r, start, end)
        phi_q, _u = features_of(q, batch, h, start, valid, None, weights, map)
        phi_k, _u = features_of(k, batch, of_key, start, kept, kept, weights, map)
        values = load_rows(v, batch, of_key, start, kept, 0, M, BLOCK_M)
        values = values.to(map.OPERAND)
        phi_q, phi_k = once(phi_q), once(phi_k)
        factors, kappa = operand(phi_q, map), operand(phi_k, map)
        pairs = tl.dot(factors, tl.trans(kappa), input_precision=map.PRECISION)
        pairs = operand(tl.where(r[:, None] >= r[None, :], pairs, 0.0), map)
        top = tl.dot(factors, operand(kv, map), input_precision=map.PRECISION)
        top = tl.dot(pairs, values, top, input_precision=map.PRECISION)
        bottom = tl.dot(factors, operand(z, map), input_precision=map.PRECISION)
        bottom = tl.dot(pairs, ones, bottom, input_precision=map.PRECISION)
        bottom = tl.sum(bottom, 1) + eps
        none = bottom == 0.0
        inverse = tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, bottom))
        store_rows(out, top * inverse[:, None], batch, h, start, valid, 0, M)
        if norm is not None:
            tl.store(norm + at_row(batch, start + r, h, length, heads), inverse, valid)
        kv = tl.dot(tl.trans(kappa), values, kv, input_precision=map.PRECISION)
        z = tl.dot(tl.trans(kappa), ones, z, input_precision=map.PRECISION)
    if end_sums.kv is not None:
        if h % GROUPS == 0 and end == stop:
            own = sequence * (heads // GROUPS) + of_key
            total = tl.sum(z, 1)
            store_sums(end_sums, own, 0, 0, 0, kv, total, total, map, M)


@triton.jit(do_not_specialize=["length", "heads", "parts", "size", "mask_n"])
def differentiate_queries_along(
    q, k, v, mask, mask_n, length, heads, table, parts, size, starts, d_out, norm, numbers, out,
    dq, map,
    GROUPS: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients and numbers of the queries of a segment, as ``backward.differentiate_queries``."""
    h, of_key, batch, sequence, first, end, stop, kv, z = begin_segment(
        table, parts, size, length, heads, starts, map, GROUPS, M, BLOCK_M, CHUNK
    )
    weights = load_weights(map, 0)
    vk = tl.trans(kv)  # as both products want it
    r = tl.arange(0, CHUNK)
    for start in tl.range(first, end, CHUNK, num_stages=map.STAGES):
        valid = start + r < end
        kept = is_kept(mask, mask_n, batch, start + r, start, end)
        at = at_row(batch, start + r, h, length, heads)
        norms = tl.load(norm + at, valid, 0.0)
        do, deltas = store_numbers(
            numbers, norms, at, d_out, out, batch, h, start, valid, map, M, BLOCK_M
        )
        values = load_rows(v, batch, of_key, start, kept, 0, M, BLOCK_M).to(map.OPERAND)
        pairs = tl.dot(do, tl.trans(values), input_precision=map.PRECISION) - deltas[:, None]
        pairs = operand(tl.where(r[:, None] >= r[None, :], pairs, 0.0), map)
        phi, _u = features_of(k, batch, of_key, start, kept, kept, weights, map)
        kappa = operand(phi, map)
        db = tl.dot(do, operand(vk, map), input_precision=map.PRECISION)
        db = tl.dot(pairs, kappa, db, input_precision=map.PRECISION)
        db = (db - deltas[:, None] * z[None, :]) * norms[:, None]
        _phi, u = features_of(q, batch, h, start, valid, None, weights, map)
        dx = tl.zeros((CHUNK, map.BLOCK_E), tl.float32)
        du = slope(db, u, 0, map)
        dx = pull_back(dx, dq, du, batch, h, start, valid, weights, 0, map)
        if map.weights is not None:
            store_rows(dq.x, dx * map.back, batch, h, start, valid, 0, map.E)
        vk = tl.dot(tl.trans(values), kappa, vk, input_precision=map.PRECISION)
        z += tl.sum(phi, 0)
