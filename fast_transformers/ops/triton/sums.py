"""Sums over keys, or over queries in the backward pass: S (F, M) and z (F).

Exponential features are relative to 2^shift (F), their running maximum. A program walks along
a segment of a sequence with some of the features. It works on them as (BLOCK, C): then what is
done for each feature, its maximum, its sum and the decay of its sums, stays within a warp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .maps import (
    encode,
    features_at,
    load_features,
    load_given,
    load_rows,
    load_weights,
    offset_of,
    operand,
    project,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
SLACK = tl.constexpr(60.0)  # powers of 2 by which a factor may exceed 1


class Sums(NamedTuple):
    """Contiguous kv (..., F, M), z and shift (..., F); None where there are none."""

    kv: Any
    z: Any
    shift: Any


@triton.jit
def locate(table, index, parts, size, length, CHUNK: tl.constexpr):
    """Batch row, sequence, first row and end of a part, those of its sequence, and the number
    of its chunk (of CHUNK rows, counted in all sequences)."""
    if table is None:
        part = index % parts  # in 32 bits: a division takes six times as long in 64
        sequence = (index // parts).to(tl.int64)
        batch, begin, stop = sequence, part * 0, part * 0 + length
        start = part * size
        end = tl.minimum(start + size, stop)
        chunk = sequence * tl.cdiv(tl.maximum(length, 1), CHUNK)
    else:
        entry = table + index * 6
        sequence = tl.load(entry).to(tl.int64)
        batch = sequence * 0
        start, end = tl.load(entry + 1), tl.load(entry + 2)
        begin, stop = tl.load(entry + 3), tl.load(entry + 4)
        chunk = tl.load(entry + 5).to(tl.int64)
    return batch, sequence, start, end, begin, stop, chunk + (start - begin) // CHUNK


@triton.jit
def first_of(index, map):
    """Where the features of the sums with a number begin."""
    return tl.cast(index, tl.int64) * map.F


@triton.jit
def load_shift(sums, index, block, part, map):
    f, exists = features_at(block, part, map)
    shift = tl.full(f.shape, LOWEST, tl.float32)
    if sums.shift is not None:
        shift = load_features(sums.shift + first_of(index, map), f, exists, LOWEST, map)
    return shift


@triton.jit
def load_sums(sums, index, block, part, column, map, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """S (BLOCK, BLOCK_M), z and shift (BLOCK) of features, see ``maps.features_at``; those before
    the first key without any."""
    f, exists = features_at(block, part, map)
    kv, z = tl.zeros((f.shape[0], BLOCK_M), tl.float32), tl.zeros(f.shape, tl.float32)
    if sums.kv is not None:
        m = column * BLOCK_M + tl.arange(0, BLOCK_M)
        first = first_of(index, map)
        at = sums.kv + first * M + (f[:, None] * M + m[None, :])
        if map.F == map.PARTS * map.BLOCK * map.BLOCKS and M % BLOCK_M == 0:
            kv = tl.load(at)
        else:
            kv = tl.load(at, mask=exists[:, None] & (m < M)[None, :], other=0.0)
        z = load_features(sums.z + first, f, exists, 0.0, map)
    return kv, z, load_shift(sums, index, block, part, map)


@triton.jit
def store_sums(sums, index, block, part, column, kv, z, shift, map, M):
    f, exists = features_at(block, part, map)
    m = column * kv.shape[1] + tl.arange(0, kv.shape[1])
    first = first_of(index, map)
    inside = exists[:, None] & (m < M)[None, :]
    to = sums.kv + first * M + (f[:, None] * M + m[None, :])
    tl.store(to, kv.to(sums.kv.dtype.element_ty), inside)
    if column == 0:
        tl.store(sums.z + first + f, z, exists)
        if sums.shift is not None:
            tl.store(sums.shift + first + f, shift, exists)


@triton.jit
def is_kept(mask, mask_n, batch, row, first, end):
    """Whether keys exist and count."""
    valid = (row >= first) & (row < end)
    if mask is not None:
        valid &= tl.load(mask + batch * mask_n + row, mask=valid, other=0) != 0
    return valid


@triton.jit
def at_row(n, row, h, length, heads):
    """Where a number of each row is in a contiguous (N, H, length)."""
    return (n * heads + h) * length + row


@triton.jit
def load_numbers(numbers, at, valid, EXPONENTIAL: tl.constexpr):
    """Norms and deltas (C,), both twice in a tile, which is large enough for Triton to load once:
    what is less than a number a thread is loaded by every thread for each of its elements."""
    column = tl.arange(0, 4) % 2
    tile = tl.load(numbers + at[:, None] * 2 + column[None, :], valid[:, None], 0.0)
    norms, deltas = tl.split(tl.reshape(tile, (tile.shape[0], 2, 2)))
    norms, _ = tl.split(norms)
    deltas, _ = tl.split(deltas)
    if EXPONENTIAL:
        norms = tl.where(valid, norms, INFINITY)
    return norms, deltas


@triton.jit
def store_numbers(
    numbers, norms, at, d_out, out, n, h, start, valid, map,
    M: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store norms and deltas of the queries from ``start`` on; do as a factor, and the deltas."""
    do = load_rows(d_out, n, h, start, valid, 0, M, BLOCK_M)
    y = load_rows(out, n, h, start, valid, 0, M, BLOCK_M).to(tl.float32)
    deltas = tl.sum(do.to(tl.float32) * y, 1)
    to = numbers + at[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(to, tl.join(norms, deltas), valid[:, None])
    return do.to(map.OPERAND), deltas


@triton.jit
def keys_across(k, mask, mask_n, n, h, start, end, weights, block, part, map, C: tl.constexpr):
    """Features (BLOCK, C) of the keys from ``start`` on, and which of them count."""
    valid = is_kept(mask, mask_n, n, start + tl.arange(0, C), start, end)
    given = load_given(k, n, h, start, valid, map)
    u = project(k, n, h, start, valid, given, weights, block, map, True)
    return encode(u, offset_of(given, valid, map), valid, block, part, map, True), valid


@triton.jit
def queries_across(
    q, numbers, n, h, start, end, length, heads, weights, block, part, map,
    EXPONENTIAL: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Factors (BLOCK, C) of the queries from ``start`` on over their denominators, the deltas of
    these queries, and which of them exist."""
    row = start + tl.arange(0, C)
    valid = row < end
    given = load_given(q, n, h, start, valid, map)
    u = project(q, n, h, start, valid, given, weights, block, map, True)
    at = at_row(n, row, h, length, heads)
    norms, deltas = load_numbers(numbers, at, valid, EXPONENTIAL)
    p = encode(u, None, None, block, part, map, True)
    return p - norms[None, :] if EXPONENTIAL else p * norms[None, :], deltas, valid


@triton.jit
def start_at(shift, first):
    """The shift of a walk that nothing comes before: its ``first`` features (BLOCK, 16), of
    which one row is there. Whatever is relative to it has met that row."""
    return tl.where(shift == LOWEST, tl.maximum(tl.max(first, 1), LOWEST), shift)


@triton.jit
def step(
    phi, rows, counts, kv, z, shift, prefix, flags, index, block, part, column,
    map, M: tl.constexpr, EXPONENTIAL: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Store the sums before a chunk, if that is wanted, and add the chunk's features (BLOCK, C)
    and rows (C, M) to them; z counts each row ``counts`` times.

    A chunk is flagged if its features exceed the shift by more than SLACK.
    """
    if STORE:
        store_sums(prefix, index, block, part, column, kv, z, shift, map, M)
    if EXPONENTIAL:
        top = tl.max(phi, 1)
        if STORE:
            if column == 0:
                tl.store(flags + index + tl.zeros(top.shape, tl.int32), 1, top - shift > SLACK)
        new = tl.maximum(shift, top)
        decay = tl.exp2(shift - new)
        kv, z, shift = kv * decay[:, None], z * decay, new
        phi = tl.exp2(phi - shift[:, None])
    kv = tl.dot(operand(phi, map), rows, kv, input_precision=map.PRECISION)
    if counts is not None:
        phi *= counts[None, :]
    return kv, z + tl.sum(phi, 1), shift


@triton.jit(do_not_specialize=["length", "heads", "parts", "size", "mask_n"])
def walk_keys(
    k, v, mask, mask_n, length, heads, table, parts, size, start_sums, prefix, flags, end_sums,
    map,
    M: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, EXPONENTIAL: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """Along the keys of a segment, from ``start_sums`` to ``end_sums`` (both of the segment).

    With STORE ``prefix`` takes those before every chunk, otherwise the last, as ``end_sums``.
    """
    pid, column = tl.program_id(0), tl.program_id(2)
    block, part = tl.program_id(1) // map.PARTS, tl.program_id(1) % map.PARTS
    h = pid % heads
    batch, _, first, end, _, _, chunk = locate(table, pid // heads, parts, size, length, CHUNK)
    weights = load_weights(map, block)
    kv, z, shift = load_sums(start_sums, pid, block, part, column, map, M, BLOCK_M)
    if EXPONENTIAL:
        one = tl.minimum(first + 1, end)
        begins, _ = keys_across(
            k, mask, mask_n, batch, h, first, one, weights, block, part, map, 16
        )
        shift = start_at(shift, begins)
    for start in tl.range(first, end, CHUNK, num_stages=map.STAGES):
        phi, valid = keys_across(
            k, mask, mask_n, batch, h, start, end, weights, block, part, map, CHUNK
        )
        rows = load_rows(v, batch, h, start, valid, column * BLOCK_M, M, BLOCK_M).to(map.OPERAND)
        index = (chunk + (start - first) // CHUNK) * heads + h
        kv, z, shift = step(
            phi, rows, None, kv, z, shift, prefix, flags, index, block, part, column, map, M,
            EXPONENTIAL, STORE,
        )  # fmt: skip
    if end_sums.kv is not None:
        store_sums(end_sums, pid, block, part, column, kv, z, shift, map, M)
        if not STORE and prefix.kv is not None:
            store_sums(prefix, pid, block, part, column, kv, z, shift, map, M)


@triton.jit(do_not_specialize=["length", "heads", "parts", "size"])
def walk_queries(
    q, d_out, numbers, length, heads, table, parts, size, start_sums, prefix, flags, end_sums,
    map,
    M: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, EXPONENTIAL: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """As :func:`walk_keys`, in reverse, for R = sum P do^T and r = sum P delta with the factors P
    of the queries over their denominators."""
    pid, column = tl.program_id(0), tl.program_id(2)
    block, part = tl.program_id(1) // map.PARTS, tl.program_id(1) % map.PARTS
    h = pid % heads
    batch, _, first, end, _, _, chunk = locate(table, pid // heads, parts, size, length, CHUNK)
    weights = load_weights(map, block)
    kv, z, shift = load_sums(start_sums, pid, block, part, column, map, M, BLOCK_M)
    chunks = tl.cdiv(end - first, CHUNK)
    if EXPONENTIAL:
        one = tl.maximum(end - 1, first)
        ends, _, _ = queries_across(
            q, numbers, batch, h, one, end, length, heads, weights, block, part, map, True, 16
        )
        shift = start_at(shift, ends)
    for i in tl.range(0, chunks, num_stages=map.STAGES):
        start = first + (chunks - 1 - i) * CHUNK
        p, deltas, valid = queries_across(
            q, numbers, batch, h, start, end, length, heads, weights, block, part, map,
            EXPONENTIAL, CHUNK,
        )  # fmt: skip
        rows = load_rows(d_out, batch, h, start, valid, column * BLOCK_M, M, BLOCK_M).to(
            map.OPERAND
        )
        index = (chunk + chunks - 1 - i) * heads + h
        kv, z, shift = step(
            p, rows, deltas, kv, z, shift, prefix, flags, index, block, part, column, map, M,
            EXPONENTIAL, STORE,
        )  # fmt: skip
    if end_sums.kv is not None:
        store_sums(end_sums, pid, block, part, column, kv, z, shift, map, M)
        if not STORE and prefix.kv is not None:
            store_sums(prefix, pid, block, part, column, kv, z, shift, map, M)
