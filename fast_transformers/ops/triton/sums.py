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
    load_given,
    load_rows,
    load_weights,
    offset_of,
    operand,
    project,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
SLACK = tl.constexpr(30.0)  # powers of 2 by which a factor may exceed 1


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
        sequence, part = index // parts, (index % parts).to(tl.int32)
        batch, begin, stop = sequence, part * 0, part * 0 + length
        start = part * size
        end = tl.minimum(start + size, stop)
        chunk = sequence * tl.cdiv(tl.maximum(length, 1), CHUNK)
    else:
        entry = table + index * 6
        batch, sequence = index * 0, tl.load(entry).to(tl.int64)
        start, end = tl.load(entry + 1), tl.load(entry + 2)
        begin, stop = tl.load(entry + 3), tl.load(entry + 4)
        chunk = tl.load(entry + 5).to(tl.int64)
    return batch, sequence, start, end, begin, stop, chunk + (start - begin) // CHUNK


@triton.jit
def load_shift(sums, index, block, part, map):
    shift = tl.full((map.BLOCK,), LOWEST, tl.float32)
    if sums.shift is not None:
        f, exists = features_at(block, part, map)
        shift = tl.load(sums.shift + index * map.F + f, mask=exists, other=LOWEST)
    return shift


@triton.jit
def load_sums(sums, index, block, part, column, map, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """S (BLOCK, BLOCK_M), z and shift (BLOCK); those before the first key without any."""
    kv, z = tl.zeros((map.BLOCK, BLOCK_M), tl.float32), tl.zeros((map.BLOCK,), tl.float32)
    if sums.kv is not None:
        f, exists = features_at(block, part, map)
        m = column * BLOCK_M + tl.arange(0, BLOCK_M)
        at = index * map.F + f
        inside = exists[:, None] & (m < M)[None, :]
        kv = tl.load(sums.kv + at[:, None] * M + m[None, :], mask=inside, other=0.0)
        z = tl.load(sums.z + at, mask=exists, other=0.0)
    return kv, z, load_shift(sums, index, block, part, map)


@triton.jit
def store_sums(sums, index, block, part, column, kv, z, shift, map, M):
    f, exists = features_at(block, part, map)
    m = column * kv.shape[1] + tl.arange(0, kv.shape[1])
    at = index * map.F + f
    inside = exists[:, None] & (m < M)[None, :]
    tl.store(sums.kv + at[:, None] * M + m[None, :], kv.to(sums.kv.dtype.element_ty), inside)
    if column == 0:
        tl.store(sums.z + at, z, exists)
        if sums.shift is not None:
            tl.store(sums.shift + at, shift, exists)


@triton.jit
def is_kept(mask, mask_n, batch, row, first, end):
    """Whether keys exist and count."""
    valid = (row >= first) & (row < end)
    if mask is not None:
        valid &= tl.load(mask + batch * mask_n + row, mask=valid, other=0) != 0
    return valid


@triton.jit
def load_number(x, n, row, h, length, heads, valid, other):
    """Of each row, from a contiguous (N, length, H)."""
    return tl.load(x + (n * length + row) * heads + h, mask=valid, other=other)


@triton.jit
def step(
    phi, rows, counts, row, kv, z, shift, prefix, flags, index, block, part, column,
    map, M: tl.constexpr, EXPONENTIAL: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Store the sums before a chunk, if that is wanted, and add the chunk's features (BLOCK, C)
    and rows (C, M) to them; z counts each row ``counts`` times.

    The stored ones are relative to a shift that includes feature ``row`` of the chunk, the first
    that a reader meets. It is flagged if other rows exceed it by more than SLACK.
    """
    if EXPONENTIAL:
        top = tl.max(phi, 1)
        if STORE:
            r = tl.arange(0, phi.shape[1])
            seen = tl.max(tl.where((r == row)[None, :], phi, float("-inf")), 1)
            seen = tl.maximum(shift, seen)
            decay = tl.exp2(shift - seen)
            past = kv * decay[:, None]
            store_sums(prefix, index, block, part, column, past, z * decay, seen, map, M)
            if column == 0:
                if tl.max(top - seen, 0) > SLACK:
                    tl.store(flags + index, 1)
        new = tl.maximum(shift, top)
        decay = tl.exp2(shift - new)
        kv, z, shift = kv * decay[:, None], z * decay, new
        phi = tl.exp2(phi - shift[:, None])
    elif STORE:
        store_sums(prefix, index, block, part, column, kv, z, shift, map, M)
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
    """Along the keys of a segment, from ``start_sums`` (of the segment) to ``end_sums``: with
    STORE those of the sequence, else of the segment; on the way those before every chunk."""
    pid, column = tl.program_id(0).to(tl.int64), tl.program_id(2)
    block, part = tl.program_id(1) // map.PARTS, tl.program_id(1) % map.PARTS
    h = pid % heads
    batch, sequence, first, end, begin, stop, chunk = locate(
        table, pid // heads, parts, size, length, CHUNK
    )
    weights = load_weights(map, block)
    kv, z, shift = load_sums(start_sums, pid, block, part, column, map, M, BLOCK_M)
    for start in range(first, end, CHUNK):
        row = start + tl.arange(0, CHUNK)
        valid = is_kept(mask, mask_n, batch, row, first, end)
        given = load_given(k, batch, h, start, valid, map)
        u = project(k, batch, h, start, valid, given, weights, block, map, True)
        offset = offset_of(given, valid, map)
        rows = load_rows(v, batch, h, start, valid, column * BLOCK_M, M, BLOCK_M).to(map.OPERAND)
        index = (chunk + (start - first) // CHUNK) * heads + h
        phi = encode(u, offset, valid, block, part, map, True)
        kv, z, shift = step(
            phi, rows, None, 0, kv, z, shift, prefix, flags, index, block, part, column, map, M,
            EXPONENTIAL, STORE,
        )  # fmt: skip
    if end_sums.kv is not None:
        if not STORE or end == stop:
            index = sequence * heads + h if STORE else pid
            store_sums(end_sums, index, block, part, column, kv, z, shift, map, M)


@triton.jit(do_not_specialize=["length", "heads", "parts", "size"])
def walk_queries(
    q, d_out, norm, delta, length, heads, table, parts, size, start_sums, prefix, flags, end_sums,
    map,
    M: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, EXPONENTIAL: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """As :func:`walk_keys`, in reverse, for R = sum P do^T and r = sum P delta with the factors P
    of the queries over their denominators."""
    pid, column = tl.program_id(0).to(tl.int64), tl.program_id(2)
    block, part = tl.program_id(1) // map.PARTS, tl.program_id(1) % map.PARTS
    h = pid % heads
    batch, sequence, first, end, begin, stop, chunk = locate(
        table, pid // heads, parts, size, length, CHUNK
    )
    weights = load_weights(map, block)
    kv, z, shift = load_sums(start_sums, pid, block, part, column, map, M, BLOCK_M)
    chunks = tl.cdiv(end - first, CHUNK)
    for i in range(0, chunks):
        start = first + (chunks - 1 - i) * CHUNK
        row = start + tl.arange(0, CHUNK)
        valid = row < end
        given = load_given(q, batch, h, start, valid, map)
        u = project(q, batch, h, start, valid, given, weights, block, map, True)
        norms = load_number(
            norm, batch, row, h, length, heads, valid, INFINITY if EXPONENTIAL else 0.0
        )
        deltas = load_number(delta, batch, row, h, length, heads, valid, 0.0)
        rows = load_rows(d_out, batch, h, start, valid, column * BLOCK_M, M, BLOCK_M).to(
            map.OPERAND
        )
        index = (chunk + chunks - 1 - i) * heads + h
        last = tl.minimum(end - start, CHUNK) - 1
        p = encode(u, None, None, block, part, map, True)
        p = p - norms[None, :] if EXPONENTIAL else p * norms[None, :]
        kv, z, shift = step(
            p, rows, deltas, last, kv, z, shift, prefix, flags, index, block, part, column, map, M,
            EXPONENTIAL, STORE,
        )  # fmt: skip
    if end_sums.kv is not None:
        if not STORE or first == begin:
            index = sequence * heads + h if STORE else pid
            store_sums(end_sums, index, block, part, column, kv, z, shift, map, M)


@triton.jit(do_not_specialize=["heads", "parts"])
def scan(
    sums, start, end, firsts, heads, parts,
    F: tl.constexpr, M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Replace the sums of every segment by those of all before it, or all after it; ``start``
    comes before all of them, and ``end`` receives what includes them all."""
    pid = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m = tl.arange(0, BLOCK_M)
    exists = f < F
    inside = exists[:, None] & (m < M)[None, :]
    sequence, h = pid // heads, pid % heads
    if firsts is None:
        low, high = sequence * parts, (sequence + 1) * parts
    else:
        low = tl.load(firsts + sequence).to(tl.int64)
        high = tl.load(firsts + sequence + 1).to(tl.int64)
    kv, z = tl.zeros((BLOCK_F, BLOCK_M), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    shift = tl.full((BLOCK_F,), LOWEST, tl.float32)
    if start.kv is not None:
        at = pid * F + f
        kv += tl.load(start.kv + at[:, None] * M + m[None, :], mask=inside, other=0.0)
        z += tl.load(start.z + at, mask=exists, other=0.0)
        if start.shift is not None:
            shift = tl.load(start.shift + at, mask=exists, other=LOWEST)
    for i in range(0, high - low):
        index = low + i
        if REVERSE:
            index = high - 1 - i
        at = (index * heads + h) * F + f
        to = at[:, None] * M + m[None, :]
        own_kv = tl.load(sums.kv + to, mask=inside, other=0.0)
        own_z = tl.load(sums.z + at, mask=exists, other=0.0)
        if sums.shift is not None:
            own = tl.load(sums.shift + at, mask=exists, other=LOWEST)
        tl.debug_barrier()  # several threads have read what one overwrites
        tl.store(sums.kv + to, kv, inside)
        tl.store(sums.z + at, z, exists)
        if sums.shift is not None:
            tl.store(sums.shift + at, shift, exists)
            new = tl.maximum(shift, own)
            old, shift, own = tl.exp2(shift - new), new, tl.exp2(own - new)
            kv, z = kv * old[:, None], z * old
            own_kv, own_z = own_kv * own[:, None], own_z * own
        kv += own_kv
        z += own_z
    if end.kv is not None:
        at = pid * F + f
        tl.store(end.kv + at[:, None] * M + m[None, :], kv, inside)
        tl.store(end.z + at, z, exists)
        if end.shift is not None:
            tl.store(end.shift + at, shift, exists)
