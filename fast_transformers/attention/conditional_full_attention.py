"""Softmax attention for short sequences, another attention for long ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import ConditionalAttention
from .full_attention import FullAttention


class ConditionalFullAttention(ConditionalAttention):
    """Full attention up to ``length_limit`` queries and keys, ``other_attention`` beyond.

    Args: see :class:`~fast_transformers.attention.base.ConditionalAttention`; both attentions are
    given the same masks.
    """

    full_class = FullAttention

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attn_mask: Any,
        query_lengths: Any,
        key_lengths: Any,
    ) -> Tensor:
        """(N, L, H, E), (N, S, H, E), (N, S, H, M) to (N, L, H, M); masks go through."""
        short = max(queries.shape[1], keys.shape[1]) <= self.length_limit
        attention = self.full_attention if short else self.other_attention
        return attention(queries, keys, values, attn_mask, query_lengths, key_lengths)
