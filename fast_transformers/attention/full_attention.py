"""Softmax attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..events import AttentionEvent
from ..masking import BaseMask, TriangularCausalMask, as_mask
from .base import SoftmaxAttention, key_mask


class FullAttention(SoftmaxAttention):
    """out_i = sum_j softmax_j(softmax_temp q_i.k_j) v_j.

    Runs on PyTorch's ``scaled_dot_product_attention``. Only when somebody listens for
    :class:`AttentionEvent` is the matrix of weights built, and dispatched after the dropout. A
    query without any key gives 0.

    Args: see :class:`~fast_transformers.attention.base.SoftmaxAttention`.
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
            attn_mask: (L, S), (N, L, S), (N, 1, L, S) or (N, H, L, S); None keeps everything.
            query_lengths: not used; padded queries give values that mean nothing.
            key_lengths: which keys are real, or None for all.

        Raises:
            ValueError: for an ``attn_mask`` of another shape.
        """
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
        temp = self.temperature(q)
        mask = None if attn_mask is None else as_mask(attn_mask, "attn_mask")
        padding = key_mask(key_lengths, keys)
        if self.event_dispatcher.wants(AttentionEvent, self):
            weights = self.dropout(softmax(temp * q @ k.mT, kept(mask, padding, q, k)))
            self.event_dispatcher.dispatch(AttentionEvent(self, weights))
            return (weights @ v).transpose(1, 2).contiguous()
        dropout = self.dropout.p if self.training else 0.0
        square = q.shape[2] == k.shape[2]
        if mask is not None and padding is None and square and is_causal(mask, q.shape[2]):
            out = scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=temp
            )
        else:
            keep = kept(mask, padding, q, k)
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=keep, dropout_p=dropout, scale=temp
            )
            if keep is not None:  # some backends average the values of a row without keys
                out = out.masked_fill(~keep.any(-1, keepdim=True), 0.0)
        return out.transpose(1, 2).contiguous()


def softmax(logits: Tensor, keep: Tensor | None) -> Tensor:
    """Softmax over the last dimension; 0 everywhere in a row that keeps nothing."""
    if keep is None:
        return logits.softmax(-1)
    weights = logits.masked_fill(~keep, torch.finfo(logits.dtype).min).softmax(-1)
    return weights.masked_fill(~keep, 0.0)


def is_causal(mask: BaseMask, length: int) -> bool:
    return isinstance(mask, TriangularCausalMask) and mask.max_len == length


def kept(mask: BaseMask | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Both masks as one bool tensor that broadcasts to (N, H, L, S), or None."""
    keep = None if padding is None else padding[:, None, None, :]
    if mask is None or mask.known_all_ones:
        return keep
    matrix = mask.bool_matrix.to(q.device)
    if matrix.ndim == 3:
        matrix = matrix[:, None]
    expected = (*q.shape[:3], k.shape[2])
    try:
        fits = torch.broadcast_shapes(matrix.shape, expected) == expected
    except RuntimeError:
        fits = False
    if not fits or matrix.shape[-2:] != expected[-2:]:
        if mask.all_ones:
            return keep
        raise ValueError(
            f"attn_mask must have shape (L, S) = {expected[-2:]}, or one that broadcasts to "
            f"(N, H, L, S) = {expected}, got {tuple(mask.shape)}; build it for these lengths"
        )
    return matrix if keep is None else matrix & keep
