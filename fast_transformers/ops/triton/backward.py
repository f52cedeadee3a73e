"""Gradients of the queries, and of keys and values; each as in :mod:`.forward`.

With P the query factors over the denominators, G = do v^T - delta and delta = do.out,

    d(query feature)_t = factor_t (S do_t - delta_t z + sum_{j<=t} G_tj kappa_j)
    d(key feature)_j   = R v_j - r + sum_{t>=j} G_tj P_t,        R = sum_t P_t do_t^T,
    dv_j               = R^T kappa_j + sum_{t>=j} (P_t.kappa_j) do_t,   r = sum_t P_t delta_t

S, z sum over the keys before the chunk, R, r over the queries after it. Exponential features:
P_ti kappa_ji is a weight of a softmax, at most 1, so R is kept relative to the running maximum
n of log2 P, and kappa 2^n is at most 1 for every query that made n.
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
    operand,
    project,
    pull_back,
    slope,
    store_rows,
)
from .relative import anchor_of, first_far
from .sums import INFINITY, at_row, is_kept, load_numbers, load_sums, store_numbers
from .tiles import flagged_tiles, is_flagged, place, values_of


@triton.jit
def write_dq(
    q, k, dq, batch, h, of_key, start, first_key, valid, now, kept, given_q, given_k, offset, seen,
    do, pairs, norms, deltas, sums, index, map,
    M: tl.constexpr, BLOCK_M: tl.constexpr, EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr,
    FLAGGED: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the queries ``now``."""
    dx = tl.zeros((valid.shape[0], map.BLOCK_E), tl.float32)
    for block in tl.range(0, map.BLOCKS, num_stages=map.STAGES):
        weights = load_weights(map, block)
        u = project(q, batch, h, start, valid, given_q, weights, block, map, False)
        du = tl.zeros(u.shape, tl.float32)
        if CAUSAL:
            u_k = project(k, batch, of_key, first_key, kept, given_k, weights, block, map, False)
        for part in tl.static_range(map.PARTS):
            kv, z, shift = load_sums(sums, index, block, part, 0, map, M, BLOCK_M)
            kv = tl.trans(operand(kv, map))
            db = tl.dot(do, kv, input_precision=map.PRECISION) - deltas[:, None] * z[None, :]
            anchor = shift
            if CAUSAL:
                kappa = encode(u_k, offset, kept, block, part, map, False)
                if EXPONENTIAL:
                    if FLAGGED:
                        anchor = anchor_of(kappa, seen, shift)
                        db *= tl.exp2(shift - anchor)[None, :]
                    kappa = tl.exp2(kappa - anchor[None, :])
                    if FLAGGED:  # far rows, which these queries do not see, would be infinite
                        kappa = tl.minimum(kappa, 1e30)
                db = tl.dot(pairs, operand(kappa, map), db, input_precision=map.PRECISION)
            if EXPONENTIAL:
                p = encode(u, None, None, block, part, map, False)
                db *= tl.exp2(p + anchor[None, :] - norms[:, None])
            else:
                db *= norms[:, None]
            du += slope(db, u, part, map)
        dx = pull_back(dx, dq, du, batch, h, start, now, weights, block, map)
    if map.weights is not None:
        store_rows(dq.x, dx * map.back, batch, h, start, now, 0, map.E)


@triton.jit
def differentiate_queries_tile(
    tile, q, k, v, mask, mask_n, length, heads, table, parts, sums, d_out, norm, numbers, out, dq,
    map, GROUPS: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    h, of_key, batch, start, end, begin, stop, index = place(
        tile, table, parts, length, heads, GROUPS, C, CHUNK, CAUSAL, True
    )
    r = tl.arange(0, C)
    valid = start + r < end
    given_q = load_given(q, batch, h, start, valid, map)
    at = at_row(batch, start + r, h, length, heads)
    norms = tl.load(norm + at, valid, INFINITY if EXPONENTIAL else 0.0)
    do, deltas = store_numbers(
        numbers, norms, at, d_out, out, batch, h, start, valid, map, M, BLOCK_M
    )
    if CAUSAL:
        j = tl.arange(0, CHUNK)
        first_key, ahead, kept, values = values_of(
            v, mask, mask_n, batch, of_key, begin, start, end, 0, map, M, BLOCK_M, CHUNK
        )
        given_k = load_given(k, batch, of_key, first_key, kept, map)
        offset = offset_of(given_k, kept, map)
        pairs = tl.dot(do, tl.trans(values), input_precision=map.PRECISION) - deltas[:, None]
        pairs = tl.where((r + ahead)[:, None] >= j[None, :], pairs, 0.0)
        pairs = operand(pairs, map)
    else:
        first_key, kept, given_k, offset, pairs = 0, None, None, None, None
    if FLAGGED:
        low = 0
        while low < C:
            seen = j <= ahead + low
            high = first_far(
                k, batch, of_key, first_key, kept, given_k, offset, None, seen, sums, index,
                map, False,
            ) - ahead  # fmt: skip
            now = valid & (r >= low) & (r < high)
            write_dq(
                q, k, dq, batch, h, of_key, start, first_key, valid, now, kept, given_q,
                given_k, offset, seen, do, pairs, norms, deltas, sums, index, map, M, BLOCK_M,
                EXPONENTIAL, CAUSAL, True,
            )  # fmt: skip
            low = high
    else:
        write_dq(
            q, k, dq, batch, h, of_key, start, first_key, valid, valid, kept, given_q, given_k,
            offset, None, do, pairs, norms, deltas, sums, index, map, M, BLOCK_M, EXPONENTIAL,
            CAUSAL, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "heads", "parts", "tiles", "mask_n"])
def differentiate_queries(
    q, k, v, mask, mask_n, length, heads, table, parts, tiles, sums, flags, d_out, norm, numbers,
    out, dq, map, GROUPS: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    """As ``forward.attend``, with all value dimensions. The numbers (N, H, L, 2) of each query,
    its norm and delta, are stored for what comes after."""
    if FLAGGED:
        first, last = flagged_tiles(
            tiles, flags, table, parts, length, heads, GROUPS, C, CHUNK, CAUSAL, True
        )
        for tile in range(first, last):
            if is_flagged(tile, flags, table, parts, length, heads, GROUPS, C, CHUNK, True, True):
                differentiate_queries_tile(
                    tile, q, k, v, mask, mask_n, length, heads, table, parts, sums, d_out, norm,
                    numbers, out, dq, map, GROUPS, M, BLOCK_M, C, CHUNK, EXPONENTIAL, CAUSAL,
                    FLAGGED,
                )  # fmt: skip
    else:
        differentiate_queries_tile(
            tl.program_id(0), q, k, v, mask, mask_n, length, heads, table, parts, sums, d_out,
            norm, numbers, out, dq, map, GROUPS, M, BLOCK_M, C, CHUNK, EXPONENTIAL, CAUSAL,
            FLAGGED,
        )  # fmt: skip


@triton.jit
def write_dk_dv(
    q, k, dk, dv, batch, h, of_key, start, first_query, kept, now, valid, given_q, given_k, offset,
    seen, values, do, pairs, later, norms, sums, index, map,
    M: tl.constexpr, BLOCK_M: tl.constexpr, EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr,
    FLAGGED: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the keys and values ``now``."""
    C: tl.constexpr = kept.shape[0]
    dx, total = tl.zeros((C, map.BLOCK_E), tl.float32), tl.zeros((C, 8), tl.float32)
    d_values = tl.zeros((C, BLOCK_M), tl.float32)
    weighted = tl.zeros((C, valid.shape[0] if CAUSAL else 1), tl.float32)
    for block in tl.range(0, map.BLOCKS, num_stages=map.STAGES):
        weights = load_weights(map, block)
        u = project(k, batch, of_key, start, kept, given_k, weights, block, map, False)
        du = tl.zeros(u.shape, tl.float32)
        if CAUSAL:
            u_q = project(q, batch, h, first_query, valid, given_q, weights, block, map, False)
        for part in tl.static_range(map.PARTS):
            kv, z, shift = load_sums(sums, index, block, part, 0, map, M, BLOCK_M)
            kv = operand(kv, map)
            kappa = encode(u, offset, kept, block, part, map, False)
            da = tl.dot(values, tl.trans(kv), input_precision=map.PRECISION) - z[None, :]
            anchor = shift
            if CAUSAL:
                p = encode(u_q, None, None, block, part, map, False)
                if EXPONENTIAL:
                    p -= norms[:, None]
                    if FLAGGED:
                        anchor = anchor_of(p, seen, shift)
                        da *= tl.exp2(shift - anchor)[None, :]
                    p = tl.exp2(p - anchor[None, :])
                    if FLAGGED:
                        p = tl.minimum(p, 1e30)
                else:
                    p *= norms[:, None]
                p = operand(p, map)
                da = tl.dot(pairs, p, da, input_precision=map.PRECISION)
            if EXPONENTIAL:
                kappa = tl.exp2(kappa + anchor[None, :])
                da *= kappa
            factors = operand(kappa, map)
            if CAUSAL:
                weighted = tl.dot(factors, tl.trans(p), weighted, input_precision=map.PRECISION)
                if FLAGGED:
                    factors = operand(kappa * tl.exp2(shift - anchor)[None, :], map)
            d_values = tl.dot(factors, kv, d_values, input_precision=map.PRECISION)
            if map.KIND == "hyperbolic":
                total += tl.sum(tl.reshape(da, (C, map.BLOCK // 8, 8)), 1)  # no shuffles yet
            du += slope(da, u, part, map)
        if not EXPONENTIAL:  # whose kappa is 0
            du = tl.where(kept[:, None], du, 0.0)
        dx = pull_back(dx, dk, du, batch, h, start, now, weights, block, map)
    if CAUSAL:
        weighted = operand(tl.where(later, weighted, 0.0), map)
        d_values = tl.dot(weighted, do, d_values, input_precision=map.PRECISION)
    store_rows(dv, d_values, batch, h, start, now, 0, M)
    if map.weights is not None:
        dx *= map.back
        if map.KIND == "hyperbolic":
            dx -= (map.back * map.back * tl.sum(total, 1))[:, None] * given_k.to(tl.float32)
        store_rows(dk.x, dx, batch, h, start, now, 0, map.E)


@triton.jit
def differentiate_keys_tile(
    tile, q, k, v, mask, mask_n, length, heads, table, parts, sums, d_out, numbers, dk, dv, map,
    GROUPS: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    h, of_key, batch, start, end, begin, stop, index = place(
        tile, table, parts, length, heads, GROUPS, C, CHUNK, CAUSAL, False
    )
    r = tl.arange(0, C)
    kept = is_kept(mask, mask_n, batch, start + r, start, end)
    given_k = load_given(k, batch, of_key, start, kept, map)
    offset = offset_of(given_k, kept, map)
    values = load_rows(v, batch, of_key, start, kept, 0, M, BLOCK_M).to(map.OPERAND)
    if CAUSAL:
        t = tl.arange(0, CHUNK)
        first_query = begin + (start - begin) // CHUNK * CHUNK
        ahead = start - first_query
        valid = (t >= ahead) & (first_query + t < stop)
        given_q = load_given(q, batch, h, first_query, valid, map)
        at = at_row(batch, first_query + t, h, length, heads)
        norms, deltas = load_numbers(numbers, at, valid, EXPONENTIAL)
        do = load_rows(d_out, batch, h, first_query, valid, 0, M, BLOCK_M).to(map.OPERAND)
        later = (r + ahead)[:, None] <= t[None, :]
        pairs = tl.dot(values, tl.trans(do), input_precision=map.PRECISION) - deltas[None, :]
        pairs = operand(tl.where(later, pairs, 0.0), map)
    else:
        first_query, valid, given_q, norms = 0, None, None, None
        do, later, pairs = None, None, None
    if FLAGGED:
        high = tl.minimum(end - start, C)
        while high > 0:
            seen = t >= ahead + high - 1
            low = first_far(
                q, batch, h, first_query, valid, given_q, None, norms, seen, sums, index, map,
                True,
            ) - ahead  # fmt: skip
            now = (start + r < end) & (r >= low) & (r < high)
            write_dk_dv(
                q, k, dk, dv, batch, h, of_key, start, first_query, kept, now, valid, given_q,
                given_k, offset, seen, values, do, pairs, later, norms, sums, index, map, M,
                BLOCK_M, EXPONENTIAL, CAUSAL, True,
            )  # fmt: skip
            high = low
    else:
        write_dk_dv(
            q, k, dk, dv, batch, h, of_key, start, first_query, kept, start + r < end, valid,
            given_q, given_k, offset, None, values, do, pairs, later, norms, sums, index, map,
            M, BLOCK_M, EXPONENTIAL, CAUSAL, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "heads", "parts", "tiles", "mask_n"])
def differentiate_keys(
    q, k, v, mask, mask_n, length, heads, table, parts, tiles, sums, flags, d_out, numbers, dk,
    dv, map, GROUPS: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, EXPONENTIAL: tl.constexpr, CAUSAL: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    """One program per C keys and query head; dk and dv have rows for each query head.

    ``sums`` R, r are those after the chunk if it is causal, else those of the sequence.
    """
    if FLAGGED:
        first, last = flagged_tiles(
            tiles, flags, table, parts, length, heads, GROUPS, C, CHUNK, CAUSAL, False
        )
        for tile in range(first, last):
            if is_flagged(tile, flags, table, parts, length, heads, GROUPS, C, CHUNK, True, False):
                differentiate_keys_tile(
                    tile, q, k, v, mask, mask_n, length, heads, table, parts, sums, d_out,
                    numbers, dk, dv, map, GROUPS, M, BLOCK_M, C, CHUNK, EXPONENTIAL, CAUSAL,
                    FLAGGED,
                )  # fmt: skip
    else:
        differentiate_keys_tile(
            tl.program_id(0), q, k, v, mask, mask_n, length, heads, table, parts, sums, d_out,
            numbers, dk, dv, map, GROUPS, M, BLOCK_M, C, CHUNK, EXPONENTIAL, CAUSAL, FLAGGED,
        )  # fmt: skip
