"""Attention of every query to every key, in linear time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ..feature_maps import draw, features_of
from ..feature_maps.adapt import needs_positions
from ..masking import as_mask
from ..ops.choose import exporting
from ..state import CrossLinearState, PositionState
from ..state.parts import add
from .base import KernelAttention, at_positions, key_mask, sum_up


class LinearAttention(KernelAttention):
    """out_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps).

    "Transformers are RNNs" (Katharopoulos et al. 2020), equations 4 to 6.

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
        state: CrossLinearState | PositionState | None = None,
        return_state: bool = False,
    ) -> Any:
        """(N, L, H, E), (N, S, H, E), (N, S, H, M) to (N, L, H, M).

        Args:
            attn_mask: must keep everything, or be None.
            query_lengths: not used; padded queries give values that mean nothing.
            key_lengths: which keys are real, or None for all.
            state: what :meth:`remember` returned; keys, values and masks are not looked at then.
            return_state: return the pair of values and the state, which stays as it is.

        Raises:
            RuntimeError: for an ``attn_mask`` that drops something; without a memory's state,
                for ``return_state``.
        """
        if isinstance(state, PositionState):
            inner, start = state
            queries = at_positions(self.feature_map, queries, query_lengths, start)
            more = add(start, queries.shape[1], key_mask(query_lengths, queries))
            values, state = self._attend(queries, inner), PositionState(inner, more)
            return (values, state) if return_state else values
        if isinstance(state, CrossLinearState):
            values = self._attend(queries, state)
            return (values, state) if return_state else values
        if return_state or state is not None:
            raise RuntimeError(
                "LinearAttention lets every query see the keys to come, so no state can go on "
                "from them; use 'causal-linear', or 'full'"
            )
        if attn_mask is not None and not as_mask(attn_mask, "attn_mask").all_ones:
            raise RuntimeError(
                "LinearAttention does not support arbitrary attention masks: its sums over the "
                "keys are the same for every query; pass key_lengths for padding, use "
                "'causal-linear' for a causal mask, or 'full' for any mask"
            )
        draw(self.feature_map, queries.device)
        return ops.linear_attention(
            at_positions(self.feature_map, queries, query_lengths),
            at_positions(self.feature_map, keys, key_lengths),
            values,
            features_of(self.feature_map),
            key_mask=key_mask(key_lengths, keys),
            eps=self.eps,
        ).values

    def remember(
        self, keys: Tensor, values: Tensor, key_lengths: Any
    ) -> CrossLinearState | PositionState:
        """The state of a memory (N, S, H, E), (N, S, H, M), for queries that come later."""
        draw(self.feature_map, keys.device)
        sums = sum_up(self.feature_map, keys, values, key_lengths)
        return PositionState(sums) if needs_positions(self.feature_map) else sums

    def _attend(self, queries: Tensor, state: CrossLinearState) -> Tensor:
        features = features_of(self.feature_map)
        if queries.shape[1] == 1 and not exporting():
            query = queries[:, 0]
            out = ops.linear_attention_step(query, None, None, features, state=state, eps=self.eps)
            return out.values[:, None]
        n, _, _, width = queries.shape
        keys = queries.new_empty(n, 0, state.z.shape[1], width)
        values = queries.new_empty(n, 0, state.z.shape[1], state.kv.shape[-1])
        return ops.linear_attention(
            queries, keys, values, features, state=state, eps=self.eps
        ).values
