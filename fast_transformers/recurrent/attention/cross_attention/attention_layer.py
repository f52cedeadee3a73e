"""Projections around a recurrent cross attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....attention.base import ProjectedAttention


class RecurrentCrossAttentionLayer(ProjectedAttention):
    """Recurrent twin of an :class:`~fast_transformers.attention.AttentionLayer` over a memory.

    Args: as there; ``attention`` is called with query (N, H, E), keys (N, S, H, E), values
    (N, S, H, M), key_lengths and its state. Keys and values are projected for the first token
    only; after that the attention finds them in its state and is given None.
    """

    def forward(
        self, query: Tensor, keys: Tensor, values: Tensor, key_lengths: Any, state: Any = None
    ) -> tuple[Tensor, Any]:
        """(N, d_model), (N, S, d_model_keys), (N, S, d_model_keys) to (N, d_model), state."""
        q = self.heads(self.query_projection, query)
        k = v = None
        if state is None:
            k = self.heads(self.key_projection, keys)
            v = self.heads(self.value_projection, values)
        attended, state = self.inner_attention(q, k, v, key_lengths, state)
        return self.out_projection(attended.flatten(1)), state
