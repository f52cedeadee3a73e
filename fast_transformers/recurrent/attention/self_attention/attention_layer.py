"""Projections around a recurrent attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....attention.base import ProjectedAttention
from ..._utils import PositionState, check_state


class RecurrentAttentionLayer(ProjectedAttention):
    """The recurrent twin of :class:`~fast_transformers.attention.AttentionLayer`.

    Args: as there; ``attention`` is called with query (N, H, E), key (N, H, E), value (N, H, M)
    and its state, and returns a result (N, H, M) and the new state.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, state: Any = None, memory: Any = None
    ) -> tuple[Tensor, Any]:
        """(N, d_model), (N, d_model_keys), (N, d_model_keys), state to (N, d_model), state."""
        state = check_state(state, memory)
        q = self.heads(self.query_projection, query)
        k = self.heads(self.key_projection, key)
        v = self.heads(self.value_projection, value)
        if self.rotary is None:
            attended, state = self.inner_attention(q, k, v, state)
        else:
            inner, position = PositionState.of(state)
            q, k = (self.rotary(x[:, None], position)[:, 0] for x in (q, k))
            attended, inner = self.inner_attention(q, k, v, inner)
            state = PositionState(inner, position + 1)
        return self.out_projection(attended.flatten(1)), state
