"""Causal softmax attention, one token at a time, over a growing cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ....attention.base import SoftmaxAttention
from ....attention.full_attention import go_on, softmax, visible
from ....events import AttentionEvent
from ....state import KeysValues
from ..._utils import check_state


class RecurrentFullAttention(SoftmaxAttention):
    """The recurrent twin of :class:`~fast_transformers.attention.FullAttention`.

    Args: as there. Dispatches an :class:`AttentionEvent` with weights (N, H, t) at every step.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: KeysValues | Sequence[Tensor] | None = None,
        memory: Any = None,
    ) -> tuple[Tensor, KeysValues]:
        """(N, H, E), (N, H, E), (N, H, M) and a state to (N, H, M) and the new state."""
        state = check_state(state, memory)
        past = None if state is None else KeysValues.of(state)
        q, k, v = (x[:, :, None] for x in (query, key, value))
        now = go_on(past, q, k, v, None)
        keys, values = now
        q = q.to(keys.dtype)  # of a cache that was filled in another dtype
        weights = softmax(self.temperature(q) * q @ keys.mT, visible(past, now, 1, None))
        weights = self.dropout(weights)
        self.event_dispatcher.dispatch(AttentionEvent(self, weights[:, :, 0]))
        return (weights @ values)[:, :, 0].to(query.dtype), now
