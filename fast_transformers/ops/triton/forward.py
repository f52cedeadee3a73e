"""Values of the queries: causal, from the sums before each chunk; or full, from all of them.

    out_t = (p_t S + sum_{j<=t} (p_t.kappa_j) v_j) / (p_t.z + sum_{j<=t} p_t.kappa_j)

with the sums S, z over the keys before the chunk, and the factors p of queries and kappa of
keys. A program goes through the features of one block of queries, block by block; they are
never all there. Exponential features: kappa is at most 2^SLACK relative to the shift of the
sums, which every query of the chunk has seen; p is also relative to the largest factor of its
query in the first block of features, which may be exceeded by far: then the denominator is huge
and the tile is flagged, to be worked on again relative to the largest factor of all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maps import (
    encode,
    encode_all,
    load_given,
    load_weights,
    offset_of,
    operand,
    operand_all,
    project,
    store_rows,
)
from .sums import SLACK, at_row, load_shift, load_sums
from .tiles import flagged_tiles, is_flagged, place, values_of

MOST = tl.constexpr(2.0**90)  # of a denominator; what is above the fraction line is as large


@triton.jit
def anchor_of(a, seen, shift):
    """The shift that includes the rows which are ``seen`` (C,) of features a (C, BLOCK)."""
    return tl.maximum(shift, tl.max(tl.where(seen[:, None], a, float("-inf")), 0))


@triton.jit
def first_far(
    x, n, h, start, valid, given, offset, norms, seen, sums, index, map, BACK: tl.constexpr
):
    """Bounds of the rows that can share a shift that includes the rows ``seen`` by all of them.

    The others exceed it by more than SLACK; forward or BACK, up to the next of those.
    """
    r = tl.arange(0, valid.shape[0])
    bound = tl.full((valid.shape[0],), -1 if BACK else valid.shape[0], tl.int32)
    for block in tl.range(0, map.BLOCKS, num_stages=map.STAGES):
        weights = load_weights(map, block)
        u = project(x, n, h, start, valid, given, weights, block, map, False)
        for part in tl.static_range(map.PARTS):
            shift = load_shift(sums, index, block, part, map)
            if BACK:
                a = encode(u, None, None, block, part, map, False) - norms[:, None]
            else:
                a = encode(u, offset, valid, block, part, map, False)
            anchor = anchor_of(a, seen, shift)
            far = (tl.max(a - anchor[None, :], 1) > SLACK) & ~seen
            if BACK:
                bound = tl.maximum(bound, tl.where(far, r, -1))
            else:
                bound = tl.minimum(bound, tl.where(far, r, valid.shape[0]))
    return tl.max(bound, 0) + 1 if BACK else tl.min(bound, 0)


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
def look_up(
    q, k, batch, h, of_key, start, first_key, valid, kept, given_q, given_k, offset, seen, sums,
    index, column, map,
    M: tl.constexpr, BLOCK_M: tl.constexpr, EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr,
    FLAGGED: tl.constexpr,
):  # fmt: skip
    """p S (C, M), p.z (C), the pairs p.kappa (C, CHUNK), and what p is relative to (C)."""
    C: tl.constexpr = valid.shape[0]
    top, bottom = tl.zeros((C, BLOCK_M), tl.float32), tl.zeros((C, map.BLOCK), tl.float32)
    pairs = tl.zeros((C, kept.shape[0] if CAUSAL else 1), tl.float32)
    offsets = tl.zeros((C,), tl.float32)
    if FLAGGED:
        offsets = largest(
            q, k, batch, h, of_key, start, first_key, valid, kept, given_q, given_k, offset, seen,
            sums, index, map,
        )  # fmt: skip
    for block in range(0, map.BLOCKS):  # what else could be loaded early costs more than it gives
        weights = load_weights(map, block)
        u = project(q, batch, h, start, valid, given_q, weights, block, map, False)
        if CAUSAL:
            u_k = project(k, batch, of_key, first_key, kept, given_k, weights, block, map, False)
        kv, z, shift = load_sums(sums, index, block, None, column, map, M, BLOCK_M)
        p = encode_all(u, None, None, block, map)
        if CAUSAL:
            kappa = encode_all(u_k, offset, kept, block, map)
        if EXPONENTIAL:
            anchor = shift
            if CAUSAL:
                if FLAGGED:
                    anchor = anchor_of(kappa, seen, shift)
                kappa = tl.exp2(kappa - anchor[None, :])
            p += anchor[None, :]
            if not FLAGGED:  # a branch would take more registers than this takes time
                offsets = tl.where(block == 0, tl.max(p, 1), offsets)
            p = tl.exp2(p - offsets[:, None])
        if CAUSAL:
            kappa = tl.trans(operand_all(kappa, map))
            pairs = tl.dot(operand_all(p, map), kappa, pairs, input_precision=map.PRECISION)
            if FLAGGED:
                p *= tl.exp2(shift - anchor)[None, :]
        top = tl.dot(operand_all(p, map), operand(kv, map), top, input_precision=map.PRECISION)
        bottom += tl.sum(tl.reshape(p * z[None, :], (C, map.PARTS, map.BLOCK)), 1)
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
        tl.store(flag + tl.zeros(bottom.shape, tl.int32), 1, valid & ~(bottom <= MOST))
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
                offset, seen, sums, index, column, map, M, BLOCK_M, EXPONENTIAL, CAUSAL, True,
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
            None, sums, index, column, map, M, BLOCK_M, EXPONENTIAL, CAUSAL, FLAGGED,
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
