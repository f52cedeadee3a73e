"""What single attentions and layers remember; :class:`~.state.State` holds one for each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ops import LinearState
from .cache import Transform

Count = int | Tensor  # of tokens: an int if all sequences have as many, else (N,) int64


class CrossLinearState(LinearState):
    """Sums over a memory; unpacks as the older library's: S (N, H, M, F), z (N, H, F)."""

    def __iter__(self) -> Iterator[Tensor]:
        kv, z = super().__iter__()
        return iter((kv.mT, z))

    def __getitem__(self, index: int) -> Tensor:
        return tuple(self)[index]


torch.export.register_dataclass(CrossLinearState)


class Memory(Sequence[Tensor]):
    """A projected memory, which softmax attention reads again for every query.

    Unpacks as the pair that the older library used: ``keys, values = state``.

    Args:
        keys: (N, S, H, E).
        values: (N, S, H, M).
        mask: (N, S) bool, True = real; None if all are.
    """

    def __init__(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
        self.keys, self.values, self.mask = keys, values, mask

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        return (self.keys, self.values)[index]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def transform(self, function: Transform) -> Memory:
        """A state with ``function`` applied to each tensor."""
        mask = None if self.mask is None else function(self.mask)
        return Memory(function(self.keys), function(self.values), mask)

    @classmethod
    def joined(cls, states: Sequence[Memory]) -> Memory:
        """One state for the sequences of all; shorter memories are padded."""
        longest = max(state.keys.shape[1] for state in states)
        columns: list[list[Tensor]] = [[], [], []]
        for keys, values, mask in ((s.keys, s.values, s.mask) for s in states):
            if mask is None:
                mask = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
            room = longest - keys.shape[1]
            for column, x in zip(columns, (keys, values, mask), strict=True):
                padding = (0, 0) * (x.ndim - 2) + (0, room)
                column.append(torch.nn.functional.pad(x, padding))
        keys, values, mask = map(torch.cat, columns)
        whole = all(s.mask is None and s.keys.shape[1] == longest for s in states)
        return cls(keys, values, None if whole else mask)


def _flatten(state: Memory) -> tuple[list[Any], bool]:
    masked = state.mask is not None
    return [state.keys, state.values, *([state.mask] if masked else [])], masked


pytree.register_pytree_node(
    Memory,
    _flatten,
    lambda tensors, masked: Memory(*tensors),
    serialized_type_name="fast_transformers.state.Memory",
)


class PositionState(NamedTuple):
    """The state of an attention, and the position of the next token.

    Attributes:
        attention: what the attention itself remembers, None before the first token.
        position: a tensor where the step is exported, too: its graph would fix an int.
    """

    attention: Any = None
    position: Count = 0

    @classmethod
    def of(cls, state: Any) -> PositionState:
        """``state``, or the beginning of a sequence for None."""
        return cls() if state is None else cls(*state)


class ConditionalState(NamedTuple):
    """States of both attentions; that of the full one is dropped when it is no longer needed."""

    full: Any
    other: Any
    length: Count  # tokens so far


class CrossConditionalState(NamedTuple):
    """The memory for as long as full attention may serve, the state of the other attention."""

    memory: Memory | None
    other: Any
    length: Count  # queries so far; more than any limit for a memory that is too long


def add(count: Count, more: int, mask: Tensor | None) -> Count:
    """The count after ``more`` tokens, of which those in ``mask`` (N, L) are real."""
    return count + more if mask is None else count + mask.sum(1)


def positions(count: Count, more: int, mask: Tensor | None) -> Count:
    """Where the new tokens stand: that of the first, or (N, L) where sequences differ.

    Padding gets the position of the token before it.
    """
    if mask is not None:
        first = count[:, None] if isinstance(count, Tensor) and count.ndim else count
        return (first + mask.cumsum(1) - 1).clamp(min=0)
    if isinstance(count, Tensor) and count.ndim:
        return count[:, None] + torch.arange(more, device=count.device)
    return count
