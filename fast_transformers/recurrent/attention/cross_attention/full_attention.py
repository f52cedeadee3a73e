"""Softmax attention to a memory, one query at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....attention.base import SoftmaxAttention, key_mask
from ....attention.full_attention import softmax
from ....events import AttentionEvent


class Memory(NamedTuple):
    """The projected memory."""

    keys: Tensor  # (N, S, H, E)
    values: Tensor  # (N, S, H, M)


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

        ``key_lengths`` is needed at every step; keys and values only without a state.
        """
        if state is not None:
            keys, values = state
        if keys is None or values is None:
            raise ValueError("keys and values must be given for the first query, got None")
        temp = self.temperature(query)
        logits = temp * torch.einsum("nhe,nshe->nhs", query, keys)
        padding = key_mask(key_lengths, keys)
        weights = softmax(logits, None if padding is None else padding[:, None, :])
        weights = self.dropout(weights).transpose(1, 2)
        self.event_dispatcher.dispatch(AttentionEvent(self, weights))
        return torch.einsum("nsh,nshm->nhm", weights, values), Memory(keys, values)
