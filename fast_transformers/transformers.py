"""Encoders and decoders over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from .events import EventDispatcher, IntermediateOutput
from .masking import FullMask, LengthMask, as_mask

NORMS: dict[str, type[nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


class Block(nn.Module):
    """Base of all layers: the feed-forward network, residual connections and norms.

    Args:
        attentions: name and module of each attention of the layer, in order.
        d_model: dimensions of the tokens.
        d_ff: dimensions inside the feed-forward network, default ``4 * d_model``.
        dropout: share of activations that training drops.
        activation: name of a function in ``torch.nn.functional``, or a function.
        event_dispatcher: a dispatcher or its name.
        norm_first: normalise the input of each sublayer ("pre-norm") instead of its sum with
            the residual.
        norm_type: "layernorm" or "rmsnorm".

    Raises:
        ValueError: for an unknown ``norm_type`` or name of an ``activation``.
    """

    norm1: nn.Module
    norm2: nn.Module
    activation: Callable[[Tensor], Tensor]

    def __init__(
        self,
        attentions: dict[str, nn.Module],
        d_model: int,
        d_ff: int | None,
        dropout: float,
        activation: str | Callable[[Tensor], Tensor],
        event_dispatcher: str | EventDispatcher,
        norm_first: bool,
        norm_type: str,
    ) -> None:
        super().__init__()
        d_ff = d_ff or 4 * d_model
        for name, attention in attentions.items():
            self.add_module(name, attention)
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)
        if norm_type not in NORMS:
            raise ValueError(f"norm_type must be one of {', '.join(NORMS)}, got {norm_type!r}")
        for i in range(len(attentions) + 1):
            self.add_module(f"norm{i + 1}", NORMS[norm_type](d_model))
        self.dropout = nn.Dropout(dropout)
        named = isinstance(activation, str)
        if not callable(getattr(functional, activation, None) if named else activation):
            raise ValueError(
                "activation must be a function, or the name of one in torch.nn.functional, such "
                f"as 'relu' or 'gelu', got {activation!r}"
            )
        self.activation = getattr(functional, activation) if named else activation
        self.norm_first = norm_first
        self.event_dispatcher = EventDispatcher.get(event_dispatcher)

    def sublayer(self, norm: nn.Module, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """norm(x + f(x)), or x + f(norm(x)) with ``norm_first``."""
        if self.norm_first:
            return x + self.dropout(function(norm(x)))
        return norm(x + self.dropout(function(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class EncoderBlock(Block):
    """Constructor of the encoder layers, whole-sequence and recurrent; see :class:`Block`."""

    attention: nn.Module

    def __init__(
        self,
        attention: nn.Module,
        d_model: int,
        d_ff: int | None = None,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        event_dispatcher: str | EventDispatcher = "",
        *,
        norm_first: bool = False,
        norm_type: str = "layernorm",
    ) -> None:
        super().__init__(
            {"attention": attention}, d_model, d_ff, dropout, activation, event_dispatcher,
            norm_first, norm_type,
        )  # fmt: skip


class DecoderBlock(Block):
    """Constructor of the decoder layers, whole-sequence and recurrent; see :class:`Block`."""

    self_attention: nn.Module
    cross_attention: nn.Module
    norm3: nn.Module

    def __init__(
        self,
        self_attention: nn.Module,
        cross_attention: nn.Module,
        d_model: int,
        d_ff: int | None = None,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        event_dispatcher: str | EventDispatcher = "",
        *,
        norm_first: bool = False,
        norm_type: str = "layernorm",
    ) -> None:
        attentions = {"self_attention": self_attention, "cross_attention": cross_attention}
        super().__init__(
            attentions, d_model, d_ff, dropout, activation, event_dispatcher, norm_first, norm_type
        )


class Stack(nn.Module):
    """Base of encoders and decoders: layers, and what comes after the last.

    Args:
        layers: applied in order; an :class:`IntermediateOutput` is dispatched after each.
        norm_layer: applied to the output of the last layer, or None.
        event_dispatcher: a dispatcher or its name.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        norm_layer: nn.Module | None = None,
        event_dispatcher: str | EventDispatcher = "",
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm_layer
        self.event_dispatcher = EventDispatcher.get(event_dispatcher)

    def run(self, x: Tensor, layer: Callable[[int, nn.Module, Tensor], Tensor]) -> Tensor:
        """Apply ``layer(i, module, x)`` for each layer, then the norm."""
        for i, module in enumerate(self.layers):
            x = layer(i, module, x)
            self.event_dispatcher.dispatch(IntermediateOutput(self, x))
        return x if self.norm is None else self.norm(x)


class TransformerEncoderLayer(EncoderBlock):
    """Self attention and a feed-forward network.

        x = norm1(x + dropout(attention(x, x, x)));   y = norm2(x + dropout(ff(x)))

    Args: see :class:`Block`; ``attention`` is called with three times x (N, L, d_model) and the
    keyword arguments ``attn_mask``, ``query_lengths`` and ``key_lengths``.
    """

    def forward(self, x: Tensor, attn_mask: Any = None, length_mask: Any = None) -> Tensor:
        """(N, L, d_model) to (N, L, d_model).

        Args:
            attn_mask: which position sees which, (L, L); default: all see all.
            length_mask: which positions are real; default: all. A bool tensor does for both.
        """
        mask, lengths = self_masks(x, attn_mask, length_mask, "attn_mask", "length_mask")

        def attend(x: Tensor) -> Tensor:
            return self.attention(
                x, x, x, attn_mask=mask, query_lengths=lengths, key_lengths=lengths
            )

        x = self.sublayer(self.norm1, x, attend)
        return self.sublayer(self.norm2, x, self.feed_forward)


class TransformerEncoder(Stack):
    """Encoder layers in a row; args: see :class:`Stack`."""

    def forward(self, x: Tensor, attn_mask: Any = None, length_mask: Any = None) -> Tensor:
        """(N, L, d_model) to (N, L, d_model), masks as in :class:`TransformerEncoderLayer`."""
        mask, lengths = self_masks(x, attn_mask, length_mask, "attn_mask", "length_mask")
        return self.run(x, lambda _, layer, x: layer(x, attn_mask=mask, length_mask=lengths))


class TransformerDecoderLayer(DecoderBlock):
    """Self attention, attention to a memory, and a feed-forward network.

    Args: see :class:`Block`; both attentions are called as that of an encoder layer is, the
    cross attention with the memory as keys and values.
    """

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        x_mask: Any = None,
        x_length_mask: Any = None,
        memory_mask: Any = None,
        memory_length_mask: Any = None,
    ) -> Tensor:
        """(N, L, d_model) and (N, S, d_memory) to (N, L, d_model).

        Args:
            x_mask: (L, L), default all ones.
            x_length_mask: which positions of x are real, default all.
            memory_mask: (L, S), default all ones.
            memory_length_mask: which positions of the memory are real, default all.
        """
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

        x = self.sublayer(self.norm1, x, attend)
        x = self.sublayer(self.norm2, x, attend_to_memory)
        return self.sublayer(self.norm3, x, self.feed_forward)


class TransformerDecoder(Stack):
    """Decoder layers in a row; args: see :class:`Stack`."""

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        x_mask: Any = None,
        x_length_mask: Any = None,
        memory_mask: Any = None,
        memory_length_mask: Any = None,
    ) -> Tensor:
        """(N, L, d_model), (N, S, d_memory), masks as in :class:`TransformerDecoderLayer`."""
        mask, lengths = self_masks(x, x_mask, x_length_mask, "x_mask", "x_length_mask")
        cross, memory_lengths = cross_masks(x, memory, memory_mask, memory_length_mask)
        masks = {
            "x_mask": mask,
            "x_length_mask": lengths,
            "memory_mask": cross,
            "memory_length_mask": memory_lengths,
        }
        return self.run(x, lambda _, layer, x: layer(x, memory, **masks))


def length_mask_or_full(mask: Any, x: Tensor, name: str) -> Any:
    """``mask`` as a mask object; None keeps all of ``x`` (N, L, ...)."""
    if mask is None:
        return LengthMask.full(x.shape[0], x.shape[1], device=x.device)
    return as_mask(mask, name)


def self_masks(x: Tensor, mask: Any, lengths: Any, mask_name: str, lengths_name: str) -> Any:
    if mask is None:
        mask = FullMask(x.shape[1], device=x.device)
    return as_mask(mask, mask_name), length_mask_or_full(lengths, x, lengths_name)


def cross_masks(x: Tensor, memory: Tensor, mask: Any, lengths: Any) -> Any:
    if mask is None:
        mask = FullMask(x.shape[1], memory.shape[1], device=x.device)
    return as_mask(mask, "memory_mask"), length_mask_or_full(lengths, memory, "memory_length_mask")
