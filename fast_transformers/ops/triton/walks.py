"""Programs that walk along a segment of a sequence and sum up some of the features of its rows.

They work on the features as (BLOCK, C): then what is done for each feature, its maximum, its sum
and the decay of its sums, stays within a warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maps import (
    encode,
    load_given,
    load_rows,
    load_weights,
    offset_of,
    once,
    operand,
    project,
)
from .sums import LOWEST, SLACK, at_row, is_kept, load_numbers, load_sums, locate, store_sums


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
    else:
        phi = once(phi)
    kv = tl.dot(operand(phi, map), rows, kv, input_precision=map.PRECISION)
    if counts is not None:
        phi *= counts[None, :]
    return kv, z + tl.sum(phi, 1), shift


@triton.jit
def walker(map):
    """Number of a program's segment and head, and its block, part and column of the sums. Programs
    of one segment are neighbours: the second to read a row finds it in the cache."""
    pid, features = tl.program_id(0), map.BLOCKS * map.PARTS
    return (
        pid // features,
        pid % features // map.PARTS,
        pid % map.PARTS,
        tl.program_id(1),
    )


@triton.jit
def finish(
    end_sums, prefix, pid, own, last, block, part, column, kv, z, shift, map,
    M: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Store the final sums where they are wanted: with STORE those of a sequence, with the number
    ``own``, after its ``last`` segment, otherwise those of every segment."""
    if end_sums.kv is not None:
        if STORE:
            if last:
                store_sums(end_sums, own, block, part, column, kv, z, shift, map, M)
        else:
            store_sums(end_sums, pid, block, part, column, kv, z, shift, map, M)
            if prefix.kv is not None:
                store_sums(prefix, pid, block, part, column, kv, z, shift, map, M)


@triton.jit(do_not_specialize=["length", "heads", "parts", "size", "mask_n"])
def walk_keys(
    k, v, mask, mask_n, length, heads, table, parts, size, start_sums, prefix, flags, end_sums,
    map,
    M: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, EXPONENTIAL: tl.constexpr,
    STORE: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Along the keys of a segment, from ``start_sums`` of the segment to ``end_sums``, see
    ``finish``; with SKIP not along the last segment of a sequence.

    With STORE ``prefix`` takes those before every chunk, otherwise the last, as ``end_sums``.
    """
    pid, block, part, column = walker(map)
    h = pid % heads
    batch, sequence, first, end, _, stop, chunk = locate(
        table, pid // heads, parts, size, length, CHUNK
    )
    last = end == stop
    if SKIP:
        end = tl.where(last, first, end)
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
    own = sequence * heads + h
    finish(end_sums, prefix, pid, own, last, block, part, column, kv, z, shift, map, M, STORE)


@triton.jit(do_not_specialize=["length", "heads", "parts", "size"])
def walk_queries(
    q, d_out, numbers, length, heads, table, parts, size, start_sums, prefix, flags, end_sums,
    map,
    M: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, EXPONENTIAL: tl.constexpr,
    STORE: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """As :func:`walk_keys`, in reverse, for R = sum P do^T and r = sum P delta with the factors P
    of the queries over their denominators."""
    pid, block, part, column = walker(map)
    h = pid % heads
    batch, sequence, first, end, begin, _, chunk = locate(
        table, pid // heads, parts, size, length, CHUNK
    )
    last = first == begin
    if SKIP:
        end = tl.where(last, first, end)
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
    own = sequence * heads + h
    finish(end_sums, prefix, pid, own, last, block, part, column, kv, z, shift, map, M, STORE)
