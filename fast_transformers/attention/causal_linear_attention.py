"""Attention of every query to the keys up to it, in linear time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ..causal_product import causal_dot_product
from ..feature_maps import draw, features_of, with_positions
from ..masking import as_mask
from .base import KernelAttention, key_mask


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

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attn_mask: Any,
        query_lengths: Any,
        key_lengths: Any,
    ) -> Tensor:
        """(N, L, H, E), (N, S, H, E), (N, S, H, M) to (N, L, H, M).

        Args:
            attn_mask: must be lower triangular; it may be larger than the inputs and on another
                device.
            query_lengths: not used; padded queries give values that mean nothing.
            key_lengths: which keys are real, or None for all.

        Raises:
            RuntimeError: for an ``attn_mask`` that is not lower triangular.
        """
        if attn_mask is None or not as_mask(attn_mask, "attn_mask").lower_triangular:
            raise RuntimeError(
                "CausalLinearAttention only supports full lower triangular masks; pass "
                f"attn_mask=TriangularCausalMask({queries.shape[1]}), and padding as key_lengths"
            )
        draw(self.feature_map, queries.device)
        return ops.causal_linear_attention(
            with_positions(self.feature_map, queries),
            with_positions(self.feature_map, keys),
            values,
            features_of(self.feature_map),
            key_mask=key_mask(key_lengths, keys),
            eps=self.eps,
        ).values
