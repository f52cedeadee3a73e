"""Projections around an attention: model dimensions in, model dimensions out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..events import QKVEvent
from .base import ProjectedAttention


class AttentionLayer(ProjectedAttention):
    """Project to heads, attend, project back.

    Args: see :class:`~fast_transformers.attention.base.ProjectedAttention`. The inner attention is
    called with queries (N, L, H, E), keys (N, S, H, E), values (N, S, H, M), attn_mask,
    query_lengths and key_lengths, and returns (N, L, H, M).
    """

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attn_mask: Any,
        query_lengths: Any,
        key_lengths: Any,
    ) -> Tensor:
        """(N, L, d_model), (N, S, d_model_keys), (N, S, d_model_keys) to (N, L, d_model).

        The three masks go to the inner attention as they are.
        """
        q = self.heads(self.query_projection, queries)
        k = self.heads(self.key_projection, keys)
        v = self.heads(self.value_projection, values)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        self.event_dispatcher.dispatch(QKVEvent(self, q, k, v))
        attended = self.inner_attention(q, k, v, attn_mask, query_lengths, key_lengths)
        return self.out_projection(attended.flatten(2))
