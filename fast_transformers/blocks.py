"""What encoders and decoders, over whole sequences and recurrent, are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .events import EventDispatcher, IntermediateOutput
from .masking import FullMask, LengthMask, as_mask, key_padding

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

    Attributes:
        checkpointing: calls every layer in place of the stack, such as
            ``torch.utils.checkpoint.checkpoint`` with its options, to keep no activations of it;
            None keeps them. Not for calls with a state.
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
        self.checkpointing: Callable[..., Tensor] | None = None

    def run(self, x: Tensor, layer: Callable[[int, nn.Module, Tensor], Tensor]) -> Tensor:
        """Apply ``layer(i, module, x)`` for each layer, then the norm."""
        for i, module in enumerate(self.layers):
            if self.checkpointing is not None and torch.is_grad_enabled():
                x = self.checkpointing(layer, i, module, x)
            else:
                x = layer(i, module, x)
            self.event_dispatcher.dispatch(IntermediateOutput(self, x))
        return x if self.norm is None else self.norm(x)


def length_mask_or_full(mask: Any, x: Tensor, name: str) -> Any:
    """``mask`` as a mask object; None keeps all of ``x`` (N, L, ...)."""
    if mask is None:
        return LengthMask.full(x.shape[0], x.shape[1], device=x.device)
    return as_mask(mask, name)


def self_masks(
    x: Tensor,
    mask: Any,
    lengths: Any,
    mask_name: str,
    lengths_name: str,
    *,
    stateful: bool = False,
) -> Any:
    """Both as mask objects; None is all ones, and remains None where there is a state."""
    if stateful:
        given = ((mask, mask_name), (lengths, lengths_name))
        return tuple(None if m is None else as_mask(m, name) for m, name in given)
    if mask is None:
        mask = FullMask(x.shape[1], device=x.device)
    return as_mask(mask, mask_name), length_mask_or_full(lengths, x, lengths_name)


def cross_masks(x: Tensor, memory: Tensor, mask: Any, lengths: Any) -> Any:
    if mask is None:
        mask = FullMask(x.shape[1], memory.shape[1], device=x.device)
    return as_mask(mask, "memory_mask"), length_mask_or_full(lengths, memory, "memory_length_mask")


def real_tokens(lengths: Any, x: Tensor) -> Tensor | None:
    """Which of the tokens (N, L, ...) a length mask keeps, (N, L) bool; None for all."""
    if lengths is None:
        return None
    mask = key_padding(lengths, x.shape[0], x.shape[1], "length_mask")
    return None if mask is None else mask.to(x.device)


def needed(memory: Tensor | None) -> Tensor:
    if memory is None:
        raise ValueError("memory must be given for the first tokens, got None; pass (N, S, dims)")
    return memory
