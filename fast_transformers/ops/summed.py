"""Attention to all keys at once: sum over the keys, then look the sums up.

    S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j),   out_i = phi(q_i) S / phi(q_i).z

Both halves stream over chunks and recompute the feature map in the backward pass, so that no
feature outlives its chunk. The two halves serve by themselves too: a decoder sums its memory
once and looks it up at every step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .call import Call
from .encode import width
from .layout import (
    BLOCK,
    BLOCK_FEATURES,
    MIN_CHUNK,
    Block,
    blocks,
    group,
    scale_into,
    tiles,
    write_into,
)
from .scaling import factor_of, norm_of, query_factors
from .sums import Sums, Triple, empty_sums, start_from
from .threads import paced

Gradients = list[Tensor | None]


def _chunks(length: int, call: Call, sums: Sums, what: str) -> Iterator[Block]:
    """The size of a chunk changes no cost here, as long as its features stay in a cache."""
    most = min(BLOCK, BLOCK_FEATURES // max(sums.z.shape[-1], 1))
    chunk = call.chunk or max(MIN_CHUNK, most)
    return paced(blocks(0, length, chunk, chunk), sums.kv, what, *sums.kv.shape, chunk)


def _room(room: Tensor | None, sums: Sums, block: Block, groups: int = 1) -> Tensor:
    """Memory for the features of a block: that of the block before, if they are as many."""
    heads, features = sums.z.shape
    shape = block.t, heads, groups * block.c, features
    return sums.z.new_empty(shape) if room is None or room.shape != shape else room


def allocate_state(call: Call, k: Tensor, v: Tensor) -> Triple:
    """The sums before the first of these keys."""
    features = width(call.features, k, call.dtype)
    return empty_sums(v, features, call.features.exponential, call.dtype)


def accumulate(
    call: Call, k: Tensor, v: Tensor, key_mask: Tensor | None, state: Triple | None
) -> Triple:
    """The sums over keys (N, S, H, E) and values (N, S, H, M), added to a state."""
    n, length, heads, _ = v.shape
    final = allocate_state(call, k, v)
    start_from(state, final)
    for tile in tiles(n, heads, length, call.whole):
        k_tile, v_tile = tile.of(k), tile.of(v)
        keys = call.encoder(of_keys=True, mask=tile.of_mask(key_mask))
        sums = Sums.of_tile(final, tile)
        if keys.has_powers(k):
            sums.unshift()
        room = None
        for block in _chunks(length, call, sums, "accumulate"):
            room = _room(room, sums, block)
            kappa = room
            if not (sums.plain and keys.key_powers(k_tile, block, kappa)):
                sums.settle()  # more of them will be out of range
                kappa = sums.enter(keys(k_tile, block, out=room))
                assert kappa is not None
            sums.absorb(kappa, keys.rows(v_tile, block))
        sums.settle()
        sums.write(final, tile)
    return final


def accumulate_backward(
    call: Call,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    shift: Tensor | None,
    d_kv: Tensor,
    d_z: Tensor,
    d_parameters: Gradients,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v from those of the final kv and z, which are relative to ``shift``."""
    n, length, heads, _ = v.shape
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for tile in tiles(n, heads, length, call.whole):
        keys = call.encoder(of_keys=True, mask=tile.of_mask(key_mask))
        final = Sums.of_tile((d_kv, d_z, shift), tile)
        k_tile, v_tile, dk_tile, dv_tile = (tile.of(x) for x in (k, v, dk, dv))
        for block in _chunks(length, call, final, "accumulate backward"):
            a, back = keys.differentiated(k_tile, block, d_parameters)
            kappa = a if final.shift is None else a.sub_(final.shift[:, None]).exp2_()
            values = keys.rows(v_tile, block)[0]
            da = torch.baddbmm(final.z[:, None], values, final.kv.mT)[None]
            if final.shift is None:
                keys.clear(da, block)
            else:
                da.mul_(kappa)
            back(da, dk_tile)
            write_into(dv_tile, block, torch.bmm(kappa[0], final.kv)[None])
    return dk, dv


def attend(call: Call, q: Tensor, state: Triple) -> tuple[Tensor, Tensor]:
    """Values (N, L, H*R, M) of queries (N, L, H*R, E) that see all of a state (N, H, ...).

    The second result, (N, L, H*R, 1), is what the backward pass needs of the denominators.
    """
    n, length, q_heads, _ = q.shape
    heads, m = state[0].shape[1], state[0].shape[-1]
    groups = q_heads // max(heads, 1)
    out = q.new_empty(n, length, q_heads, m, dtype=call.dtype)
    norm = q.new_empty(n, length if call.settings.keep else 0, q_heads, 1, dtype=call.dtype)
    for tile in tiles(n, heads, length, call.whole):
        q_tile, out_tile, norm_tile = (tile.of(x, groups) for x in (q, out, norm))
        queries = call.encoder(groups=groups)
        sums = Sums.of_tile(state, tile)
        level = sums.level() if queries.has_powers(q) else None
        room = None
        for block in _chunks(length, call, sums, "attend"):
            room = _room(room, sums, block, groups)
            if level is not None:
                p, (at, offset) = room, level
                offset = offset + queries.query_powers(q_tile, block, p)
            else:
                p, at, offset = queries(q_tile, block, sums.shift, room), sums, None
                if sums.shift is not None:
                    p, offset = query_factors(p)
            # a row times the transpose takes MKL half the time of a product with a column
            denominator = torch.matmul(at.z[:, None], p.mT).mT
            factor = factor_of(denominator, *call.lift(seen=False))
            scale_into(out_tile, block, torch.bmm(p[0], at.kv)[None], factor, groups)
            if call.settings.keep:
                write_into(norm_tile, block, norm_of(denominator, factor, offset), groups)
    return out, norm


def attend_backward(
    call: Call,
    q: Tensor,
    state: Triple,
    out: Tensor,
    norm: Tensor,
    d_out: Tensor,
    d_parameters: Gradients,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and z."""
    n, length, q_heads, _ = q.shape
    kv, z, _ = state
    groups = q_heads // max(kv.shape[1], 1)
    dq, d_kv, d_z = torch.empty_like(q), kv.new_zeros(kv.shape), z.new_zeros(z.shape)
    for tile in tiles(n, kv.shape[1], length, call.whole):
        queries = call.encoder(groups=groups)
        sums = Sums.of_tile(state, tile)
        gradient = Sums.of_tile((d_kv, d_z, None), tile)
        q_tile, norm_tile, dq_tile = (tile.of(x, groups) for x in (q, norm, dq))
        o_tile, do_tile = tile.of(out, groups), tile.of(d_out, groups)
        for block in _chunks(length, call, sums, "attend backward"):
            b, back = queries.differentiated(q_tile, block, d_parameters, sums.shift)
            do = group(block.of(do_tile).to(call.dtype), block, groups)
            factor = group(block.of(norm_tile), block, groups)
            delta = row_dots(o_tile, do_tile, block, groups)
            db = torch.bmm(do[0], sums.kv.mT)[None]
            db.addcmul_(delta, sums.z[:, None], value=-1)
            if sums.shift is None:
                p = b * factor
                db.mul_(factor)
            else:
                p = b.sub_(factor).exp2_()
                db.mul_(p)
            gradient.add(p[0].mT, do[0])
            gradient.z = gradient.z - (p * delta).sum(2)[0]
            back(db, dq_tile)
        gradient.write((d_kv, d_z, None), tile)
    return dq, d_kv, d_z


def row_dots(x: Tensor, y: Tensor, block: Block, groups: int) -> Tensor:
    """x.y over the last dimension for a block of rows, grouped as (T, G, R*C, 1)."""
    return group((block.of(x) * block.of(y)).sum(-1, keepdim=True), block, groups)
