"""One state for training on segments, prefill, streaming and generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from . import files, rows
from .cache import KeysValues, Transform
from .parts import Count, add


@dataclass(frozen=True, eq=False)
class State(Sequence[Any]):
    """What a stack of layers remembers of N sequences: goes in and comes out of every mode.

    A value: nothing that is done with a state changes it, so it can be continued in several ways,
    kept and gone back to. ``State()`` has seen nothing. It holds, for each layer,

    * linear attention: sums over the past, float32 whatever the model's dtype (float64 for
      float64), of a size that does not depend on the length;
    * softmax attention: keys and values in buffers with room for more, in the model's dtype;
    * a decoder layer: a list of both, that of its self attention and that of its memory;

    and the number of tokens that each sequence has seen, padding not counted.

    >>> from fast_transformers.builders import TransformerEncoderBuilder
    >>> options = {"attention_type": "causal-linear", "n_layers": 1, "query_dimensions": 64}
    >>> model = TransformerEncoderBuilder.from_kwargs(**options).get().eval()
    >>> prompt, more = torch.randn(2, 2, 7, 256)
    >>> y, state = model(prompt, return_state=True)
    >>> y, state = model(more, state=state, return_state=True)
    >>> state.position
    14

    Attributes:
        layers: the state of each layer.
        position: number of tokens seen; an int if it is the same for all sequences as far as is
            known without asking the device, else (N,) int64.
    """

    layers: Sequence[Any] = ()
    position: Count = 0

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __repr__(self) -> str:
        return (
            f"State({len(self.layers)} layers, {self.batch_size} sequences, "
            f"position={self.position}, nbytes={self.nbytes})"
        )

    @property
    def batch_size(self) -> int:
        """N; 0 for a state that has seen nothing."""
        return rows.rows_of(rows.anchor(self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes that the state occupies, room to grow included."""
        held = {id(x): x.nbytes for x in rows.tensors(self.layers)}
        return sum(held.values())

    @property
    def positions(self) -> Tensor:
        """(N,) int64: number of tokens that each sequence has seen."""
        return rows.counts_of(self.position, rows.anchor(self.layers))

    def map(self, function: Transform) -> State:
        """A state with ``function`` applied to each tensor, counts and masks included."""
        return self._map(function, fresh=False)

    def clone(self) -> State:
        """A state that shares no memory with this one; gradients flow through."""
        return self._map(torch.clone, fresh=True)

    def detach(self) -> State:
        """The same state, through which no gradients flow."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> State:
        """The state on another device; sums stay float32, which models of any dtype go on from.

        Raises:
            TypeError: for a dtype.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"device must be a device, got {device}; a state keeps its dtypes, and models of "
                "any dtype go on from it"
            )
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def reorder(self, index: Tensor) -> State:
        """The state of the given sequences, 1-D int64, as every step of a beam search needs it.

        Sequences may be left out and repeated. Never waits for the device.
        """
        position = self.position
        if isinstance(position, Tensor) and position.ndim:
            position = position.index_select(0, index.to(position.device))
        return State(rows.pick(self.layers, index), position)

    def select(self, index: Tensor | Sequence[int] | slice | int) -> State:
        """The state of the sequences that stay, as small as that allows.

        Args:
            index: 1-D int64 or bool tensor, list of ints, slice, or int.

        Raises:
            IndexError: for a sequence that there is not.
        """
        n = self.batch_size
        anchor = rows.anchor(self.layers)
        every = torch.arange(n, device=None if anchor is None else anchor.device)
        if isinstance(index, Tensor):
            every = every[index.to(every.device)]
        elif isinstance(index, slice):
            every = every[index]
        else:
            every = every[[index] if isinstance(index, int) else list(index)]
        picked = self.reorder(every)
        position = picked.position
        if isinstance(position, Tensor) and position.ndim and len(position):
            least, most = position.aminmax()
            position = int(least) if least == most else position
        return State(rows.each(picked.layers, KeysValues.trimmed), position)

    def split(self, sizes: int | Sequence[int] = 1) -> list[State]:
        """States of so many sequences each, in order; the inverse of :meth:`join`.

        Raises:
            ValueError: if ``sizes`` do not add up to the number of sequences.
        """
        n = self.batch_size
        if isinstance(sizes, int):
            sizes = [min(sizes, n - i) for i in range(0, n, sizes)]
        if sum(sizes) != n or min(sizes, default=0) < 0:
            raise ValueError(f"sizes must add up to the {n} sequences of the state, got {sizes}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self.select(slice(i, i + size)) for i, size in zip(starts, sizes, strict=True)]

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """One state for the sequences of all, which may have seen different numbers of tokens.

        Raises:
            ValueError: for no states, states that have seen nothing, or states of models of
                different shapes.
        """
        states = list(states)
        if not states or not all(isinstance(s, State) and len(s) for s in states):
            raise ValueError(
                "states must be a list of states that have seen tokens, got "
                f"{[type(s).__name__ if not isinstance(s, State) else s for s in states]}; let "
                "the model read the first tokens of a sequence before it joins"
            )
        layers = [list(state.layers) for state in states]
        anchors = [rows.anchor(x) for x in layers]
        try:
            joined = rows.join(layers)
        except RuntimeError as error:
            raise ValueError(f"states must come from one model to be joined: {error}") from error
        return State(joined, rows.join_counts([s.position for s in states], anchors))

    def reserve(self, tokens: int) -> State:
        """The same state with room for ``tokens`` in all in every cache of keys and values.

        Without, a cache doubles when it is full.
        """
        return replace(self, layers=rows.each(self.layers, lambda kv: kv.reserve(tokens)))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the state to a safetensors file (needs the package safetensors).

        Raises:
            OSError: if the file cannot be written.
            ValueError: for a state with parts that are not of this library.
        """
        layers = rows.each(self.layers, KeysValues.trimmed)
        files.save({"layers": layers, "position": self.position}, path)

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> State:
        """Read a state that :meth:`save` wrote; nothing in the file is executed.

        Raises:
            OSError: if the file cannot be read.
            ValueError: for a file that holds anything but a state.
        """
        return cls(**files.load(path, device))

    def advance(self, layers: Sequence[Any], more: int, mask: Tensor | None = None) -> State:
        """The state with new states of the layers, ``more`` tokens on.

        Args:
            mask: (N, more) bool, which of the tokens are real; None if all are.
        """
        return State(layers, add(self.position, more, mask))

    def _map(self, function: Transform, *, fresh: bool) -> State:
        position = self.position
        if isinstance(position, Tensor):
            position = function(position)
        return State(rows.transform(self.layers, function, fresh=fresh), position)


torch.export.register_dataclass(State)


def open_state(state: Any, count: int) -> State:
    """A state for ``count`` layers, of which each is None before the first token.

    Args:
        state: a :class:`State`; a list or tuple with the state of each layer, as the older
            library has it; or None.

    Raises:
        TypeError: for anything else.
        ValueError: for a state of another number of layers.
    """
    if state is None:
        state = State()
    elif isinstance(state, list | tuple):
        state = State(state)
    if not isinstance(state, State):
        raise TypeError(
            "state must be the state an earlier call returned, or a list with the state of each "
            f"layer, got {type(state).__name__}"
        )
    if not len(state):
        return State([None] * count, state.position)
    if len(state) != count:
        raise ValueError(
            f"state must be for {count} layers, got one for {len(state)}; start a new sequence "
            "with state=None"
        )
    return state
