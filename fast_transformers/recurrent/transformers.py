"""Encoders and decoders that take one token at a time and return their state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..blocks import DecoderBlock, EncoderBlock, Stack, length_mask_or_full, needed
from ..state import State, open_state
from ._utils import check_state


class RecurrentTransformerEncoderLayer(EncoderBlock):
    """The recurrent twin of :class:`~fast_transformers.transformers.TransformerEncoderLayer`.

    Args: as there; ``attention`` is a recurrent attention layer.
    """

    def forward(self, x: Tensor, state: Any = None, memory: Any = None) -> tuple[Tensor, Any]:
        """(N, d_model) and a state (None at first) to (N, d_model) and the new state."""
        state = check_state(state, memory)

        def attend(x: Tensor) -> Tensor:
            nonlocal state
            x, state = self.attention(x, x, x, state)
            return x

        x = self.sublayer(self.norm1, x, attend)
        return self.sublayer(self.norm2, x, self.feed_forward), state


class RecurrentTransformerEncoder(Stack):
    """The recurrent twin of :class:`~fast_transformers.transformers.TransformerEncoder`.

    Causal by nature. Its state is a list with an entry for each layer; the list that is passed
    in stays as it is. A :class:`~fast_transformers.state.State`, such as the twin returns for a
    prompt, or ``State()``, goes on as a :class:`~fast_transformers.state.State`.
    """

    def forward(
        self, x: Tensor, state: Sequence[Any] | None = None, memory: Any = None
    ) -> tuple[Tensor, Any]:
        """(N, d_model) and a state (None at first) to (N, d_model) and the new state."""
        past = check_state(state, memory)
        states = list(open_state(past, len(self.layers)))

        def step(i: int, layer: Any, x: Tensor) -> Tensor:
            x, states[i] = layer(x, states[i])
            return x

        y = self.run(x, step)
        return y, past.advance(states, 1) if isinstance(past, State) else states


class RecurrentTransformerDecoderLayer(DecoderBlock):
    """The recurrent twin of :class:`~fast_transformers.transformers.TransformerDecoderLayer`.

    Args: as there; the attentions are recurrent attention layers.
    """

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        memory_length_mask: Any = None,
        state: Sequence[Any] | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """(N, d_model), (N, S, d_memory) to (N, d_model) and [self state, cross state].

        The memory is read with the first token; after that it is found in the state.
        """
        lengths = memory_lengths(memory, memory_length_mask, state)
        states = [None, None] if state is None else list(state)

        def attend(x: Tensor) -> Tensor:
            x, states[0] = self.self_attention(x, x, x, state=states[0])
            return x

        def attend_to_memory(x: Tensor) -> Tensor:
            x, states[1] = self.cross_attention(x, memory, memory, lengths, state=states[1])
            return x

        x = self.sublayer(self.norm1, x, attend)
        x = self.sublayer(self.norm2, x, attend_to_memory)
        return self.sublayer(self.norm3, x, self.feed_forward), states


class RecurrentTransformerDecoder(Stack):
    """The recurrent twin of :class:`~fast_transformers.transformers.TransformerDecoder`."""

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        memory_length_mask: Any = None,
        state: Sequence[Any] | None = None,
    ) -> tuple[Tensor, Any]:
        """(N, d_model), (N, S, d_memory) to (N, d_model) and a list of the layers' states.

        A :class:`~fast_transformers.state.State` goes on as one; its memory is in it, and None
        will do for ``memory`` then.
        """
        lengths = memory_lengths(memory, memory_length_mask, state)
        states = list(open_state(state, len(self.layers)))

        def step(i: int, layer: Any, x: Tensor) -> Tensor:
            x, states[i] = layer(x, memory, memory_length_mask=lengths, state=states[i])
            return x

        y = self.run(x, step)
        return y, state.advance(states, 1) if isinstance(state, State) else states


def memory_lengths(memory: Tensor | None, mask: Any, state: Any) -> Any:
    """The mask of the memory as an object; None if only the state knows the memory."""
    if memory is None and (mask is not None or not state):
        needed(memory)
    return None if memory is None else length_mask_or_full(mask, memory, "memory_length_mask")
