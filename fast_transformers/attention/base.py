"""What the attentions of this package are constructed from; none of these computes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..events import EventDispatcher
from ..feature_maps import build_feature_map, draw, features_of, with_positions
from ..feature_maps.adapt import needs_positions
from ..masking import as_mask, key_padding
from ..state import CrossLinearState, KeysValues
from ..state.parts import Count, positions


class KernelAttention(nn.Module):
    """Base of the linear attentions.

    Args:
        query_dimensions: E, handed to the feature map's factory.
        feature_map: a factory that makes phi from E; None is elu(x) + 1.
        eps: added to the denominator, see :func:`fast_transformers.ops.linear_attention`.
        event_dispatcher: a dispatcher or its name.

    Raises:
        TypeError: if ``feature_map`` is no factory of feature maps.
    """

    def __init__(
        self,
        query_dimensions: int,
        feature_map: Callable[[int], Any] | None = None,
        eps: float = 1e-6,
        event_dispatcher: str | EventDispatcher = "",
    ) -> None:
        super().__init__()
        self.feature_map = build_feature_map(feature_map, query_dimensions)
        self.eps = eps
        self.event_dispatcher = EventDispatcher.get(event_dispatcher)


class SoftmaxAttention(nn.Module):
    """Base of the softmax attentions.

    Args:
        softmax_temp: factor of the dot products, default 1/sqrt(E).
        attention_dropout: share of the weights that training drops.
        event_dispatcher: a dispatcher or its name.
    """

    def __init__(
        self,
        softmax_temp: float | None = None,
        attention_dropout: float = 0.1,
        event_dispatcher: str | EventDispatcher = "",
    ) -> None:
        super().__init__()
        self.softmax_temp = softmax_temp
        self.dropout = nn.Dropout(attention_dropout)
        self.event_dispatcher = EventDispatcher.get(event_dispatcher)

    def temperature(self, query: Tensor) -> float:
        return self.softmax_temp or query.shape[-1] ** -0.5


class ConditionalAttention(nn.Module):
    """Base of the attentions that are softmax attention up to a length, another one beyond.

    Args:
        other_attention: the attention of long sequences.
        length_limit: longest L and S that full attention serves.
        softmax_temp: factor of the dot products, default 1/sqrt(E).
        attention_dropout: share of the full attention's weights that training drops.
        event_dispatcher: a dispatcher or its name, of the full attention too.
    """

    full_class: type[SoftmaxAttention]

    def __init__(
        self,
        other_attention: nn.Module,
        length_limit: int = 512,
        softmax_temp: float | None = None,
        attention_dropout: float = 0.1,
        event_dispatcher: str | EventDispatcher = "",
    ) -> None:
        super().__init__()
        self.full_attention = self.full_class(softmax_temp, attention_dropout, event_dispatcher)
        self.other_attention = other_attention
        self.length_limit = length_limit
        self.event_dispatcher = EventDispatcher.get(event_dispatcher)

    def cut(self, full: KeysValues, lengths: Tensor) -> KeysValues | None:
        """The cache after (N,) tokens, of which some sequences may need it longer than others.

        Waits for the device once in ``length_limit`` tokens, to see what is still needed.
        """
        if full.length <= 2 * self.length_limit or torch.compiler.is_compiling():
            return full
        return None if int(lengths.min()) >= self.length_limit else full.trimmed()


class ProjectedAttention(nn.Module):
    """Base of the layers that project to heads, attend, and project back.

    Args:
        attention: the inner attention.
        d_model: dimensions of the queries and of the result.
        n_heads: H.
        d_keys: E, default ``d_model // n_heads``.
        d_values: M, default ``d_model // n_heads``.
        d_model_keys: dimensions of the keys and values, default ``d_model``.
        event_dispatcher: where events go; a dispatcher or its name.
        bias: whether the four projections have a bias.
        rotary: turns queries and keys by their positions before the attention, or None.
    """

    def __init__(
        self,
        attention: Any,
        d_model: int,
        n_heads: int,
        d_keys: int | None = None,
        d_values: int | None = None,
        d_model_keys: int | None = None,
        event_dispatcher: str | EventDispatcher = "",
        *,
        bias: bool = True,
        rotary: nn.Module | None = None,
    ) -> None:
        super().__init__()
        d_keys = d_keys or d_model // n_heads
        d_values = d_values or d_model // n_heads
        d_model_keys = d_model_keys or d_model
        self.inner_attention = attention
        self.query_projection = nn.Linear(d_model, d_keys * n_heads, bias)
        self.key_projection = nn.Linear(d_model_keys, d_keys * n_heads, bias)
        self.value_projection = nn.Linear(d_model_keys, d_values * n_heads, bias)
        self.out_projection = nn.Linear(d_values * n_heads, d_model, bias)
        self.n_heads = n_heads
        self.rotary = rotary
        self.event_dispatcher = EventDispatcher.get(event_dispatcher)

    def heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """(..., d_model) to (..., H, E)."""
        return projection(x).unflatten(-1, (self.n_heads, -1))


def key_mask(key_lengths: Any, keys: Tensor) -> Tensor | None:
    """Which keys (N, S, ...) are real: (N, S) bool on their device, or None for all."""
    if key_lengths is None:
        return None
    mask = key_padding(as_mask(key_lengths, "key_lengths"), keys.shape[0], keys.shape[1])
    return None if mask is None else mask.to(keys.device)


def at_positions(feature_map: Any, x: Tensor, lengths: Any, start: Count = 0) -> Tensor:
    """x (N, L, H, E) as a positional map wants it, padding not counted."""
    if not needs_positions(feature_map):
        return x
    return with_positions(feature_map, x, positions(start, x.shape[1], key_mask(lengths, x)))


def draw_once(feature_map: Any, device: Any) -> None:
    """Draw a map that cannot be used without; a live state never sees its features redrawn."""
    if not getattr(feature_map, "drawn", False):
        draw(feature_map, device)


def check_causal(attn_mask: Any, name: str) -> None:
    """Attention that hands on a state looks back alone; None says so, too.

    Raises:
        ValueError: for a mask that is not lower triangular.
    """
    if attn_mask is not None and not as_mask(attn_mask, "attn_mask").lower_triangular:
        raise ValueError(
            f"attn_mask of a {name} with a state must be None or lower triangular: what a state "
            "remembers is the past; pass padding as key_lengths"
        )


def sum_up(feature_map: Any, keys: Tensor, values: Tensor, key_lengths: Any) -> CrossLinearState:
    """The sums over a memory (N, S, H, E), (N, S, H, M)."""
    mask = key_mask(key_lengths, keys)
    features, keys = features_of(feature_map), at_positions(feature_map, keys, key_lengths)
    summed = ops.linear_attention(keys[:, :0], keys, values, features, key_mask=mask).state
    return CrossLinearState(summed.kv, summed.z, summed.shift)
