"""Values of causal attention whose features are so few that the sums stay in registers.

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
    operand,
    project,
    store_rows,
)
from .sums import at_row, is_kept, load_sums, locate, store_sums


@triton.jit
def features_of(x, n, h, start, valid, kept, weights, map):
    """phi (C, F) of a chunk; the features of keys that are not ``kept`` are 0."""
    given = load_given(x, n, h, start, valid, map)
    u = project(x, n, h, start, valid, given, weights, 0, map, False)
    return encode(u, None, kept, 0, 0, map, False)


@triton.jit(do_not_specialize=["length", "heads", "parts", "size", "mask_n"])
def attend_along(
    q, k, v, mask, mask_n, length, heads, table, parts, size, starts, end_sums, out, norm, eps,
    map,
    GROUPS: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Values and norms of the queries of a segment, as ``forward.attend``."""
    pid = tl.program_id(0)
    h = pid % heads
    of_key, key_heads = h // GROUPS, heads // GROUPS
    batch, sequence, first, end, begin, stop, _ = locate(
        table, pid // heads, parts, size, length, CHUNK
    )
    weights = load_weights(map, 0)
    index = pid // heads * key_heads + of_key
    kv, z, _ = load_sums(starts, index, 0, 0, 0, map, M, BLOCK_M)
    r = tl.arange(0, CHUNK)
    for start in range(first, end, CHUNK):
        valid = start + r < end
        kept = is_kept(mask, mask_n, batch, start + r, start, end)
        phi_q = features_of(q, batch, h, start, valid, None, weights, map)
        phi_k = features_of(k, batch, of_key, start, kept, kept, weights, map)
        values = load_rows(v, batch, of_key, start, kept, 0, M, BLOCK_M)
        values = values.to(map.OPERAND)
        factors, kappa = operand(phi_q, map), operand(phi_k, map)
        pairs = tl.dot(factors, tl.trans(kappa), input_precision=map.PRECISION)
        pairs = tl.where(r[:, None] >= r[None, :], pairs, 0.0)
        top = tl.dot(factors, operand(kv, map), input_precision=map.PRECISION)
        top = tl.dot(operand(pairs, map), values, top, input_precision=map.PRECISION)
        bottom = tl.sum(phi_q * z[None, :], 1) + tl.sum(pairs, 1) + eps
        none = bottom == 0.0
        inverse = tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, bottom))
        store_rows(out, top * inverse[:, None], batch, h, start, valid, 0, M)
        if norm is not None:
            tl.store(norm + at_row(batch, start + r, h, length, heads), inverse, valid)
        kv = tl.dot(tl.trans(kappa), values, kv, input_precision=map.PRECISION)
        z += tl.sum(phi_k, 0)
    if end_sums.kv is not None:
        if h % GROUPS == 0:
            own = sequence * key_heads + of_key
            store_sums(end_sums, own, 0, 0, 0, kv, z, z, map, M)
