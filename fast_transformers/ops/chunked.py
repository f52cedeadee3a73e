"""Causal attention in chunks: a chunk attends to itself directly, to the past through sums.

For a chunk of queries with factors p, keys with factors kappa and values v, after sums S, z of
everything before it,

    A = tril(p kappa^T),   out = (p S + A v) / (p.z + rowsum(A)),
    S += kappa^T v,        z += sum(kappa)

so time and memory are linear in the length. What :mod:`.scaling` takes out of exponential
features is the same for a whole block of chunks (see :mod:`.layout`), unless its keys differ too
much: then it is worked in halves. The backward pass is in :mod:`.chunked_backward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call
from .encode import Encoder, width
from .layout import (
    BLOCK,
    BLOCK_FEATURES,
    HELD,
    Block,
    Tile,
    blocks,
    tiles,
)
from .projected import Halves
from .rows import Rows, carve
from .scaling import factor_of, norm_of, query_factors
from .sums import Sums, Triple, empty_sums, start_from
from .threads import paced, popped


class Inputs(NamedTuple):
    """The tensors of a call, or of one tile of it."""

    q: Tensor  # (N, L, H*R, E)
    k: Tensor  # (N, L, H, E)
    v: Tensor  # (N, L, H, M)
    key_mask: Tensor | None  # (N, L)

    @property
    def groups(self) -> int:
        """R, query heads for every key head."""
        return self.q.shape[2] // max(self.k.shape[2], 1)

    def tile(self, tile: Tile) -> Inputs:
        q, k, v = tile.of(self.q, self.groups), tile.of(self.k), tile.of(self.v)
        return Inputs(q, k, v, tile.of_mask(self.key_mask))

    def encoders(self, call: Call) -> tuple[Encoder, Encoder]:
        """Of queries and of keys."""
        return (
            call.encoder(self.q, groups=self.groups),
            call.encoder(self.k, of_keys=True, mask=self.key_mask),
        )


class Kept(NamedTuple):
    """What the backward pass needs besides inputs and output; empty if none may follow.

    Attributes:
        norm: (N, L, H*R, 1) reciprocals or log2 of the denominators.
        cuts: (N, H, L) bool, whether a block begins at a token; for exponential features only.
        kv, z, shift: the sums before every one of the :func:`intervals`: (K, N, H, ...).
    """

    norm: Tensor
    cuts: Tensor
    kv: Tensor
    z: Tensor
    shift: Tensor

    @classmethod
    def allocate(cls, call: Call, inputs: Inputs, features: int) -> Kept:
        n, length, h, m = inputs.v.shape
        states = -(-length // _interval(call, inputs, features)) if call.settings.keep else 0
        exponential, length = call.features.exponential, length if call.settings.keep else 0
        normalised = length if call.settings.normalised else 0
        new = inputs.q.new_empty
        return cls(
            new(n, normalised, h * inputs.groups, 1, dtype=call.dtype),
            inputs.q.new_zeros(n, h, length if exponential else 0, dtype=torch.bool),
            new(states, n, h, features, m, dtype=call.dtype),
            new(states, n, h, features, dtype=call.dtype),
            new(states, n, h, features if exponential else 0, dtype=call.dtype),
        )

    def tile(self, tile: Tile, groups: int) -> Kept:
        states = (x[:, tile.rows, tile.heads] for x in (self.kv, self.z, self.shift))
        return Kept(tile.of(self.norm, groups), self.cuts[tile.rows, tile.heads], *states)

    def write(self, i: int, sums: Sums) -> None:
        if sums.plain:
            sums = sums.snapshot()
            sums.settle()
        self.kv[i] = sums.kv.view_as(self.kv[i])
        self.z[i] = sums.z.view_as(self.z[i])
        if sums.shift is not None:
            self.shift[i] = sums.shift.view_as(self.shift[i])

    def read(self, i: int, exponential: bool) -> Sums:
        shift = self.shift[i].flatten(0, 1) if exponential else None
        return Sums(self.kv[i].flatten(0, 1), self.z[i].flatten(0, 1), shift)


def _interval(call: Call, inputs: Inputs, features: int) -> int:
    """Tokens from one kept state to the next, whose features the backward pass holds: so many
    that the states take at most a seventh of the memory of output and gradients. Between them the
    sums are taken again in the backward pass."""
    e, m, chunk = inputs.q.shape[-1], inputs.v.shape[-1], call.settings.chunk
    block = BLOCK // HELD
    block = max(block // chunk, 1) * chunk if chunk else block
    held = 7 * features * m // (max(e + m, 1) * block)
    return max(held, HELD) * block  # a block of the forward pass at least


def intervals(call: Call, inputs: Inputs, features: int) -> list[slice]:
    """The tokens from one kept state to the next."""
    length, size = inputs.q.shape[1], _interval(call, inputs, features)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def cut(interval: slice, chunk: int, features: int, held: bool = False) -> list[Block]:
    """The blocks of some tokens: chunks are worked together until their features would not fit
    a processor's cache, or one reference would not do for all of them (see :mod:`.scaling`)."""
    most = min(BLOCK, BLOCK_FEATURES // features) // (HELD if held else 1)
    return list(blocks(interval.start, interval.stop, chunk, most))


def allocate(call: Call, inputs: Inputs) -> tuple[Tensor, Triple, Kept]:
    """Memory for the results of :func:`forward`, with the sums before the first key."""
    features = width(call.features, inputs.k, call.dtype)
    shape = *inputs.q.shape[:3], inputs.v.shape[-1]
    return (
        inputs.q.new_empty(shape, dtype=call.dtype),
        empty_sums(inputs.v, features, call.features.exponential, call.dtype),
        Kept.allocate(call, inputs, features),
    )


def forward(call: Call, inputs: Inputs, state: Triple | None) -> tuple[Tensor, Triple, Kept]:
    """Values (N, L, H*R, M), the final sums (N, H, ...), and what the backward pass needs."""
    out, final, kept = allocate(call, inputs)
    start_from(state, final)
    n, length, heads, _ = inputs.k.shape
    for tile in tiles(n, heads, length, call.whole):
        mine = inputs.tile(tile)
        sums = Sums.of_tile(final, tile)
        groups = inputs.groups
        _forward_tile(call, mine, sums, tile.of(out, groups), kept.tile(tile, groups))
        sums.write(final, tile)
    return out, final, kept


def _forward_tile(call: Call, inputs: Inputs, sums: Sums, out: Tensor, kept: Kept) -> None:
    features, groups, room = sums.z.shape[-1], inputs.groups, None
    encoders, masked = inputs.encoders(call), inputs.key_mask is not None
    rows = Rows(inputs.v), Rows(out, groups), Rows(kept.norm, groups)
    for i, interval in enumerate(intervals(call, inputs, features)):
        if call.settings.keep:
            kept.write(i, sums)
        # after the first is kept as it is given: its gradients are relative to its shift
        if i == 0 and encoders[1].has_powers:
            sums.unshift()
        waiting = cut(interval, call.chunk, features)[::-1]
        for block in paced(popped(waiting), out, "causal", *sums.kv.shape, call.chunk):
            if room is None or room.size != block[1:]:
                room = _Room(groups, block, sums)
            if not _forward_block(call, encoders, rows, block, sums, room, masked):
                waiting += block.halves()[::-1]
            elif call.settings.keep and sums.shift is not None:
                kept.cuts[:, :, block.start] = True
    sums.settle()


class _Room:
    """Memory that blocks of one size use one after the other, and views of its chunks."""

    def __init__(self, groups: int, block: Block, sums: Sums) -> None:
        self.size = t, c = block[1:]
        g, features, m = sums.kv.shape
        rows = groups * c
        shapes = [(rows, features), (rows, m), (rows, c), (c, features), (c, m), (1, rows)]
        pieces = carve(sums.kv, [(t, g, *shape) for shape in shapes])
        self.p, self.values, self.weights, self.kappa, self.v, row = pieces
        self.queries, self.keys = Halves.of(self.p), Halves.of(self.kappa)
        across = self.kappa.mT
        self.triangles = triangles(self.weights)
        self.chunks = list(zip(self.p, across, self.v, self.values, strict=True))
        flat = [x.flatten(0, 1) for x in (self.p, across, self.weights, self.v, self.values)]
        self.all_p, self.all_across, self.pairs, self.all_v, self.all_values = flat
        self.row, self.across_p, self.denominators = row.flatten(0, 1), self.all_p.mT, row.mT


def _forward_block(
    call: Call,
    encoders: tuple[Encoder, Encoder],
    rows: tuple[Rows, Rows, Rows],
    block: Block,
    sums: Sums,
    room: _Room,
    masked: bool,
) -> bool:
    """Write the values of a block, unless its keys differ too much to be worked together.

    ``rows`` are those of the values, the output and the denominators.
    """
    (queries, keys), (given, out, norm) = encoders, rows
    p, kappa, v, weights, values = room.p, room.kappa, room.v, room.weights, room.values
    if sums.plain and keys.key_powers(block, room.keys):
        offset = queries.query_powers(block, room.queries)
    else:
        sums.settle()  # more of them will be out of range
        a, offset = keys(block, out=kappa), None
        if sums.enter(a, masked, whole=False) is None:
            return False
        queries(block, sums.shift, p)
        if sums.shift is not None:
            p, offset = query_factors(p)
    keys.gather(given, block, v)
    torch.bmm(room.all_p, room.all_across, out=room.pairs)
    room.triangles.tril_()
    torch.bmm(room.pairs, room.all_v, out=room.all_values)
    for p_i, across, v_i, values_i in room.chunks:
        values_i.baddbmm_(p_i, sums.kv)
        sums.add(across, v_i)
    # as a row, see :func:`.summed.attend`
    torch.bmm(sums.z_before(kappa), room.across_p, out=room.row)
    denominator = room.denominators
    denominator += weights.sum(-1, keepdim=True)
    if not call.settings.normalised:
        out.write(block, values)
        return True
    factor = factor_of(denominator, *call.lift(seen=not masked))
    out.write_product(block, values, factor)
    if call.settings.keep:
        norm.write(block, norm_of(denominator, factor, offset))
    return True


def triangles(pairs: Tensor) -> Tensor:
    """Pairs (T, G, R*C, C) as (T, G*R, C, C): those whose key comes after the query are above
    the diagonal."""
    t, _, _, c = pairs.shape
    return pairs.view(t, -1, c, c)
