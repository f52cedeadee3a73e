"""Encoders and decoders over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from .blocks import (
    DecoderBlock,
    EncoderBlock,
    Stack,
    cross_masks,
    length_mask_or_full,
    needed,
    real_tokens,
    self_masks,
)
from .masking import as_mask
from .state import open_state


class TransformerEncoderLayer(EncoderBlock):
    """Self attention and a feed-forward network.

        x = norm1(x + dropout(attention(x, x, x)));   y = norm2(x + dropout(ff(x)))

    Args: see :class:`Block`; ``attention`` is called with three times x (N, L, d_model) and the
    keyword arguments ``attn_mask``, ``query_lengths`` and ``key_lengths``; with a state, with
    ``state`` and ``return_state`` too.
    """

    def forward(
        self,
        x: Tensor,
        attn_mask: Any = None,
        length_mask: Any = None,
        *,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """(N, L, d_model) to (N, L, d_model).

        Args:
            attn_mask: which position sees which, (L, L); default: all see all. With a state
                every position sees the past, and this is None or lower triangular.
            length_mask: which positions are real; default: all. A bool tensor does for both.
            state: the state of this layer's attention that an earlier call returned.
            return_state: return the pair of the result and the new state.
        """
        stateful = return_state or state is not None
        mask, lengths = self_masks(
            x, attn_mask, length_mask, "attn_mask", "length_mask", stateful=stateful
        )

        def attend(x: Tensor) -> Tensor:
            nonlocal state
            masks = {"attn_mask": mask, "query_lengths": lengths, "key_lengths": lengths}
            if not stateful:
                return self.attention(x, x, x, **masks)
            x, state = self.attention(x, x, x, **masks, state=state, return_state=True)
            return x

        x = self.sublayer(self.norm1, x, attend)
        x = self.sublayer(self.norm2, x, self.feed_forward)
        return (x, state) if return_state else x


class TransformerEncoder(Stack):
    """Encoder layers in a row; args: see :class:`Stack`."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Any = None,
        length_mask: Any = None,
        *,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """(N, L, d_model) to (N, L, d_model), masks as in :class:`TransformerEncoderLayer`.

        With a state, L tokens that follow those which the state has seen: a prompt, one token, or
        a segment of a long sequence, whose gradients reach back to the state's past unless
        it was detached. The recurrent twin takes the same states. Layers must attend causally
        ("causal-linear", "full", "conditional-full:causal-linear"); random features are redrawn
        only for a sequence that begins.

        Args:
            state: what an earlier call returned, None at first; it stays as it is.
            return_state: return the pair of the result and the new
                :class:`~fast_transformers.state.State`.

        Raises:
            ValueError: for a state of another model or batch, or an ``attn_mask`` that is not
                lower triangular together with a state.
        """
        stateful = return_state or state is not None
        mask, lengths = self_masks(
            x, attn_mask, length_mask, "attn_mask", "length_mask", stateful=stateful
        )
        if not stateful:
            return self.run(x, lambda _, layer, x: layer(x, attn_mask=mask, length_mask=lengths))
        past, real = open_state(state, len(self.layers)), real_tokens(lengths, x)
        states = list(past)

        def step(i: int, layer: Any, x: Tensor) -> Tensor:
            x, states[i] = layer(x, mask, lengths, state=states[i], return_state=True)
            return x

        y = self.run(x, step)
        if not return_state:
            return y
        return y, past.advance(states, x.shape[1], real)


class TransformerDecoderLayer(DecoderBlock):
    """Self attention, attention to a memory, and a feed-forward network.

    Args: see :class:`Block`; both attentions are called as that of an encoder layer is, the
    cross attention with the memory as keys and values.
    """

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        x_mask: Any = None,
        x_length_mask: Any = None,
        memory_mask: Any = None,
        memory_length_mask: Any = None,
        *,
        state: Sequence[Any] | None = None,
        return_state: bool = False,
    ) -> Any:
        """(N, L, d_model) and (N, S, d_memory) to (N, L, d_model).

        Args:
            x_mask: (L, L), default all ones; with a state None or lower triangular.
            x_length_mask: which positions of x are real, default all.
            memory_mask: (L, S), default all ones; with a state, nothing else.
            memory_length_mask: which positions of the memory are real, default all.
            state: [self state, cross state] that an earlier call returned. The memory is found
                in it, and what is passed for it is not looked at.
            return_state: return the pair of the result and the new state.
        """
        if return_state or state is not None:
            masks = (x_mask, x_length_mask, memory_mask, memory_length_mask)
            x, new = self._go_on(x, memory, masks, state)
            return (x, new) if return_state else x
        memory = needed(memory)
        mask, lengths = self_masks(x, x_mask, x_length_mask, "x_mask", "x_length_mask")
        cross, memory_lengths = cross_masks(x, memory, memory_mask, memory_length_mask)

        def attend(x: Tensor) -> Tensor:
            return self.self_attention(
                x, x, x, attn_mask=mask, query_lengths=lengths, key_lengths=lengths
            )

        def attend_to_memory(x: Tensor) -> Tensor:
            return self.cross_attention(
                x, memory, memory,
                attn_mask=cross, query_lengths=lengths, key_lengths=memory_lengths,
            )  # fmt: skip

        return self._sublayers(x, attend, attend_to_memory)

    def _go_on(
        self, x: Tensor, memory: Tensor | None, masks: tuple[Any, ...], state: Any
    ) -> tuple[Tensor, list[Any]]:
        own, cross = (None, None) if state is None else state
        x_mask, x_lengths, memory_mask, memory_lengths = masks
        mask, lengths = self_masks(x, x_mask, x_lengths, "x_mask", "x_length_mask", stateful=True)
        if memory_mask is not None and not as_mask(memory_mask, "memory_mask").all_ones:
            raise ValueError(
                "memory_mask must keep everything where a state goes in or out: what it remembers "
                "of the memory serves all queries; pass padding as memory_length_mask"
            )

        def attend(x: Tensor) -> Tensor:
            nonlocal own
            x, own = self.self_attention(
                x, x, x, attn_mask=mask, query_lengths=lengths, key_lengths=lengths,
                state=own, return_state=True,
            )  # fmt: skip
            return x

        def attend_to_memory(x: Tensor) -> Tensor:
            nonlocal cross
            if cross is None:
                keys, layer = needed(memory), cast(Any, self.cross_attention)
                kept = length_mask_or_full(memory_lengths, keys, "memory_length_mask")
                cross = layer.remember(keys, keys, kept)
            x, cross = self.cross_attention(
                x, None, None, attn_mask=None, query_lengths=lengths, key_lengths=None,
                state=cross, return_state=True,
            )  # fmt: skip
            return x

        return self._sublayers(x, attend, attend_to_memory), [own, cross]

    def _sublayers(
        self,
        x: Tensor,
        attend: Callable[[Tensor], Tensor],
        attend_to_memory: Callable[[Tensor], Tensor],
    ) -> Tensor:
        x = self.sublayer(self.norm1, x, attend)
        x = self.sublayer(self.norm2, x, attend_to_memory)
        return self.sublayer(self.norm3, x, self.feed_forward)


class TransformerDecoder(Stack):
    """Decoder layers in a row; args: see :class:`Stack`."""

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        x_mask: Any = None,
        x_length_mask: Any = None,
        memory_mask: Any = None,
        memory_length_mask: Any = None,
        *,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """(N, L, d_model), (N, S, d_memory), masks as in :class:`TransformerDecoderLayer`.

        Args:
            state: what an earlier call returned, None at first; as in
                :class:`TransformerEncoder`. The memory is read once: with a state it is found
                there, and None may be passed for it.
            return_state: return the pair of the result and the new state.
        """
        stateful = return_state or state is not None
        mask, lengths = self_masks(
            x, x_mask, x_length_mask, "x_mask", "x_length_mask", stateful=stateful
        )
        masks = {"x_mask": mask, "x_length_mask": lengths}
        if not stateful:
            memory = needed(memory)
            cross, kept = cross_masks(x, memory, memory_mask, memory_length_mask)
            masks |= {"memory_mask": cross, "memory_length_mask": kept}
            return self.run(x, lambda _, layer, x: layer(x, memory, **masks))
        masks |= {"memory_mask": memory_mask, "memory_length_mask": memory_length_mask}
        past, real = open_state(state, len(self.layers)), real_tokens(lengths, x)
        states = list(past)

        def step(i: int, layer: Any, x: Tensor) -> Tensor:
            x, states[i] = layer(x, memory, **masks, state=states[i], return_state=True)
            return x

        y = self.run(x, step)
        if not return_state:
            return y
        return y, past.advance(states, x.shape[1], real)
