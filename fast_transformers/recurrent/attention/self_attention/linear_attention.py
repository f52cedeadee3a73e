"""Causal linear attention, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .... import ops
from ....attention.base import KernelAttention, draw_once
from ....feature_maps import features_of
from ..._utils import check_state


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
        state: ops.LinearState | Sequence[Tensor] | None = None,
        memory: Any = None,
    ) -> tuple[Tensor, ops.LinearState]:
        """(N, H, E), (N, H, E), (N, H, M) and a state to (N, H, M) and the new state.

        The state that is passed in stays as it is. A state from
        :func:`fast_transformers.ops.causal_linear_attention` continues a whole sequence.
        """
        feature_map = self.feature_map
        draw_once(feature_map, query.device)
        return ops.linear_attention_step(
            query,
            key,
            value,
            features_of(feature_map),
            state=check_state(state, memory),
            eps=self.eps,
        )
