"""Softmax attention to a short memory, another attention to a long one."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ....attention.base import ConditionalAttention
from .full_attention import Memory, RecurrentCrossFullAttention


class CrossConditionalState(NamedTuple):
    """The memory for as long as full attention may serve, the state of the other attention."""

    memory: Memory | None
    other: Any
    length: int


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
            short = keys.shape[1] <= self.length_limit
            state = CrossConditionalState(Memory(keys, values) if short else None, None, 0)
        memory, other, length = state
        length += 1
        out, other = self.other_attention(query, keys, values, key_lengths, other)
        if memory is not None and length <= self.length_limit:
            out, memory = self.full_attention(query, None, None, key_lengths, memory)
        else:
            memory = None
        return out, CrossConditionalState(memory, other, length)
