"""Softmax attention while the past is short, another attention from then on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....attention.base import ConditionalAttention
from ....state import ConditionalState
from ..._utils import check_state
from .full_attention import RecurrentFullAttention


class RecurrentConditionalFullAttention(ConditionalAttention):
    """Recurrent twin of :class:`~fast_transformers.attention.ConditionalFullAttention`.

    Token t gets what the batch form gives the last token of a sequence of length t: full
    attention up to ``length_limit`` tokens, ``other_attention`` beyond. In a stack of layers the
    two forms differ beyond the limit: what an early token was given here stays as it was, while
    the batch form computes it anew with ``other_attention``.

    Args: as there; ``other_attention`` is a recurrent attention.
    """

    full_class = RecurrentFullAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: ConditionalState | None = None,
        memory: Any = None,
    ) -> tuple[Tensor, ConditionalState]:
        """(N, H, E), (N, H, E), (N, H, M) and a state to (N, H, M) and the new state."""
        state = check_state(state, memory)
        full, other, length = ConditionalState(None, None, 0) if state is None else state
        out, other = self.other_attention(query, key, value, other)
        if isinstance(length, int) and length >= self.length_limit:
            return out, ConditionalState(None, other, length + 1)
        short, full = self.full_attention(query, key, value, full)
        if isinstance(length, int):
            return short, ConditionalState(full, other, length + 1)
        out = torch.where((length < self.length_limit)[:, None, None], short, out)
        return out, ConditionalState(self.cut(full, length + 1), other, length + 1)
