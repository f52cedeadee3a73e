"""Attention of every query to every key, in linear time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ..feature_maps import draw, features_of, with_positions
from ..masking import as_mask
from .base import KernelAttention, key_mask


class LinearAttention(KernelAttention):
    """out_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps).

    "Transformers are RNNs" (Katharopoulos et al. 2020), equations 4 to 6.

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
            attn_mask: must keep everything, or be None.
            query_lengths: not used; padded queries give values that mean nothing.
            key_lengths: which keys are real, or None for all.

        Raises:
            RuntimeError: for an ``attn_mask`` that drops something.
        """
        if attn_mask is not None and not as_mask(attn_mask, "attn_mask").all_ones:
            raise RuntimeError(
                "LinearAttention does not support arbitrary attention masks: its sums over the "
                "keys are the same for every query; pass key_lengths for padding, use "
                "'causal-linear' for a causal mask, or 'full' for any mask"
            )
        draw(self.feature_map, queries.device)
        return ops.linear_attention(
            with_positions(self.feature_map, queries),
            with_positions(self.feature_map, keys),
            values,
            features_of(self.feature_map),
            key_mask=key_mask(key_lengths, keys),
            eps=self.eps,
        ).values
