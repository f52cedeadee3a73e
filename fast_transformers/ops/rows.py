"""The rows of a tile, one block after the other, as the passes work on them.

Between products that fill the caches a view costs as much as a small product, 4 us where it takes
1 us by itself, and a block would need dozens: those of many blocks are made at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import Block

AHEAD = 64  # blocks of which views are made at once


class Rows:
    """Blocks of rows x (N, length, H*R, D), with R query heads for every key head, as (T, N*H,
    R*C, D), see :mod:`.layout`."""

    def __init__(self, x: Tensor, groups: int = 1) -> None:
        self.x, self._groups = x, groups
        self._alone = x.shape[0] == groups == 1
        self._size: tuple[int, int] | None = None  # T and C of the blocks that have views
        self._start = 0  # of the first of these
        self._views: tuple[Tensor, ...] = ()

    def __getitem__(self, block: Block) -> Tensor:
        """Grouped rows of a block: a view, if N = R = 1."""
        return self._grouped(self._view(block))

    def copy_to(self, out: Tensor, block: Block) -> None:
        """Copy a block to contiguous memory (T, N*H, R*C, D)."""
        view = self._view(block)
        (out if self._alone else out.view(view.shape)).copy_(view)

    def write(self, block: Block, x: Tensor) -> None:
        """Set a block to grouped rows."""
        view = self._view(block)
        view.copy_(x if self._alone else x.view(view.shape))

    def write_product(self, block: Block, x: Tensor, factor: Tensor) -> None:
        """Set a block to grouped rows times a factor (T, N*H, R*C, 1)."""
        view = self._view(block)
        if not self._alone:
            x, factor = x.view(view.shape), factor.view(*view.shape[:-1], 1)
        torch.mul(x, factor, out=view)

    def dot(self, other: Rows, block: Block) -> Tensor:
        """The products of rows with those of another tensor, (T, N*H, R*C, 1)."""
        return self._grouped((self._view(block) * other._view(block)).sum(-1, keepdim=True))

    def _grouped(self, view: Tensor) -> Tensor:
        if self._alone:
            return view
        t, n, h, r, c, d = view.shape
        return view.reshape(t, n * h, r * c, d)

    def _view(self, block: Block) -> Tensor:
        """(T, N, H, R, C, D), without N and R if both are 1."""
        start, t, c = block
        i, between = divmod(start - self._start, t * c or 1)
        if (t, c) != self._size or between or not 0 <= i < len(self._views):
            i = self._look_ahead(block)
        return self._views[i]

    def _look_ahead(self, block: Block) -> int:
        """Make the views of a block and its neighbours; the place of the block among them."""
        start, t, c = block
        n, length, heads, d = self.x.shape
        size = t * c or 1
        i, between = divmod(start, size)
        i = 0 if between else i % AHEAD  # a last, shorter chunk stands by itself
        self._size, self._start = (t, c), start - i * size
        count = 1 if between else max(1, min(AHEAD, (length - self._start) // size))
        rows = self.x.narrow(1, self._start, count * t * c)
        rows = rows.view(n, count, t, c, heads // self._groups, self._groups, d)
        rows = rows.permute(1, 2, 0, 4, 5, 3, 6)
        self._views = (rows.squeeze((2, 4)) if self._alone else rows).unbind()
        return i


def carve(like: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of some shapes in one piece of memory: many, allocated again and again, would leave
    megabytes of gaps in the heap."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces = like.new_empty(sum(sizes)).split(sizes)
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def ungroup(x: Tensor, block: Block, n: int, groups: int = 1) -> Tensor:
    """Grouped rows as (N, T*C, H*R, D): a view of what has the memory layout of :class:`Rows`."""
    t, g, rows, d = x.shape
    x = x.view(t, n, g // n, groups, rows // groups, d).permute(1, 0, 4, 2, 3, 5)
    return x.reshape(n, block.t * block.c, -1, d)
