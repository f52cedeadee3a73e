"""Causal linear attention, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .... import ops
from ....attention.base import KernelAttention
from ....feature_maps import features_of
from ....feature_maps.adapt import needs_positions
from ..._utils import PositionState, at_position, check_state, draw_once


class RecurrentLinearAttention(KernelAttention):
    """The recurrent twin of :class:`~fast_transformers.attention.CausalLinearAttention`.

        S = S + phi(k) v^T,   z = z + phi(k),   out = phi(q) S / (phi(q).z + eps)

    "Transformers are RNNs" (Katharopoulos et al. 2020), equations 16 to 20. Random features are
    not redrawn here: a live state would lose its meaning. Args and errors of the constructor: see
    :class:`~fast_transformers.attention.base.KernelAttention`.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: ops.LinearState | PositionState | Sequence[Tensor] | None = None,
        memory: Any = None,
    ) -> tuple[Tensor, ops.LinearState | PositionState]:
        """(N, H, E), (N, H, E), (N, H, M) and a state to (N, H, M) and the new state.

        The state that is passed in stays as it is. A state from
        :func:`fast_transformers.ops.causal_linear_attention` continues a whole sequence. That of
        a map with positions counts the tokens, too: ``PositionState(state, length)``.
        """
        state = check_state(state, memory)
        if not needs_positions(self.feature_map):
            return self._step(query, key, value, state)
        inner, position = PositionState.of(state)
        query, key = (at_position(self.feature_map, x, position) for x in (query, key))
        out, inner = self._step(query, key, value, inner)
        return out, PositionState(inner, position + 1)

    def _step(self, query: Tensor, key: Tensor, value: Tensor, state: Any) -> ops.Attended:
        draw_once(self.feature_map, query.device)
        features = features_of(self.feature_map)
        return ops.linear_attention_step(query, key, value, features, state=state, eps=self.eps)
