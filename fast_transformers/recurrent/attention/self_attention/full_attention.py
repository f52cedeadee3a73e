"""Causal softmax attention, one token at a time, over a growing cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ....attention.base import SoftmaxAttention
from ....attention.full_attention import go_on, softmax, visible
from ....events import AttentionEvent
from ....state import KeysValues
from ..._utils import check_state


class RecurrentFullAttention(SoftmaxAttention):
    """The recurrent twin of :class:`~fast_transformers.attention.FullAttention`.

    Args: as there. Runs on PyTorch's ``scaled_dot_product_attention``, unless somebody
    listens for :class:`AttentionEvent`, which has the weights (N, H, t) of every step.
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
        keys, values = now[:]
        q, keep = q.to(keys.dtype), visible(past, now, 1, None)  # the cache's dtype may differ
        if self.event_dispatcher.wants(AttentionEvent, self):
            weights = self.dropout(softmax(self.temperature(q) * q @ keys.mT, keep))
            self.event_dispatcher.dispatch(AttentionEvent(self, weights[:, :, 0]))
            out = weights @ values
        else:
            dropout = self.dropout.p if self.training else 0.0
            out = scaled_dot_product_attention(
                q, keys, values, attn_mask=keep, dropout_p=dropout, scale=self.temperature(q)
            )
        return out[:, :, 0].to(query.dtype), now
