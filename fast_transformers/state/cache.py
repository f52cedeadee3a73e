"""The keys and values that softmax attention remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

Transform = Callable[[Tensor], Tensor]


class KeysValues(Sequence[Tensor]):
    """Everything seen so far, in buffers that have room for more.

    A value: what a state shows never changes, so it can be continued in several ways. A token is
    written behind the last one, where the older states that share the buffers do not look; if
    another continuation was there first, or the room is used up, the buffers are copied into ones
    of twice the size. Padding takes no room: the tokens of a sequence stand next to each other.

    Unpacks as the pair that the older library used: ``keys, values = state``. Such a pair (list
    or tuple) is accepted wherever a state goes in.

    Args:
        keys: (N, H, C, E), of which the first ``length`` tokens count.
        values: (N, H, C, M).
        length: number of tokens; default C.
        lengths: (N,) int64, number of tokens of each sequence, at most ``length``; None if all
            have ``length``.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        length: int | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        self.key_buffer, self.value_buffer = keys, values
        self.length = keys.shape[2] if length is None else length
        self.lengths = lengths
        # how far the buffers are written to: shared by all states that share the buffers
        self._written = [keys.shape[2]]

    @staticmethod
    def of(state: KeysValues | Sequence[Tensor]) -> KeysValues:
        """Read a state or the older pair of keys (N, H, t, E) and values (N, H, t, M)."""
        if isinstance(state, KeysValues):
            return state
        if not (isinstance(state, list | tuple) and len(state) == 2):
            raise TypeError(
                "state must be the state an earlier call returned, or a pair [keys, values], got "
                f"{type(state).__name__}"
            )
        return _pair(state)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        """Keys (N, H, length, E), values (N, H, length, M).

        ``state[:]`` is a tuple of both, which every release of torch.compile can unpack.
        """
        return (self.key_buffer[:, :, : self.length], self.value_buffer[:, :, : self.length])[
            index
        ]

    def __repr__(self) -> str:
        return f"KeysValues(keys={tuple(self[0].shape)}, capacity={self.capacity})"

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.key_buffer.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, room to grow included."""
        return self.key_buffer.nbytes + self.value_buffer.nbytes

    def append(
        self, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, copy: bool = False
    ) -> KeysValues:
        """The state after L more tokens (N, H, L, E) and (N, H, L, M); this one stays as it is.

        Args:
            mask: (N, L) bool, True = real; other tokens leave no trace.
            copy: put old and new tokens into tensors of their own, through which gradients flow
                and which an exporter can follow.
        """
        if len(keys) != len(self.key_buffer):
            raise ValueError(
                f"The batch size changed during iteration: the state is for "
                f"{len(self.key_buffer)} sequences, the inputs are for {len(keys)}; start again "
                "with state=None, or pick rows with state.reorder(rows)"
            )
        dtype = self.key_buffer.dtype
        keys, values = keys.to(dtype), values.to(dtype)
        more = keys.shape[2]
        if self.lengths is None and mask is None:
            if copy:
                pairs = zip(self, (keys, values), strict=True)
                return _pair(torch.cat(pair, 2) for pair in pairs)
            state = self._with_room(more)
            state.key_buffer.narrow(2, self.length, more).copy_(keys)
            state.value_buffer.narrow(2, self.length, more).copy_(values)
            return state._shown(self.length + more, None)
        start = self.counts()
        slots, lengths = _slots(start, mask, more)
        if mask is not None:
            dropped = ~mask[:, None, :, None]
            keys, values = keys.masked_fill(dropped, 0), values.masked_fill(dropped, 0)
        if copy:
            room = [x.new_zeros(*x.shape[:2], more, x.shape[3]) for x in (keys, values)]
            buffers = [torch.cat(pair, 2) for pair in zip(self[:], room, strict=True)]
            pairs = zip(buffers, (keys, values), strict=True)
            buffers = [x.scatter(2, slots.expand_as(y), y) for x, y in pairs]
            return _pair(buffers, lengths=lengths)
        state = self._with_room(more)
        state.key_buffer.scatter_(2, slots.expand_as(keys), keys)
        state.value_buffer.scatter_(2, slots.expand_as(values), values)
        return state._shown(self.length + more, lengths)

    def counts(self) -> Tensor:
        """(N,) int64: number of tokens of each sequence."""
        if self.lengths is not None:
            return self.lengths
        n = len(self.key_buffer)
        return torch.full((n,), self.length, dtype=torch.long, device=self.key_buffer.device)

    def reserve(self, tokens: int) -> KeysValues:
        """The same state with room for ``tokens`` in all, if it has less."""
        return self._grown(tokens) if tokens > self.capacity else self

    def transform(self, function: Transform, *, fresh: bool) -> KeysValues:
        """A state with ``function`` applied to each tensor.

        ``fresh`` says that the results share no memory with this state.
        """
        state = KeysValues(
            function(self.key_buffer),
            function(self.value_buffer),
            self.length,
            None if self.lengths is None else function(self.lengths),
        )
        if fresh:
            state._written = [self.length]
        return state

    def trimmed(self) -> KeysValues:
        """The same tokens, with the least ``length``; waits for the device if sequences differ."""
        if self.lengths is None:
            return self
        counts = self.lengths.tolist()
        most = max(counts, default=0)
        lengths = None if min(counts, default=0) == most else self.lengths
        return _pair((x[:, :, :most].clone() for x in self), lengths=lengths)

    @staticmethod
    def joined(states: Sequence[KeysValues]) -> KeysValues:
        """One state for the sequences of all."""
        length = max(state.length for state in states)
        buffers = []
        for i in (0, 1):
            parts = [state[i] for state in states]
            room = [length - x.shape[2] for x in parts]
            padded = [pad(x, (0, 0, 0, r)) for x, r in zip(parts, room, strict=True)]
            buffers.append(torch.cat(padded))
        same = all(state.lengths is None and state.length == length for state in states)
        lengths = None if same else torch.cat([state.counts() for state in states])
        return _pair(buffers, lengths=lengths)

    def _with_room(self, more: int) -> KeysValues:
        """This state if it may write ``more`` tokens to its buffers, or a copy that may."""
        writable = torch.is_inference_mode_enabled() or not self.key_buffer.is_inference()
        if writable and self._written[0] == self.length <= self.capacity - more:
            return self
        end = self.length + more
        return self._grown(self.capacity if end <= self.capacity else max(2 * self.length, end))

    def _grown(self, capacity: int) -> KeysValues:
        buffers = []
        for shown in self:
            n, h, _, dim = shown.shape
            buffer = shown.new_zeros(n, h, capacity, dim)
            buffer[:, :, : self.length] = shown.detach()
            buffers.append(buffer)
        state = _pair(buffers, self.length, self.lengths)
        state._written = [self.length]
        return state

    def _shown(self, length: int, lengths: Tensor | None) -> KeysValues:
        """The state that shows what has just been written to the buffers of this one."""
        state = KeysValues(self.key_buffer, self.value_buffer, length, lengths)
        state._written = self._written
        state._written[0] = length
        return state


def _pair(
    pair: Iterable[Tensor], length: int | None = None, lengths: Tensor | None = None
) -> KeysValues:
    keys, values = pair
    return KeysValues(keys, values, length, lengths)


def _slots(start: Tensor, mask: Tensor | None, more: int) -> tuple[Tensor, Tensor]:
    """Where the new tokens of each sequence go, (N, 1, L, 1), real ones first; its new length."""
    if mask is None:
        slots = start[:, None] + torch.arange(more, device=start.device)
        return slots[:, None, :, None], start + more
    real = mask.sum(1)
    rank = torch.where(mask, mask.cumsum(1), real[:, None] + (~mask).cumsum(1)) - 1
    return (start[:, None] + rank)[:, None, :, None], start + real


def _flatten(state: KeysValues) -> tuple[list[Any], bool]:
    ragged = state.lengths is not None
    return [*state, *([state.lengths] if ragged else [])], ragged


def _unflatten(tensors: Any, ragged: bool) -> KeysValues:
    keys, values, *lengths = tensors
    state = KeysValues.__new__(KeysValues)  # the leaves need not be tensors
    state.key_buffer, state.value_buffer = keys, values
    state.length = keys.shape[2] if isinstance(keys, Tensor) else 0
    state.lengths = lengths[0] if ragged else None
    state._written = [state.length]
    return state


pytree.register_pytree_node(  # states may go in and out of an exported program
    KeysValues,
    _flatten,
    _unflatten,
    serialized_type_name="fast_transformers.state.KeysValues",
)
