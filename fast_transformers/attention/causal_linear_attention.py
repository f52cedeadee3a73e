"""Attention of every query to the keys up to it, in linear time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from ..causal_product import causal_dot_product
from ..feature_maps import draw, features_of, with_positions
from ..feature_maps.adapt import needs_positions
from ..masking import as_mask
from ..ops.choose import exporting
from ..state import PositionState
from ..state.parts import add, positions
from .base import KernelAttention, at_positions, check_causal, draw_once, key_mask


def causal_linear(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """sum_{j<=i} (Q_i.K_j) V_j, not normalised: (N, L, H, F), (N, L, H, F), (N, L, H, M)."""
    return causal_dot_product(*(x.transpose(1, 2) for x in (Q, K, V))).transpose(1, 2)


class CausalLinearAttention(KernelAttention):
    """out_i = sum_{j<=i} phi(q_i).phi(k_j) v_j / (sum_{j<=i} phi(q_i).phi(k_j) + eps).

    "Transformers are RNNs" (Katharopoulos et al. 2020), equations 8 to 12. A recurrent twin,
    :class:`~fast_transformers.recurrent.attention.RecurrentLinearAttention`, computes the same
    token by token.

    Args and errors of the constructor: see
    :class:`~fast_transformers.attention.base.KernelAttention`.
    """

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
        state: ops.LinearState | PositionState | Sequence[Tensor] | None = None,
        return_state: bool = False,
    ) -> Any:
        """(N, L, H, E), (N, S, H, E), (N, S, H, M) to (N, L, H, M).

        Args:
            attn_mask: must be lower triangular; it may be larger than the inputs and on another
                device. None will do with a state.
            query_lengths: not used; padded queries give values that mean nothing.
            key_lengths: which keys are real, or None for all.
            state: what an earlier call returned, which the keys follow, or the older library's
                pair [S, Z]. Random features are not redrawn then: it would lose its meaning.
            return_state: return the pair of values and the new state, S = L.

        Raises:
            RuntimeError: for an ``attn_mask`` that is not lower triangular.
            ValueError: the same, with a state.
        """
        if return_state or state is not None:
            check_causal(attn_mask, "CausalLinearAttention")
            values, state = self._go_on(queries, keys, values, key_lengths, state)
            return (values, state) if return_state else values
        if attn_mask is None or not as_mask(attn_mask, "attn_mask").lower_triangular:
            raise RuntimeError(
                "CausalLinearAttention only supports full lower triangular masks; pass "
                f"attn_mask=TriangularCausalMask({queries.shape[1]}), and padding as key_lengths"
            )
        draw(self.feature_map, queries.device)
        return ops.causal_linear_attention(
            at_positions(self.feature_map, queries, query_lengths),
            at_positions(self.feature_map, keys, key_lengths),
            values,
            features_of(self.feature_map),
            key_mask=key_mask(key_lengths, keys),
            eps=self.eps,
        ).values

    def _go_on(
        self, queries: Tensor, keys: Tensor, values: Tensor, key_lengths: Any, state: Any
    ) -> tuple[Tensor, Any]:
        (draw if state is None else draw_once)(self.feature_map, queries.device)
        mask = key_mask(key_lengths, keys)
        if not needs_positions(self.feature_map):
            return self._absorb(queries, keys, values, mask, state)
        inner, position = PositionState.of(state)
        now = positions(position, keys.shape[1], mask)
        queries, keys = (with_positions(self.feature_map, x, now) for x in (queries, keys))
        out, inner = self._absorb(queries, keys, values, mask, inner)
        return out, PositionState(inner, add(position, keys.shape[1], mask))

    def _absorb(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, state: Any
    ) -> ops.Attended:
        features = features_of(self.feature_map)
        if mask is not None or exporting() or queries.shape[1] != 1:
            return ops.causal_linear_attention(
                queries, keys, values, features, key_mask=mask, state=state, eps=self.eps
            )
        q, k, v = queries[:, 0], keys[:, 0], values[:, 0]
        out = ops.linear_attention_step(q, k, v, features, state=state, eps=self.eps)
        return out._replace(values=out.values[:, None])
