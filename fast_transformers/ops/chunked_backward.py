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


class _Seen(NamedTuple):
    """What the way forth through a block leaves for the way back."""

    block: Block
    p: Tensor  # (T, G, R*C, F); normalised, or else do and delta are
    kappa: Tensor  # (T, G, C, F)
    v: Tensor
    do: Tensor
    delta: Tensor  # (T, G, R*C, 1)
    pairs: Tensor  # G_tj, (T, G, R*C, C)
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
                del one  # its memory serves the next block
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

    def _forth(self, block: Block, past: Sums, dq: Rows) -> _Seen:
        """Gradients of the queries of a block; its keys are added to the sums."""
        a, keys_back = self._keys.differentiated(block, self._d_parameters)
        v, kappa = self._keys.rows(self._v, block), past.enter(a)
        assert kappa is not None
        b, queries_back = self._queries.differentiated(block, self._d_parameters, past.shift)
        do = self._d_out[block].to(self._call.dtype)
        norm, delta = self._norm_and_delta(block, do)
        if past.shift is None:
            p, do, delta = b, do * norm, delta * norm  # both in the place of p, which is wider
        else:
            p = b.sub_(norm).exp2_()
        z, db = past.z_before(kappa), b.new_empty(b.shape)
        pairs = v.new_empty(*p.shape[:-1], v.shape[-2])
        kv = past.kv.mT
        for pairs_i, do_i, v_i in zip(pairs, do, v.mT, strict=True):
            torch.bmm(do_i, v_i, out=pairs_i)
        triangles(pairs.sub_(delta)).tril_()
        chunks = zip(kappa, kappa.mT, v, do, pairs, db, strict=True)
        for kappa_i, across, v_i, do_i, pairs_i, db_i in chunks:
            torch.bmm(do_i, kv, out=db_i).baddbmm_(pairs_i, kappa_i)
            past.add(across, v_i)
        db.addcmul_(delta, z, value=-1)
        queries_back(db if past.shift is None else db.mul_(p), dq)
        return _Seen(block, p, kappa, v, do, delta, pairs, past.shift, keys_back)

    def _back(self, seen: _Seen, future: Sums, dk: Rows, dv_out: Rows) -> None:
        """Gradients of the keys and values of a block; its queries are added to the sums."""
        block, p, kappa, v, do, delta, pairs, shift, keys_back = seen
        if shift is not None:
            future.lower(shift)
        r = future.z_after(p * delta)
        da, dv = kappa.new_empty(kappa.shape), v.new_empty(v.shape)
        weights, kv = torch.empty_like(pairs), future.kv.mT
        for weights_i, p_i, kappa_i in zip(weights, p, kappa.mT, strict=True):
            torch.bmm(p_i, kappa_i, out=weights_i)
        triangles(weights).tril_()
        chunks = zip(p, p.mT, kappa, v, do, pairs.mT, weights.mT, da, dv, strict=True)
        for p_i, across, kappa_i, v_i, do_i, pairs_i, weights_i, da_i, dv_i in reversed([*chunks]):
            torch.bmm(v_i, kv, out=da_i).baddbmm_(pairs_i, p_i)
            torch.bmm(kappa_i, future.kv, out=dv_i).baddbmm_(weights_i, do_i)
            future.add(across, do_i)
        da.sub_(r[:, :, None])
        if shift is None:
            self._keys.clear(da, block)
        else:
            da.mul_(kappa)
        keys_back(da, dk)
        dv_out.write(block, dv)

    def _norm_and_delta(self, block: Block, do: Tensor) -> tuple[Tensor, Tensor]:
        """Both (T, G, R*C, 1)."""
        if not self._call.settings.normalised:
            return do.new_ones(1), do.new_zeros(1).expand(*do.shape[:-1], 1)
        return self._norm[block], self._out.dot(self._d_out, block)
