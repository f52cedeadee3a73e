"""Features of one block: by a formula of :mod:`.kinds`, or by a user's functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .checks import check_widths
from .features import Features
from .formula import LOG2E, Kind
from .kinds import KINDS
from .layout import Block
from .projected import Halves, Hyperbolic
from .rows import Rows, ungroup

PullBack = Callable[[Tensor, Rows], None]  # gradient of the features, gradient of x to fill


class Encoder:
    """phi of the queries or of the keys of a tile, block by block; log2(phi) for exponentials.

    Values come grouped, see :mod:`.layout`, in memory of their own.

    Args:
        features: the map.
        kind: its formula, None for a user's functions.
        dtype: dtype of the sums, in which features are given.
        x: (N, length, H*R, E) of the tile.
        of_keys: whether this is the keys' half of the map.
        groups: query heads for every key head.
        mask: (n, length) bool of the tile, True = keep; dropped rows may hold anything.
        again: whether the features will be computed again, in a backward pass.

    Raises:
        RuntimeError: for a user's map that draws random numbers though it will be called again.
    """

    def __init__(
        self,
        features: Features,
        kind: Kind | None,
        dtype: torch.dtype,
        x: Tensor,
        *,
        of_keys: bool = False,
        groups: int = 1,
        mask: Tensor | None = None,
        again: bool = False,
    ) -> None:
        self._features, self._dtype, self._groups, self._again = features, dtype, groups, again
        self._x, self._drop = Rows(x, groups), None
        if mask is not None:
            self._drop = Rows(~mask[:, :, None, None].expand(-1, -1, x.shape[2], 1))
        self._function = features.keys if of_keys else features.queries
        self._of_keys, self._kind = of_keys, kind

    def __call__(
        self, block: Block, shift: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Features of a block as (T, N*H, R*C, F), written to ``out``.

        ``shift`` (N*H, F) is added to the logarithms of exponential features of queries.
        """
        if self._kind is not None:
            rows = self.rows(self._x, block)
            return self._hide(self._evaluate(self._kind, rows, shift, out), block)
        given = self._given(block)
        with self._same_again(block):
            return self._finish(self._function(given), block, shift, out)

    @property
    def has_powers(self) -> bool:
        """Whether the next two may be called; a GPU is not asked for the range of numbers."""
        return isinstance(self._kind, Hyperbolic) and self._x.x.device.type == "cpu"

    def query_powers(self, block: Block, out: Halves) -> Tensor | float:
        """Write exponential features of a block themselves to ``out``; the logarithm of what they
        are relative to, 0 but for rows that are out of range."""
        return self._powered(out).query_powers(self.rows(self._x, block), out)

    def key_powers(self, block: Block, out: Halves) -> bool:
        """Write exponential features of a block themselves to ``out``, if all are in range."""
        if not self._powered(out).key_powers(self.rows(self._x, block), out):
            return False
        self.clear(out.both, block)
        return True

    def _powered(self, out: Halves) -> Hyperbolic:
        assert isinstance(self._kind, Hyperbolic)
        check_widths(2 * self._kind.omega.shape[1], out.both.shape[-1])
        return self._kind

    def differentiated(
        self,
        block: Block,
        d_parameters: list[Tensor | None],
        shift: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, PullBack]:
        """The same, and the function that pulls a gradient of phi, or of log(phi), back."""
        if self._kind is not None:
            rows = self.rows(self._x, block)
            phi = self._evaluate(self._kind, rows, shift, out)
            kind_back = self._kind.keys_back if self._of_keys else self._kind.queries_back

            def back(gradient: Tensor, dx: Rows) -> None:
                dx.write(block, kind_back(gradient, phi, rows))

            return self._hide(phi, block), back
        inputs = [self._given(block).requires_grad_(), *self._features.parameters]
        with torch.enable_grad():
            value = self._function(inputs[0]).to(self._dtype)
        if block.start == 0:
            _check_leaves(value, inputs)

        def pull_back(gradient: Tensor, dx: Rows) -> None:
            first, rest = None, []
            if value.requires_grad:
                gradient = ungroup(gradient, block, dx.x.shape[0], self._groups)
                first, *rest = torch.autograd.grad(value, inputs, gradient, allow_unused=True)
            if first is None:
                first = torch.zeros_like(inputs[0])
            block.of(dx.x).copy_(first)
            for i, extra in enumerate(rest):
                if extra is not None:
                    old = d_parameters[i]
                    d_parameters[i] = extra if old is None else old + extra

        return self._finish(value.detach(), block, shift, out), pull_back

    def rows(self, x: Rows, block: Block) -> Tensor:
        """A block of rows that are masked as these are, with zeros in the masked ones."""
        rows = x[block]
        if rows.dtype != self._dtype:
            rows = rows.to(self._dtype)
        return rows if self._drop is None else rows.masked_fill(self._drop[block], 0.0)

    def gather(self, x: Rows, block: Block, out: Tensor) -> None:
        """The same, written to ``out``."""
        x.copy_to(out, block)
        self.clear(out, block)

    def clear(self, gradient: Tensor, block: Block) -> None:
        """Clear the masked rows of (T, N*H, C, F)."""
        if self._drop is not None:
            gradient.masked_fill_(self._drop[block], 0.0)

    def _given(self, block: Block) -> Tensor:
        """What the user's function is called with."""
        given = self._features.cast(block.of(self._x.x).detach(), self._dtype)
        return given if self._drop is None else given.masked_fill(block.of(self._drop.x), 0.0)

    def _evaluate(
        self, kind: Kind, rows: Tensor, shift: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        assert self._features.formula is not None
        width = kind.width(self._features.formula, rows.shape[-1])
        if out is None:
            out = rows.new_empty(*rows.shape[:-1], width)
        check_widths(width, out.shape[-1])
        if self._of_keys:
            return kind.keys(rows, out)
        return kind.queries(rows, None if shift is None else shift[:, None], out)

    def _finish(
        self, phi: Tensor, block: Block, shift: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        phi = Rows(phi.to(self._dtype), self._groups)[Block(0, block.t, block.c)]
        if out is not None:
            check_widths(phi.shape[-1], out.shape[-1])
        phi = torch.mul(phi, LOG2E if self._features.exponential else 1.0, out=out)
        if shift is not None:
            phi.add_(shift[:, None])
        return self._hide(phi, block)

    def _hide(self, phi: Tensor, block: Block) -> Tensor:
        """A masked key has a feature of 0, whose logarithm is -inf."""
        if self._drop is None:
            return phi
        nothing = -torch.inf if self._features.exponential else 0.0
        return phi.masked_fill_(self._drop[block], nothing)

    def _same_again(self, block: Block) -> AbstractContextManager[None]:
        if self._again and not self._features.any_heads and block.start == 0:
            return _same_again(self._x.x)
        return nullcontext()


@contextmanager
def _same_again(x: Tensor) -> Iterator[None]:
    """Refuse features that draw random numbers, which the backward pass would draw again."""
    module = torch if x.device.type == "cpu" else torch.get_device_module(x.device)
    before = module.get_rng_state()
    yield
    if not torch.equal(before, module.get_rng_state()):
        raise RuntimeError(
            "the feature map draws random numbers while it encodes (dropout, perhaps), but its "
            "features are computed again in the backward pass; draw them in new_feature_map"
        )


def width(features: Features, x: Tensor, dtype: torch.dtype) -> int:
    """F, the number of features of keys x (N, length, H, E)."""
    if features.formula is not None:
        return KINDS[features.formula.kind].width(features.formula, x.shape[-1])
    block = Block(0, 1, min(x.shape[1], 1))
    return Encoder(features, None, dtype, x, of_keys=True)(block).shape[-1]


def _check_leaves(value: Tensor, inputs: list[Tensor]) -> None:
    """Every tensor that could receive a gradient is one that will."""
    known, waiting = set(map(id, inputs)), [value.grad_fn]
    seen = {x.grad_fn for x in inputs}  # what lies beyond is reached through them
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise RuntimeError(
                f"the feature map uses a tensor of shape {tuple(leaf.shape)} that requires a "
                "gradient and would not get one; make it an nn.Parameter of the map, or list "
                "it in Features.parameters"
            )
        waiting += [parent for parent, _ in node.next_functions]
