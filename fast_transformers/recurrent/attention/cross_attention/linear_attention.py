"""Linear attention to a memory, one query at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .... import ops
from ....attention.base import KernelAttention, draw_once, sum_up
from ....feature_maps import features_of
from ....state import CrossLinearState


class RecurrentCrossLinearAttention(KernelAttention):
    """The recurrent twin of :class:`~fast_transformers.attention.LinearAttention`.

    The memory is summed up once, with the first query; every later query costs the same,
    whatever the memory's length. Args and errors of the constructor are those of the twin.
    """

    def forward(
        self,
        query: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        key_lengths: Any,
        state: CrossLinearState | Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, CrossLinearState]:
        """(N, H, E), (N, S, H, E), (N, S, H, M), mask to (N, H, M) and the state.

        With a state, ``keys``, ``values`` and ``key_lengths`` are not looked at.
        """
        draw_once(self.feature_map, query.device)
        features = features_of(self.feature_map)
        if state is None:
            if keys is None or values is None:
                raise ValueError("keys and values must be given for the first query, got None")
            state = sum_up(self.feature_map, keys, values, key_lengths)
        elif not isinstance(state, ops.LinearState):
            transposed, z = state
            shift = torch.zeros_like(z) if features.exponential else None
            state = CrossLinearState(transposed.mT, z, shift)
        out = ops.linear_attention_step(query, None, None, features, state=state, eps=self.eps)
        return out.values, state
