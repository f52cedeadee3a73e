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
from .layout import BLOCK, BLOCK_FEATURES, MIN_CHUNK, Block, blocks, tiles
from .projected import Halves
from .rows import Rows, carve
from .scaling import factor_of, norm_of, query_factors
from .sums import Sums, Triple, empty_sums, start_from
from .threads import paced

Gradients = list[Tensor | None]


def _chunks(length: int, call: Call, sums: Sums, what: str) -> Iterator[Block]:
    """The size of a chunk changes no cost here, as long as its features stay in a cache."""
    most = min(BLOCK, BLOCK_FEATURES // max(sums.z.shape[-1], 1))
    chunk = call.chunk or max(MIN_CHUNK, most)
    return paced(blocks(0, length, chunk, chunk), sums.kv, what, *sums.kv.shape, chunk)


class _Room:
    """Memory that blocks of one size use one after the other, and views of it."""

    def __init__(self, sums: Sums, rows: int) -> None:
        g, f, m = sums.kv.shape
        self.size = rows
        pieces = carve(sums.kv, [(g, rows, f), (g, rows, f), (g, rows, m), (g, 1, rows)])
        self.chunk, self.chunk_gradient, self.chunk_values, self.denominators = pieces
        self.features, self.gradient, self.values = (
            x[None] for x in (self.chunk, self.chunk_gradient, self.chunk_values)
        )
        self.halves = Halves.of(self.features)
        self.across, self.column = self.chunk.mT, self.denominators.mT[None]


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
        keys = call.encoder(tile.of(k), of_keys=True, mask=tile.of_mask(key_mask))
        values, sums, room = Rows(tile.of(v)), Sums.of_tile(final, tile), None
        if keys.has_powers:
            sums.unshift()
        for block in _chunks(length, call, sums, "accumulate"):
            if room is None or room.size != block.c:
                room = _Room(sums, block.c)
            if not (sums.plain and keys.key_powers(block, room.halves)):
                sums.settle()  # more of them will be out of range
                sums.enter(keys(block, out=room.features))
            sums.absorb(room.chunk, room.across, keys.rows(values, block)[0])
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
        keys = call.encoder(tile.of(k), of_keys=True, mask=tile.of_mask(key_mask))
        final = Sums.of_tile((d_kv, d_z, shift), tile)
        v_tile, dk_tile, dv_tile = (Rows(tile.of(x)) for x in (v, dk, dv))
        z, across, room = final.z[:, None], final.kv.mT, None
        for block in _chunks(length, call, final, "accumulate backward"):
            if room is None or room.size != block.c:
                room = _Room(final, block.c)
            kappa, back = keys.differentiated(block, d_parameters, out=room.features)
            if final.shift is not None:
                kappa.sub_(final.shift[:, None]).exp2_()
            values = keys.rows(v_tile, block)[0]
            torch.baddbmm(z, values, across, out=room.chunk_gradient)
            if final.shift is None:
                keys.clear(room.gradient, block)
            else:
                room.gradient.mul_(kappa)
            back(room.gradient, dk_tile)
            torch.bmm(room.chunk, final.kv, out=room.chunk_values)
            dv_tile.write(block, room.values)
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
    lift = call.lift(seen=False)
    for tile in tiles(n, heads, length, call.whole):
        out_tile, norm_tile = (Rows(tile.of(x, groups), groups) for x in (out, norm))
        queries = call.encoder(tile.of(q, groups), groups=groups)
        sums, offset, room = Sums.of_tile(state, tile), None, None
        level = sums.level() if queries.has_powers else None
        at, top = (sums, None) if level is None else level
        # a row times the transpose takes MKL half the time of a product with a column
        row = at.z[:, None]
        for block in _chunks(length, call, sums, "attend"):
            if room is None or room.size != groups * block.c:
                room = _Room(sums, groups * block.c)
            if top is not None:
                offset = top + queries.query_powers(block, room.halves)
            else:
                b = queries(block, sums.shift, room.features)
                if sums.shift is not None:
                    _, offset = query_factors(b)
            torch.bmm(row, room.across, out=room.denominators)
            factor = factor_of(room.column, *lift)
            torch.bmm(room.chunk, at.kv, out=room.chunk_values)
            out_tile.write_product(block, room.values, factor)
            if call.settings.keep:
                norm_tile.write(block, norm_of(room.column, factor, offset))
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
        queries = call.encoder(tile.of(q, groups), groups=groups)
        sums = Sums.of_tile(state, tile)
        gradient = Sums.of_tile((d_kv, d_z, None), tile)
        norm_tile, dq_tile, o_tile, do_tile = (
            Rows(tile.of(x, groups), groups) for x in (norm, dq, out, d_out)
        )
        z, across, room = sums.z[:, None], sums.kv.mT, None
        for block in _chunks(length, call, sums, "attend backward"):
            if room is None or room.size != groups * block.c:
                room = _Room(sums, groups * block.c)
            p, back = queries.differentiated(block, d_parameters, sums.shift, room.features)
            do, factor = do_tile[block].to(call.dtype), norm_tile[block]
            delta = o_tile.dot(do_tile, block)
            if sums.shift is None:
                do, delta = do * factor, delta * factor  # both in the place of p, which is wider
            else:
                p.sub_(factor).exp2_()
            torch.bmm(do[0], across, out=room.chunk_gradient)
            room.gradient.addcmul_(delta, z, value=-1)
            if sums.shift is not None:
                room.gradient.mul_(p)
            gradient.add(room.across, do[0])
            gradient.z = gradient.z - torch.bmm(delta[0].mT, room.chunk)[:, 0]
            back(room.gradient, dq_tile)
        gradient.write((d_kv, d_z, None), tile)
    return dq, d_kv, d_z
