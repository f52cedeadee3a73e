"""Causal softmax attention, one token at a time, over a growing cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....attention.base import SoftmaxAttention
from ....events import AttentionEvent
from ..._utils import check_state


class KeysValues(NamedTuple):
    """Everything seen so far."""

    keys: Tensor  # (N, H, t, E)
    values: Tensor  # (N, H, t, M)


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
        keys, values = key[:, :, None], value[:, :, None]
        if state is not None:
            if len(state[0]) != len(query):
                raise ValueError(
                    f"The batch size changed during iteration: the state is for {len(state[0])} "
                    f"sequences, the inputs are for {len(query)}; start again with state=None"
                )
            keys, values = torch.cat([state[0], keys], 2), torch.cat([state[1], values], 2)
        temp = self.temperature(query)
        weights = (temp * (keys @ query[..., None])[..., 0]).softmax(-1)
        weights = self.dropout(weights)
        self.event_dispatcher.dispatch(AttentionEvent(self, weights))
        return (weights[:, :, None] @ values)[:, :, 0], KeysValues(keys, values)
