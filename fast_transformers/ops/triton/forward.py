"""Values of the queries: causal, from the sums before each chunk; or full, from all of them.

    out_t = (p_t S + sum_{j<=t} (p_t.kappa_j) v_j) / (p_t.z + sum_{j<=t} p_t.kappa_j)

with the sums S, z over the keys before the chunk, and the factors p of queries and kappa of
keys. A program goes through the features of one block of queries, block by block; they are
never all there. Exponential features: kappa is at most 2^SLACK relative to the shift of the
sums, which every query of the chunk has seen; p is relative to the base (see :mod:`.relative`) or
to the largest factor of its query in the first block of features. Either may be exceeded by far:
then the denominator is out of range and the tile is flagged, to be worked on again relative to the
largest factor of all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maps import (
    beside,
    encode,
    encode_all,
    load_given,
    load_weights,
    offset_of,
    once,
    operand,
    project,
    store_rows,
)
from .relative import anchor_of, base_of, first_far, flag_far, within
from .sums import at_row, load_kv, load_shift, load_z
from .tiles import flagged_tiles, is_flagged, place, values_of


@triton.jit
def largest(
    q, k, batch, h, of_key, start, first_key, valid, kept, given_q, given_k, offset, seen, sums,
    index, map,
):  # fmt: skip
    """The largest factor of each query (C,) of a flagged tile; a logarithm."""
    largest = tl.full((valid.shape[0], map.PARTS * map.BLOCK), float("-inf"), tl.float32)
    for block in tl.range(0, map.BLOCKS, num_stages=map.STAGES):
        weights = load_weights(map, block)
        u = project(q, batch, h, start, valid, given_q, weights, block, map, False)
        anchor = load_shift(sums, index, block, None, map)
        if seen is not None:
            u_k = project(k, batch, of_key, first_key, kept, given_k, weights, block, map, False)
            anchor = anchor_of(encode_all(u_k, offset, kept, block, map), seen, anchor)
        p = encode_all(u, None, None, block, map)
        largest = tl.maximum(largest, p + anchor[None, :])
    return tl.max(largest, 1)


@triton.jit
def factors_of(
    u, u_k, offset, kept, seen, offsets, base, sums, index, block, part: tl.constexpr, map,
    EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    """Of one part of a block: p for the pairs and for the sums, kappa, p z, and the offsets."""
    z = load_z(sums, index, block, part, map)
    p = encode(u, None, None, block, part, map, False)
    if base is not None:
        offset, kept = None, None
    if CAUSAL:
        kappa = encode(u_k, offset, kept, block, part, map, False)
    if EXPONENTIAL:
        shift = load_shift(sums, index, block, part, map)
        anchor = shift if base is None else shift - base
        if CAUSAL:
            if FLAGGED:
                anchor = anchor_of(kappa, seen, shift)
            kappa = tl.exp2(kappa - anchor[None, :])
        p += anchor[None, :]
        if base is None:
            if not FLAGGED:  # a branch would take more registers than this takes time
                offsets = tl.where(block == 0, tl.max(p, 1), offsets)
            p -= offsets[:, None]
        p = tl.exp2(p)
    else:
        p = once(p)
    factors = operand(p, map)
    below, kappa = factors, operand(kappa, map) if CAUSAL else factors
    if CAUSAL:
        if FLAGGED:
            p *= tl.exp2(shift - anchor)[None, :]
            below = operand(p, map)
    return factors, below, kappa, below.to(tl.float32) * z[None, :], offsets


@triton.jit
def look_up(
    q, k, batch, h, of_key, start, first_key, valid, kept, given_q, given_k, offset, seen, sums,
    index, column, flag, map,
    M: tl.constexpr, BLOCK_M: tl.constexpr, EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr,
    FLAGGED: tl.constexpr,
):  # fmt: skip
    """p S (C, M), p.z (C), the pairs p.kappa (C, CHUNK), and what p is relative to (C).

    Set the ``flag`` if keys are too far from the base."""
    C: tl.constexpr = valid.shape[0]
    top, bottom = tl.zeros((C, BLOCK_M), tl.float32), tl.zeros((C, map.BLOCK), tl.float32)
    pairs = tl.zeros((C, kept.shape[0] if CAUSAL else 1), tl.float32)
    offsets = tl.zeros((C,), tl.float32)
    base = base_of(sums, index, map) if map.KIND == "hyperbolic" and not FLAGGED else None
    if FLAGGED:
        offsets = largest(
            q, k, batch, h, of_key, start, first_key, valid, kept, given_q, given_k, offset, seen,
            sums, index, map,
        )  # fmt: skip
    for block in tl.range(0, map.BLOCKS, num_stages=map.STAGES):
        weights = load_weights(map, block)
        u = project(q, batch, h, start, valid, given_q, weights, block, map, False)
        u_k = None
        if CAUSAL:
            u_k = project(k, batch, of_key, first_key, kept, given_k, weights, block, map, False)
        kv = operand(load_kv(sums, index, block, None, column, map, M, BLOCK_M), map)
        p, below, kappa, more, offsets = factors_of(
            u, u_k, offset, kept, seen, offsets, base, sums, index, block, 0, map, EXPONENTIAL,
            CAUSAL, FLAGGED,
        )  # fmt: skip
        bottom += more
        if map.PARTS == 2:
            p_1, below_1, kappa_1, more, offsets = factors_of(
                u, u_k, offset, kept, seen, offsets, base, sums, index, block, 1, map,
                EXPONENTIAL, CAUSAL, FLAGGED,
            )  # fmt: skip
            bottom += more
            p, below = beside(p, p_1), beside(below, below_1)
            if CAUSAL:
                kappa = beside(kappa, kappa_1)
        if CAUSAL:
            pairs = tl.dot(p, tl.trans(kappa), pairs, input_precision=map.PRECISION)
        top = tl.dot(below, kv, top, input_precision=map.PRECISION)
    if base is not None:
        offsets += base
        if CAUSAL:
            flag_far(flag, offset - base, kept)
            pairs *= tl.exp2(offset - base)[None, :]
    return top, tl.sum(bottom, 1), pairs, offsets


@triton.jit
def write(
    out, norm, top, bottom, pairs, offsets, values, ahead, valid, batch, h, start, length, heads,
    eps, column, flag, map,
    M: tl.constexpr, EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Store the values, and what the backward pass needs of their denominators.

    Set the ``flag``, if there is one, where they are not to be used.
    """
    if CAUSAL:
        r, j = tl.arange(0, pairs.shape[0]), tl.arange(0, pairs.shape[1])
        pairs = tl.where((r + ahead)[:, None] >= j[None, :], pairs, 0.0)
        top = tl.dot(operand(pairs, map), values, top, input_precision=map.PRECISION)
        bottom += tl.sum(pairs, 1)
    if not EXPONENTIAL:
        bottom += eps
    if flag is not None:
        tl.store(flag + tl.zeros(bottom.shape, tl.int32), 1, valid & ~within(bottom, offsets, map))
    none = bottom == 0.0
    bottom = tl.where(none, 1.0, bottom)
    inverse = tl.where(none, 0.0, 1.0 / bottom)
    top *= inverse[:, None]
    store_rows(out, top, batch, h, start, valid, column * top.shape[1], M)
    if norm is not None and column == 0:
        if EXPONENTIAL:
            kept = tl.where(none, float("inf"), tl.log2(bottom) + offsets)
        else:
            kept = inverse
        row = start + tl.arange(0, valid.shape[0])
        tl.store(norm + at_row(batch, row, h, length, heads), kept, valid)


@triton.jit
def attend_tile(
    tile, q, k, v, mask, mask_n, length, heads, table, parts, sums, flags, out, norm, eps, map,
    GROUPS: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1)
    h, of_key, batch, start, end, begin, stop, index = place(
        tile, table, parts, length, heads, GROUPS, C, CHUNK, CAUSAL, True
    )
    r = tl.arange(0, C)
    valid = start + r < end
    given_q = load_given(q, batch, h, start, valid, map)
    if CAUSAL:
        first_key, ahead, kept, values = values_of(
            v, mask, mask_n, batch, of_key, begin, start, end, column, map, M, BLOCK_M, CHUNK
        )
        given_k = load_given(k, batch, of_key, first_key, kept, map)
        offset = offset_of(given_k, kept, map)
    else:
        first_key, ahead, kept, given_k, offset, values = 0, 0, None, None, None, None
    flag = None
    if EXPONENTIAL and not FLAGGED:
        flag = flags + (index if CAUSAL else tile)
    if FLAGGED and CAUSAL:
        j = tl.arange(0, CHUNK)
        low = 0
        while low < C:
            seen = j <= ahead + low
            high = first_far(
                k, batch, of_key, first_key, kept, given_k, offset, None, seen, sums, index,
                map, False,
            ) - ahead  # fmt: skip
            top, bottom, pairs, offsets = look_up(
                q, k, batch, h, of_key, start, first_key, valid, kept, given_q, given_k,
                offset, seen, sums, index, column, None, map, M, BLOCK_M, EXPONENTIAL, CAUSAL,
                True,
            )  # fmt: skip
            now = valid & (r >= low) & (r < high)
            write(
                out, norm, top, bottom, pairs, offsets, values, ahead, now, batch, h, start,
                length, heads, eps, column, flag, map, M, EXPONENTIAL, CAUSAL,
            )  # fmt: skip
            low = high
    else:
        top, bottom, pairs, offsets = look_up(
            q, k, batch, h, of_key, start, first_key, valid, kept, given_q, given_k, offset,
            None, sums, index, column, flag, map, M, BLOCK_M, EXPONENTIAL, CAUSAL, FLAGGED,
        )  # fmt: skip
        write(
            out, norm, top, bottom, pairs, offsets, values, ahead, valid, batch, h, start,
            length, heads, eps, column, flag, map, M, EXPONENTIAL, CAUSAL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "heads", "parts", "tiles", "mask_n"])
def attend(
    q, k, v, mask, mask_n, length, heads, table, parts, tiles, sums, flags, out, norm, eps, map,
    GROUPS: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    """One program per C queries of a head, of which GROUPS share a key head.

    ``sums`` are those before the chunk if it is causal, else those of the sequence.
    """
    if FLAGGED:
        first, last = flagged_tiles(
            tiles, flags, table, parts, length, heads, GROUPS, C, CHUNK, CAUSAL, True
        )
        for tile in range(first, last):
            if is_flagged(
                tile, flags, table, parts, length, heads, GROUPS, C, CHUNK, CAUSAL, True
            ):
                attend_tile(
                    tile, q, k, v, mask, mask_n, length, heads, table, parts, sums, flags, out,
                    norm, eps, map, GROUPS, M, BLOCK_M, C, CHUNK, EXPONENTIAL, CAUSAL, FLAGGED,
                )  # fmt: skip
    else:
        attend_tile(
            tl.program_id(0), q, k, v, mask, mask_n, length, heads, table, parts, sums, flags,
            out, norm, eps, map, GROUPS, M, BLOCK_M, C, CHUNK, EXPONENTIAL, CAUSAL, FLAGGED,
        )  # fmt: skip
