"""Linear attention to a memory, one query at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .... import ops
from ....attention.base import KernelAttention, key_mask
from ....feature_maps import features_of, with_positions
from ....feature_maps.adapt import needs_positions
from ..._utils import PositionState, at_position, draw_once


class CrossLinearState(ops.LinearState):
    """A state that unpacks as the older library's: S (N, H, M, F), z (N, H, F)."""

    def __iter__(self) -> Iterator[Tensor]:
        kv, z = super().__iter__()
        return iter((kv.mT, z))

    def __getitem__(self, index: int) -> Tensor:
        return tuple(self)[index]


torch.export.register_dataclass(CrossLinearState)


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
            mask, no_query = key_mask(lengths, keys), query[:, None][:, :0]
            keys = with_positions(self.feature_map, keys)
            summed = ops.linear_attention(no_query, keys, values, features, key_mask=mask).state
            state = CrossLinearState(summed.kv, summed.z, summed.shift)
        elif not isinstance(state, ops.LinearState):
            transposed, z = state
            shift = torch.zeros_like(z) if features.exponential else None
            state = CrossLinearState(transposed.mT, z, shift)
        out = ops.linear_attention_step(query, None, None, features, state=state, eps=self.eps)
        return out.values, state
