"""Sums over keys, or over queries in the backward pass: S (F, M) and z (F).

Exponential features are relative to 2^shift (F), their running maximum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .maps import (
    features_at,
    load_features,
    load_rows,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
SLACK = tl.constexpr(40.0)  # powers of 2 by which a factor may exceed 1


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
def load_z(sums, index, block, part, map):
    f, exists = features_at(block, part, map)
    z = tl.zeros(f.shape, tl.float32)
    if sums.z is not None:
        z = load_features(sums.z + first_of(index, map), f, exists, 0.0, map)
    return z


@triton.jit
def load_kv(sums, index, block, part, column, map, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """S (BLOCK, BLOCK_M) of features, see ``maps.features_at``; those before the first key without
    any."""
    f, exists = features_at(block, part, map)
    kv = tl.zeros((f.shape[0], BLOCK_M), tl.float32)
    if sums.kv is not None:
        m = column * BLOCK_M + tl.arange(0, BLOCK_M)
        at = sums.kv + first_of(index, map) * M + (f[:, None] * M + m[None, :])
        if map.F == map.PARTS * map.BLOCK * map.BLOCKS and M % BLOCK_M == 0:
            kv = tl.load(at)
        else:
            kv = tl.load(at, mask=exists[:, None] & (m < M)[None, :], other=0.0)
    return kv


@triton.jit
def load_sums(sums, index, block, part, column, map, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """S, z and shift (BLOCK) of features."""
    kv = load_kv(sums, index, block, part, column, map, M, BLOCK_M)
    z = load_z(sums, index, block, part, map)
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
