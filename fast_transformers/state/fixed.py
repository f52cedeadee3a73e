"""States of constant shapes, which the loop that owns them writes over: what a graph can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops.state import LinearState, OwnedState
from . import rows
from .cache import KeysValues
from .parts import ConditionalState, CrossConditionalState, CrossLinearState, PositionState
from .state import State


class FixedKeysValues(KeysValues):
    """Keys and values in buffers that are read as a whole; ``lengths`` (N,) says what counts.

    A token is written to the buffers of the state that it is appended to.
    """

    def append(
        self, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, copy: bool = False
    ) -> KeysValues:
        """The state after L more tokens, in the same buffers, whatever ``copy`` is."""
        return super().append(keys, values, mask)

    def _with_room(self, more: int) -> KeysValues:
        return self

    def _shown(self, length: int, lengths: Tensor | None) -> KeysValues:
        return FixedKeysValues(self.key_buffer, self.value_buffer, lengths=lengths)


def fix(state: State, room: int) -> State:
    """A copy of a state that steps write over, with tensors instead of numbers of tokens.

    Args:
        state: of at least one token.
        room: for so many tokens in all in each cache of keys and values.

    Raises:
        ValueError: for a state that cannot keep its shapes.
    """
    like = rows.anchor(state.layers)
    if like is None:
        raise ValueError("state must have seen a token; let the model read the first one before")
    return State(_fix(list(state.layers), room, like), _count(state.position, like))


def _fix(part: Any, room: int, like: Tensor) -> Any:
    if isinstance(part, ConditionalState | CrossConditionalState):
        raise ValueError("conditional attention changes its form with the length")
    if isinstance(part, KeysValues):
        keys, values = (_own(pad(x, (0, 0, 0, room - part.length))) for x in part)
        return FixedKeysValues(keys, values, lengths=_own(part.counts()))
    if isinstance(part, LinearState) and not isinstance(part, CrossLinearState):
        own = part.map(_own)
        return OwnedState(own.kv, own.z, own.shift)
    if isinstance(part, PositionState):
        return PositionState(_fix(part.attention, room, like), _count(part.position, like))
    if isinstance(part, list | tuple) and not rows.is_record(part):
        return [_fix(x, room, like) for x in part]
    return rows.transform(part, _own, fresh=True)


def _own(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _count(count: int | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(count, device=like.device).clone()


def tensors_of(state: State) -> list[Tensor]:
    """All tensors of a fixed state."""
    return [x for x in (*rows.tensors(list(state.layers)), state.position) if torch.is_tensor(x)]


def write_over(state: State, new: State) -> None:
    """Give a fixed state the contents of another of the same shapes, such as a step returns."""
    for old, x in zip(tensors_of(state), tensors_of(new), strict=True):
        if old.data_ptr() != x.data_ptr():
            old.copy_(x)


def released(state: State, position: int | None) -> State:
    """An ordinary state with the contents of a fixed one; waits for the device.

    Args:
        position: that of all sequences, if it is known to be the same.
    """
    layers = rows.transform(list(state.layers), torch.clone, fresh=True)
    count = state.position if position is None else position
    return State(layers, count.clone() if isinstance(count, Tensor) else count).select(slice(None))


def longest(state: State) -> int | None:
    """Tokens in the longest cache of keys and values; None without any."""
    found: list[int] = []

    def look(part: KeysValues) -> KeysValues:
        found.append(part.length)
        return part

    rows.each(list(state.layers), look)
    return max(found, default=None)
