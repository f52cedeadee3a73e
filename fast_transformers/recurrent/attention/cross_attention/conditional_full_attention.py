"""Softmax attention to a short memory, another attention to a long one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....attention.base import ConditionalAttention, key_mask
from ....state import CrossConditionalState, Memory
from .full_attention import RecurrentCrossFullAttention


class RecurrentCrossConditionalFullAttention(ConditionalAttention):
    """Recurrent twin of :class:`~fast_transformers.attention.ConditionalFullAttention`.

    Query t gets what the batch form gives the last of t queries: full attention while both t
    and the memory are at most ``length_limit`` long, ``other_attention`` otherwise.

    Args: as there; ``other_attention`` is a recurrent cross attention.
    """

    full_class = RecurrentCrossFullAttention

    def forward(
        self,
        query: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        key_lengths: Any,
        state: CrossConditionalState | None = None,
    ) -> tuple[Tensor, CrossConditionalState]:
        """(N, H, E), (N, S, H, E), (N, S, H, M), mask to (N, H, M) and the state."""
        if state is None:
            if keys is None or values is None:
                raise ValueError("keys and values must be given for the first query, got None")
            memory = None
            if keys.shape[1] <= self.length_limit:
                memory = Memory(keys, values, key_mask(key_lengths, keys))
            state = CrossConditionalState(memory, None, 0)
        memory, other, length = state
        out, other = self.other_attention(query, keys, values, key_lengths, other)
        if memory is None or (isinstance(length, int) and length >= self.length_limit):
            return out, CrossConditionalState(None, other, length + 1)
        short, memory = self.full_attention(query, None, None, None, memory)
        if isinstance(length, Tensor):
            short = torch.where((length < self.length_limit)[:, None, None], short, out)
        return short, CrossConditionalState(memory, other, length + 1)
