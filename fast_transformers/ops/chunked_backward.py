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
from .rows import Rows, carve
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


class _Passing:
    """Memory for what a block needs on one way alone: v, do, and gradients of its features."""

    def __init__(self, groups: int, block: Block, kv: Tensor) -> None:
        (_, t, c), (g, features, m) = block, kv.shape
        rows = groups * c
        shapes = [(c, m), (rows, m), (c, m), (rows, c), (rows, features), (c, features)]
        if groups == 1:
            del shapes[-1]  # the gradients of keys and of queries are not needed together
        pieces = carve(kv, [(t, g, *shape) for shape in shapes])
        self.v, self.do, self.dv, self.weights, self.db, *da = pieces
        self.da = da[0] if da else self.db
        self.triangles, self.all_weights = triangles(self.weights), self.weights.flatten(0, 1)
        self.all_db = self.db.flatten(0, 1)
        self.all_do, self.across_values = self.do.flatten(0, 1), self.v.mT.flatten(0, 1)
        self.holds: Block | None = None  # whose v and do these are


class _Room:
    """Memory for what a block's way forth leaves for its way back, and views of its chunks."""

    def __init__(self, groups: int, block: Block, kv: Tensor, passing: _Passing) -> None:
        (_, t, c), (g, features, _) = block, kv.shape
        rows = groups * c
        # factors of queries, normalised (or else do is), and of keys; and G_tj
        shapes = (t, g, rows, features), (t, g, c, features), (t, g, rows, c)
        self.p, self.kappa, self.pairs = p, kappa, pairs = carve(kv, shapes)
        self.passing, self.triangles = passing, triangles(pairs)
        v, do, dv, da, db = passing.v, passing.do, passing.dv, passing.da, passing.db
        self.chunks_forth = list(zip(kappa, kappa.mT, v, do, pairs, db, strict=True))
        back = zip(p, p.mT, kappa, v, do, pairs.mT, passing.weights.mT, da, dv, strict=True)
        self.chunks_back = [*back][::-1]
        flat = (x.flatten(0, 1) for x in (p, kappa.mT, pairs))
        self.all_p, self.across_keys, self.all_pairs = flat


class _Seen(NamedTuple):
    """What the way forth through a block leaves for the way back."""

    block: Block
    room: _Room
    delta: Tensor  # (T*G, R*C, 1); times the factors of the queries, if they are normalised
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
        self._scaled = call.settings.normalised and not call.features.exponential
        self._passing: dict[tuple[int, int], _Passing] = {}  # by T and C of their blocks
        self._free: dict[tuple[int, int], list[_Room]] = {}

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
                self._free.setdefault(one.block[1:], []).append(one.room)
            if i == 0 and sums.shift is not None:
                future.lower(sums.shift)

    def _blocks(self, interval: slice) -> list[Block]:
        """Blocks of these tokens, each within one of the forward pass."""
        found, chunk = [], self._call.chunk
        waiting = cut(interval, chunk, self._kept.kv.shape[-2], held=True)[::-1]
        while waiting:
            block = waiting.pop()
            if self._cuts is not None and any(self._cuts[block.start + 1 : block.at.stop]):
                waiting += block.halves()[::-1]
            else:
                found.append(block)
        return found

    def _room(self, block: Block, kv: Tensor) -> _Room:
        size, groups = block[1:], self._inputs.groups
        if self._free.get(size):
            return self._free[size].pop()
        self._free.clear()  # those of other sizes make place
        if size not in self._passing:
            self._passing[size] = _Passing(groups, block, kv)
        return _Room(groups, block, kv, self._passing[size])

    def _forth(self, block: Block, past: Sums, dq: Rows) -> _Seen:
        """Gradients of the queries of a block; its keys are added to the sums."""
        room = self._room(block, past.kv)
        p, kappa, passing = room.p, room.kappa, room.passing
        _, keys_back = self._keys.differentiated(block, self._d_parameters, out=kappa)
        past.enter(kappa)
        _, queries_back = self._queries.differentiated(block, self._d_parameters, past.shift, p)
        if past.shift is not None:
            p.sub_(self._norm[block]).exp2_()
        self._gather(block, passing)
        delta, z, db = self._delta(block, passing.do), past.z_before(kappa), passing.db
        torch.bmm(passing.all_do, passing.across_values, out=room.all_pairs)
        room.all_pairs.sub_(delta)
        room.triangles.tril_()
        kv = past.kv.mT
        for kappa_i, across, v_i, do_i, pairs_i, db_i in room.chunks_forth:
            torch.bmm(do_i, kv, out=db_i).baddbmm_(pairs_i, kappa_i)
            past.add(across, v_i)
        passing.all_db.addcmul_(delta, z, value=-1)
        queries_back(db if past.shift is None else db.mul_(p), dq)
        return _Seen(block, room, delta, past.shift, keys_back)

    def _back(self, seen: _Seen, future: Sums, dk: Rows, dv_out: Rows) -> None:
        """Gradients of the keys and values of a block; its queries are added to the sums."""
        block, room, delta, shift, keys_back = seen
        passing, da, dv = room.passing, room.passing.da, room.passing.dv
        if shift is not None:
            future.lower(shift)
        self._gather(block, passing)
        r = future.z_after(torch.bmm(delta.mT, room.all_p))
        torch.bmm(room.all_p, room.across_keys, out=passing.all_weights)
        passing.triangles.tril_()
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

    def _gather(self, block: Block, passing: _Passing) -> None:
        """Copy v and do, these times the factors that are left out of p, which is wider."""
        if passing.holds == block:
            return
        passing.holds = block
        self._keys.gather(self._v, block, passing.v)
        self._d_out.copy_to(passing.do, block)
        if self._scaled:
            passing.do.mul_(self._norm[block])

    def _delta(self, block: Block, do: Tensor) -> Tensor:
        if not self._call.settings.normalised:
            return do.new_zeros(1).expand(*do.shape[:-1], 1).flatten(0, 1)
        delta = self._out.dot(self._d_out, block)
        return (delta * self._norm[block] if self._scaled else delta).flatten(0, 1)
