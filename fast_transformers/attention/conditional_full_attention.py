"""Softmax attention for short sequences, another attention for long ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..state import ConditionalState, CrossConditionalState
from ..state.parts import add, positions
from .base import ConditionalAttention, key_mask
from .full_attention import FullAttention


class ConditionalFullAttention(ConditionalAttention):
    """Full attention up to ``length_limit`` queries and keys, ``other_attention`` beyond.

    Args: see :class:`~fast_transformers.attention.base.ConditionalAttention`; both attentions are
    given the same masks.
    """

    full_class = FullAttention
    takes_state = True

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attn_mask: Any,
        query_lengths: Any,
        key_lengths: Any,
        *,
        state: ConditionalState | CrossConditionalState | None = None,
        return_state: bool = False,
    ) -> Any:
        """(N, L, H, E), (N, S, H, E), (N, S, H, M) to (N, L, H, M); masks go through.

        With a state, token t gets what the last token of a sequence of length t gets: full
        attention up to the limit, the other one beyond.

        Args:
            state: what an earlier call returned, which the keys follow; or what :meth:`remember`
                returned, and no keys and values.
            return_state: return the pair of values and the new state, S = L.
        """
        masks = (attn_mask, query_lengths, key_lengths)
        if isinstance(state, CrossConditionalState):
            out, seen = self._attend_to_memory(queries, state)
            return (out, seen) if return_state else out
        if return_state or state is not None:
            out, now = self._go_on(queries, keys, values, masks, state)
            return (out, now) if return_state else out
        short = max(queries.shape[1], keys.shape[1]) <= self.length_limit
        attention: Any = self.full_attention if short else self.other_attention
        return attention(queries, keys, values, *masks)

    def remember(self, keys: Tensor, values: Tensor, key_lengths: Any) -> CrossConditionalState:
        """The state of a memory (N, S, H, E), (N, S, H, M), for queries that come later."""
        short = keys.shape[1] <= self.length_limit
        full: Any = self.full_attention
        other: Any = self.other_attention
        memory = full.remember(keys, values, key_lengths) if short else None
        return CrossConditionalState(memory, other.remember(keys, values, key_lengths), 0)

    def _go_on(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Any, state: ConditionalState | None
    ) -> tuple[Tensor, ConditionalState]:
        full, other, length = ConditionalState(None, None, 0) if state is None else state
        padding = key_mask(masks[2], k)
        now = add(length, q.shape[1], padding)
        inputs = (q, k, v, *masks)
        out, other = self.other_attention(*inputs, state=other, return_state=True)
        if isinstance(now, int):
            few = max(min(self.length_limit - (now - q.shape[1]), q.shape[1]), 0)
            if few:
                first = (x[:, :few] for x in (q, k, v))
                short, full = self.full_attention(
                    *first, None, None, None, state=full, return_state=True
                )
                out = torch.cat([short, out[:, few:]], 1)
        else:
            short, full = self.full_attention(*inputs, state=full, return_state=True)
            full = self.cut(full, now)
            at: Any = positions(length, q.shape[1], padding)
            out = torch.where((at < self.length_limit)[:, :, None, None], short, out)
        done = isinstance(now, int) and now >= self.length_limit
        return out, ConditionalState(None if done else full, other, now)

    def _attend_to_memory(
        self, q: Tensor, state: CrossConditionalState
    ) -> tuple[Tensor, CrossConditionalState]:
        memory, other, length = state
        none = (None, None, None, None, None)
        out, other = self.other_attention(q, *none, state=other, return_state=True)
        if memory is not None:
            at = positions(length, q.shape[1], None)
            at = at if isinstance(at, Tensor) else torch.arange(at, at + q.shape[1])[None]
            short = self.full_attention(q, *none, state=memory)
            use = (at < self.length_limit).to(q.device)
            out = torch.where(use[:, :, None, None], short, out)
        length = length + q.shape[1]
        done = isinstance(length, int) and length >= self.length_limit
        return out, CrossConditionalState(None if done else memory, other, length)
