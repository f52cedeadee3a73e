"""Softmax attention to a memory, one query at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....attention.base import SoftmaxAttention, key_mask
from ....attention.full_attention import softmax
from ....events import AttentionEvent
from ....state import Memory


class RecurrentCrossFullAttention(SoftmaxAttention):
    """The recurrent twin of :class:`~fast_transformers.attention.FullAttention` over a memory.

    Args: as there. Dispatches an :class:`AttentionEvent` with weights (N, S, H) at every step.
    """

    def forward(
        self,
        query: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        key_lengths: Any,
        state: Memory | Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Memory]:
        """(N, H, E), (N, S, H, E), (N, S, H, M), mask to (N, H, M) and the state.

        Keys and values are needed without a state only. ``key_lengths`` is kept in the state;
        with an older pair as state it is needed at every step.
        """
        if state is None:
            if keys is None or values is None:
                raise ValueError("keys and values must be given for the first query, got None")
            state = Memory(keys, values, key_mask(key_lengths, keys))
        elif not isinstance(state, Memory):
            keys, values = state
            state = Memory(keys, values, key_mask(key_lengths, keys))
        keys, values = state[:]
        logits = self.temperature(query) * torch.einsum("nhe,nshe->nhs", query, keys)
        weights = softmax(logits, None if state.mask is None else state.mask[:, None, :])
        weights = self.dropout(weights).transpose(1, 2)
        self.event_dispatcher.dispatch(AttentionEvent(self, weights))
        return torch.einsum("nsh,nshm->nhm", weights, values), state
