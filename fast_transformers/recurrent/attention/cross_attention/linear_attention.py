"""Linear attention to a memory, one query at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .... import ops
from ....attention.base import KernelAttention, draw_once, sum_up
from ....feature_maps import features_of
from ....feature_maps.adapt import needs_positions
from ....state import CrossLinearState, PositionState
from ..._utils import at_position


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
        state: CrossLinearState | PositionState | Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, CrossLinearState | PositionState]:
        """(N, H, E), (N, S, H, E), (N, S, H, M), mask to (N, H, M) and the state.

        With a state, ``keys``, ``values`` and ``key_lengths`` are not looked at.
        """
        if not needs_positions(self.feature_map):
            return self._look_up(query, keys, values, key_lengths, state)
        inner, position = PositionState.of(state)
        query = at_position(self.feature_map, query, position)
        out, inner = self._look_up(query, keys, values, key_lengths, inner)
        return out, PositionState(inner, position + 1)

    def _look_up(
        self, query: Tensor, keys: Tensor | None, values: Tensor | None, lengths: Any, state: Any
    ) -> tuple[Tensor, Any]:
        draw_once(self.feature_map, query.device)
        features = features_of(self.feature_map)
        if state is None:
            if keys is None or values is None:
                raise ValueError("keys and values must be given for the first query, got None")
            state = sum_up(self.feature_map, keys, values, lengths)
        elif not isinstance(state, ops.LinearState):
            transposed, z = state
            shift = torch.zeros_like(z) if features.exponential else None
            state = CrossLinearState(transposed.mT, z, shift)
        out = ops.linear_attention_step(query, None, None, features, state=state, eps=self.eps)
        return out.values, state
