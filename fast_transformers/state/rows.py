"""What can be done to the state of any attention: its tensors changed, its sequences picked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import LinearState
from .cache import KeysValues, Transform
from .parts import ConditionalState, Count, CrossConditionalState, Memory, PositionState

NEVER = 2**62  # queries that a memory has seen which full attention does not read any more


def is_record(part: Any) -> bool:
    """Whether a part is a named tuple."""
    return isinstance(part, tuple) and hasattr(part, "_fields")


def transform(part: Any, function: Transform, *, fresh: bool = False) -> Any:
    """``part`` with ``function`` applied to each tensor in it.

    ``fresh`` says that what it returns shares no memory with what it is given.
    """
    if isinstance(part, Tensor):
        return function(part)
    if isinstance(part, KeysValues):
        return part.transform(function, fresh=fresh)
    if isinstance(part, Memory):
        return part.transform(function)
    if isinstance(part, LinearState):
        return part.map(function)
    if isinstance(part, list | tuple):
        parts = (transform(x, function, fresh=fresh) for x in part)
        return type(part)(*parts) if is_record(part) else type(part)(parts)
    return part  # None, or a number of tokens


def pick(part: Any, rows: Tensor) -> Any:
    """The state of the given sequences (1-D int64)."""

    def of(x: Tensor) -> Tensor:
        return x.index_select(0, rows.to(x.device)) if x.ndim else x

    return transform(part, of, fresh=True)


def each(part: Any, function: Callable[[KeysValues], KeysValues]) -> Any:
    """``part`` with ``function`` applied to the keys and values in it."""
    if isinstance(part, KeysValues):
        return function(part)
    if isinstance(part, list | tuple):
        parts = (each(x, function) for x in part)
        return type(part)(*parts) if is_record(part) else type(part)(parts)
    return part


def tensors(part: Any) -> Iterator[Tensor]:
    """All tensors of a state, buffers included."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, KeysValues | Memory | LinearState):
        yield from (x for x in vars(part).values() if isinstance(x, Tensor))
    elif isinstance(part, list | tuple):
        for x in part:
            yield from tensors(x)


def anchor(part: Any) -> Tensor | None:
    """A tensor with a row for each sequence; None if there is none."""
    return next((x for x in tensors(part) if x.ndim), None)


def join(parts: Sequence[Any]) -> Any:
    """One state for the sequences of all; ValueError if the parts are of different kinds."""
    kinds = {type(part) for part in parts}
    first = parts[0]
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"states must come from one model to be joined, got {names} in the same place"
        )
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, KeysValues):
        return KeysValues.joined(parts)
    if isinstance(first, Memory):
        return Memory.joined(parts)
    if isinstance(first, LinearState):
        if len({part.shift is None for part in parts}) > 1:
            raise ValueError(
                "states must come from one model to be joined, got features that are "
                "exponentials, and others"
            )
        return type(first)(*(join(column) for column in _columns(parts)))
    if isinstance(first, PositionState):
        anchors = [anchor(part) for part in parts]
        attention = join([part.attention for part in parts])
        return PositionState(attention, join_counts([part.position for part in parts], anchors))
    if isinstance(first, ConditionalState | CrossConditionalState):
        return _join_conditional(parts)
    if isinstance(first, list | tuple):
        if len({len(part) for part in parts}) > 1:
            raise ValueError("states must have the same number of layers to be joined")
        return type(first)(join(column) for column in zip(*parts, strict=True))
    return first  # None


def _columns(states: Sequence[LinearState]) -> Iterator[list[Any]]:
    for name in ("kv", "z", "shift"):
        yield [getattr(state, name) for state in states]


def _join_conditional(parts: Sequence[Any]) -> Any:
    anchors = [anchor(part) for part in parts]
    kind = type(parts[0])
    other = join([part.other for part in parts])
    short, lengths = [part[0] for part in parts], [part.length for part in parts]
    given = next((part for part in short if part is not None), None)
    if given is not None:
        rows = list(zip(short, anchors, strict=True))
        if kind is CrossConditionalState:
            lengths = [NEVER if s is None else n for s, n in zip(short, lengths, strict=True)]
        given = join([_empty(given, rows_of(a)) if s is None else s for s, a in rows])
    return kind(given, other, join_counts(lengths, anchors))


def _empty(like: KeysValues | Memory, n: int) -> KeysValues | Memory:
    """Nothing, for ``n`` sequences."""
    if isinstance(like, KeysValues):
        keys, values = (x.new_zeros(n, x.shape[1], 0, x.shape[3]) for x in like)
        return KeysValues(keys, values)
    keys, values = (x.new_zeros(n, 1, *x.shape[2:]) for x in like)
    mask = torch.zeros(n, 1, dtype=torch.bool, device=keys.device)
    return Memory(keys, values, mask)


def join_counts(counts: Sequence[Count], anchors: Sequence[Tensor | None]) -> Count:
    """One count for the sequences of all; each count is for the rows of its anchor."""
    if all(isinstance(c, int) and c == counts[0] for c in counts):
        return counts[0]
    return torch.cat([counts_of(c, a) for c, a in zip(counts, anchors, strict=True)])


def counts_of(count: Count, like: Tensor | None) -> Tensor:
    """A count as (N,) int64, for the rows of a tensor and on its device."""
    if isinstance(count, Tensor) and count.ndim:
        return count
    device = None if like is None else like.device
    return torch.as_tensor(count, device=device).expand(rows_of(like)).long()


def rows_of(x: Tensor | None) -> int:
    return 0 if x is None else len(x)
