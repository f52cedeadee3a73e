"""The backward pass of :mod:`.chunked`: intervals in reverse, each forth and back.

With P the normalised query factors, G = do v^T - delta and delta = do.out,

    d(query feature)_t = S do_t - delta_t z + sum_{j<=t} G_tj kappa_j
    d(key feature)_j   = R v_j - r + sum_{t>=j} G_tj P_t,        R = sum_t P_t do_t^T,
    dv_j               = R^T kappa_j + sum_{t>=j} (P_t.kappa_j) do_t,   r = sum_t P_t delta_t

where S, z sum over the keys before the chunk and R, r over the queries after it. The former are
restored on the way forth, from the states that the forward pass kept. R and r are kept relative
to the shift of the block, like the key factors: P_ti = 2^(b_ti + shift_i - log2 of the
denominator), which is at most 1 for a query that has seen the keys which make the shift, so that
R shrinks on its way to the earlier keys, whose shift is lower.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call
from .chunked import Inputs, Kept, cut, intervals, triangles
from .encode import PullBack
from .layout import Block, tiles
from .rows import Rows
from .sums import Sums
from .threads import paced, popped

Gradients = tuple[Tensor, Tensor, Tensor]  # of q, k and v, or of a tile of them


def backward(
    call: Call,
    inputs: Inputs,
    final_shift: Tensor | None,
    out: Tensor,
    kept: Kept,
    d_out: Tensor,
    d_state: tuple[Tensor | None, Tensor | None],
    d_parameters: list[Tensor | None],
) -> tuple[Gradients, tuple[Tensor, Tensor]]:
    """Gradients of q, k, v and of the initial kv and z; those of the map's parameters are added
    to the list."""
    n, length, heads, m = inputs.v.shape
    features, groups = kept.kv.shape[-2], inputs.groups
    dq, dk, dv = (torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v))
    d_kv = inputs.v.new_zeros(n, heads, features, m, dtype=call.dtype)
    d_z = inputs.v.new_zeros(n, heads, features, dtype=call.dtype)
    for mine, given in zip((d_kv, d_z), d_state, strict=True):
        if given is not None:
            mine.copy_(given)
    for tile in tiles(n, heads, length, call.whole):
        outputs = tile.of(out, groups), tile.of(d_out, groups)
        sweep = _Sweep(call, inputs.tile(tile), *outputs, kept.tile(tile, groups), d_parameters)
        future = Sums.of_tile((d_kv, -d_z, final_shift), tile)
        sweep.run(future, (tile.of(dq, groups), tile.of(dk), tile.of(dv)))
        future.z = -future.z
        future.write((d_kv, d_z, None), tile)
    return (dq, dk, dv), (d_kv, d_z)


class _Gradients:
    """Memory for what blocks of one size need on one way alone."""

    def __init__(self, groups: int, block: Block, kv: Tensor) -> None:
        _, t, c = block
        g, features, m = kv.shape
        self.of_queries = kv.new_empty(t, g, groups * c, features)
        self.of_keys = kv.new_empty(t, g, c, features) if groups > 1 else self.of_queries
        self.of_values = kv.new_empty(t, g, c, m)
        self.weights = kv.new_empty(t, g, groups * c, c)


class _Room:
    """Memory for what a block's way forth leaves for its way back, and views of its chunks."""

    def __init__(self, groups: int, block: Block, kv: Tensor, gradients: _Gradients) -> None:
        _, t, c = block
        g, features, m = kv.shape
        new = kv.new_empty
        self.p = p = new(t, g, groups * c, features)  # normalised, or else do is
        self.kappa = kappa = new(t, g, c, features)
        self.v, self.do = v, do = new(t, g, c, m), new(t, g, groups * c, m)
        self.pairs = pairs = new(t, g, groups * c, c)  # G_tj
        self.gradients = gradients
        db, da, dv = gradients.of_queries, gradients.of_keys, gradients.of_values
        weights = gradients.weights
        self.triangles = triangles(pairs)
        self.triangles_of_weights = triangles(weights)
        self.chunks_forth = list(zip(kappa, kappa.mT, v, do, pairs, db, strict=True))
        back = zip(p, p.mT, kappa, v, do, pairs.mT, weights.mT, da, dv, strict=True)
        self.chunks_back = [*back][::-1]
        flat = [x.flatten(0, 1) for x in (p, kappa.mT, weights, do, v.mT, pairs)]
        self.all_p, self.across_keys, self.all_weights, self.all_do, self.across_values = flat[:5]
        self.all_pairs = flat[5]


class _Seen(NamedTuple):
    """What the way forth through a block leaves for the way back."""

    block: Block
    room: _Room
    delta: Tensor  # (T, G, R*C, 1); times the factors of the queries, if they are normalised
    shift: Tensor | None
    pull_back: PullBack  # of the keys


class _Sweep:
    """The backward pass of one tile."""

    def __init__(
        self,
        call: Call,
        inputs: Inputs,
        out: Tensor,
        d_out: Tensor,
        kept: Kept,
        d_parameters: list[Tensor | None],
    ) -> None:
        self._call, self._inputs, groups = call, inputs, inputs.groups
        self._v, self._out, self._d_out = Rows(inputs.v), Rows(out, groups), Rows(d_out, groups)
        self._norm = Rows(kept.norm, groups)
        self._kept, self._d_parameters = kept, d_parameters
        self._queries, self._keys = inputs.encoders(call)
        self._cuts = kept.cuts[0, 0].tolist() if call.features.exponential else None
        self._gradients: dict[tuple[int, int], _Gradients] = {}
        self._free: dict[tuple[int, int], list[_Room]] = {}  # rooms by their T and C

    def run(self, future: Sums, gradients: Gradients) -> None:
        """From the last interval to the first, with the sums of the future so far."""
        exponential = self._call.features.exponential
        dq, dk, dv = map(Rows, gradients, (self._inputs.groups, 1, 1))
        pieces = intervals(self._call, self._inputs, self._kept.kv.shape[-2])
        for i, interval in reversed([*enumerate(pieces)]):
            sums = self._kept.read(i, exponential)
            kv, work = sums.kv, (*sums.kv.shape, self._call.chunk)
            past, seen = sums.snapshot(), []
            for block in paced(self._blocks(interval), kv, "causal backward", *work):
                seen.append(self._forth(block, past, dq))
            for one in paced(popped(seen), kv, "causal backward, back", *work):
                self._back(one, future, dk, dv)
                self._free[one.block[1:]].append(one.room)
            if i == 0 and sums.shift is not None:
                future.lower(sums.shift)

    def _blocks(self, interval: slice) -> list[Block]:
        """The blocks that the forward pass cut these tokens into."""
        found, chunk = [], self._call.chunk
        waiting = cut(interval, chunk, self._kept.kv.shape[-2])[::-1]
        while waiting:
            block = waiting.pop()
            if self._cuts is not None and any(self._cuts[block.start + 1 : block.at.stop]):
                waiting += block.halves()[::-1]
            else:
                found.append(block)
        return found

    def _room(self, block: Block, kv: Tensor) -> _Room:
        free = self._free.setdefault(block[1:], [])
        if free:
            return free.pop()
        groups = self._inputs.groups
        if block[1:] not in self._gradients:
            self._gradients[block[1:]] = _Gradients(groups, block, kv)
        return _Room(groups, block, kv, self._gradients[block[1:]])

    def _forth(self, block: Block, past: Sums, dq: Rows) -> _Seen:
        """Gradients of the queries of a block; its keys are added to the sums."""
        room = self._room(block, past.kv)
        p, kappa, do, db = room.p, room.kappa, room.do, room.gradients.of_queries
        _, keys_back = self._keys.differentiated(block, self._d_parameters, out=kappa)
        past.enter(kappa)
        self._keys.gather(self._v, block, room.v)
        _, queries_back = self._queries.differentiated(block, self._d_parameters, past.shift, p)
        self._d_out.copy_to(do, block)
        norm, delta = self._norm_and_delta(block, do)
        if past.shift is None:
            do.mul_(norm)  # in the place of p, which is wider
            delta = delta * norm
        else:
            p.sub_(norm).exp2_()
        z = past.z_before(kappa)
        torch.bmm(room.all_do, room.across_values, out=room.all_pairs)
        room.pairs.sub_(delta)
        room.triangles.tril_()
        kv = past.kv.mT
        for kappa_i, across, v_i, do_i, pairs_i, db_i in room.chunks_forth:
            torch.bmm(do_i, kv, out=db_i).baddbmm_(pairs_i, kappa_i)
            past.add(across, v_i)
        db.addcmul_(delta, z, value=-1)
        queries_back(db if past.shift is None else db.mul_(p), dq)
        return _Seen(block, room, delta, past.shift, keys_back)

    def _back(self, seen: _Seen, future: Sums, dk: Rows, dv_out: Rows) -> None:
        """Gradients of the keys and values of a block; its queries are added to the sums."""
        block, room, delta, shift, keys_back = seen
        if shift is not None:
            future.lower(shift)
        totals = torch.bmm(delta.flatten(0, 1).mT, room.all_p)
        r = future.z_after(totals.view(len(delta), *future.z.shape))
        da, dv = room.gradients.of_keys, room.gradients.of_values
        torch.bmm(room.all_p, room.across_keys, out=room.all_weights)
        room.triangles_of_weights.tril_()
        kv = future.kv.mT
        for p_i, across, kappa_i, v_i, do_i, pairs_i, weights_i, da_i, dv_i in room.chunks_back:
            torch.bmm(v_i, kv, out=da_i).baddbmm_(pairs_i, p_i)
            torch.bmm(kappa_i, future.kv, out=dv_i).baddbmm_(weights_i, do_i)
            future.add(across, do_i)
        da.sub_(r)
        if shift is None:
            self._keys.clear(da, block)
        else:
            da.mul_(room.kappa)
        keys_back(da, dk)
        dv_out.write(block, dv)

    def _norm_and_delta(self, block: Block, do: Tensor) -> tuple[Tensor, Tensor]:
        """Both (T, G, R*C, 1)."""
        if not self._call.settings.normalised:
            return do.new_ones(1), do.new_zeros(1).expand(*do.shape[:-1], 1)
        return self._norm[block], self._out.dot(self._d_out, block)
