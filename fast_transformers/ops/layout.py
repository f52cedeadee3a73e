"""How a call is cut into pieces that fit a processor's cache, and how a piece is laid out.

A *tile* is a few heads of a few sequences; tiles are independent. Within a tile the sequence is
worked in *blocks* of ``t`` chunks of ``c`` tokens, grouped as (T, G, C, D): chunk, head (of all
sequences of the tile), token, dimension. With fewer key than query heads the R queries that
share a key head stand below each other, as (T, G, R*C, D). Grouped rows of a single sequence are
a view of it and keep its memory layout, which products of matrices work on as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

TILE = 8  # heads of long sequences worked at once
TILE_TOKENS = 4096  # tokens of all heads of short sequences worked at once
BLOCK = 512  # most tokens worked at once
MIN_CHUNK = 64  # fewest tokens that are worth a matrix product
BLOCK_FEATURES = 512 * 128  # most features of a head worked at once, but for a single chunk
HELD = 2  # times less in a backward pass that holds several blocks


class Tile(NamedTuple):
    """Some sequences and some of their heads, as slices."""

    rows: slice
    heads: slice

    def of(self, x: Tensor, groups: int = 1) -> Tensor:
        """The tile of (N, length, H, D), with ``groups`` query heads for every key head."""
        return x[self.rows, :, self.heads.start * groups : self.heads.stop * groups]

    def of_mask(self, mask: Tensor | None) -> Tensor | None:
        """The tile of (N, length); None where nothing is masked, which only a CPU is asked."""
        mask = None if mask is None else mask[self.rows]
        if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
            return None
        return mask


def tiles(n: int, heads: int, length: int, whole: bool = False) -> Iterator[Tile]:
    """Cover (n, heads) in tiles, of more heads for short sequences, whose blocks are small.

    ``whole`` keeps a sequence's heads together, as a map with different weights for every head
    needs it.
    """
    at_once = max(TILE, TILE_TOKENS // max(length, 1))
    rows_at_once = max(1, at_once // max(heads, 1))
    heads_at_once = max(heads if whole else at_once, 1)
    for row in range(0, n, rows_at_once):
        for head in range(0, heads, heads_at_once):
            yield Tile(
                slice(row, min(row + rows_at_once, n)),
                slice(head, min(head + heads_at_once, heads)),
            )


class Block(NamedTuple):
    """``t`` chunks of ``c`` tokens from token ``start`` on."""

    start: int
    t: int
    c: int

    @property
    def at(self) -> slice:
        return slice(self.start, self.start + self.t * self.c)

    def of(self, x: Tensor) -> Tensor:
        """The rows of (N, length, ...)."""
        return x.narrow(1, self.start, self.t * self.c)

    def halves(self) -> tuple[Block, Block]:
        """Two blocks of the same tokens; for blocks of more than one token."""
        if self.t > 1:
            first = Block(self.start, self.t // 2, self.c)
            return first, Block(first.at.stop, self.t - self.t // 2, self.c)
        first = Block(self.start, 1, self.c // 2)
        return first, Block(first.at.stop, 1, self.c - self.c // 2)


def blocks(start: int, stop: int, chunk: int, most: int) -> Iterator[Block]:
    """Cover the tokens in order, in blocks of about ``most``; a last, shorter chunk stands alone.

    257 features, say, one of them constant, make no smaller blocks than 256 do.
    """
    per_block = max(1, (most + chunk // 2) // chunk)
    while start < stop:
        chunks = min(per_block, (stop - start) // chunk)
        block = Block(start, chunks, chunk) if chunks else Block(start, 1, stop - start)
        yield block
        start = block.at.stop
