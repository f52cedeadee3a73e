"""Softmax attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..events import AttentionEvent
from ..masking import BaseMask, TriangularCausalMask, as_mask
from ..ops.choose import exporting
from ..state import KeysValues, Memory
from ..state.parts import positions
from .base import SoftmaxAttention, check_causal, key_mask


class FullAttention(SoftmaxAttention):
    """out_i = sum_j softmax_j(softmax_temp q_i.k_j) v_j.

    Runs on PyTorch's ``scaled_dot_product_attention``. Only when somebody listens for
    :class:`AttentionEvent` is the matrix of weights built, and dispatched after the dropout. A
    query without any key gives 0.

    Args: see :class:`~fast_transformers.attention.base.SoftmaxAttention`.
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
        state: KeysValues | Memory | Sequence[Tensor] | None = None,
        return_state: bool = False,
    ) -> Any:
        """(N, L, H, E), (N, S, H, E), (N, S, H, M) to (N, L, H, M).

        Args:
            attn_mask: (L, S), (N, L, S), (N, 1, L, S) or (N, H, L, S); None keeps everything.
                With a state, None or lower triangular, which are the same then.
            query_lengths: not used; padded queries give values that mean nothing.
            key_lengths: which keys are real, or None for all.
            state: what an earlier call returned, which the keys follow, or the older library's
                pair [keys, values]; or what :meth:`remember` returned, and no keys and values.
            return_state: return the pair of values and the new state, S = L.

        Raises:
            ValueError: for an ``attn_mask`` of another shape.
        """
        if isinstance(state, Memory):
            keep = None if state.mask is None else state.mask[:, None, None, :]
            q, k, v = (x.transpose(1, 2) for x in (queries, *state[:]))
            out = self._attend(q, k, v, keep)
            return (out, state) if return_state else out
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
        padding = key_mask(key_lengths, keys)
        if return_state or state is not None:
            check_causal(attn_mask, "FullAttention")
            past = None if state is None else KeysValues.of(state)
            now = go_on(past, q, k, v, padding)
            causal = past is None and padding is None
            keep = None if causal else visible(past, now, q.shape[2], padding)
            k, v = now[:]
            out = self._attend(q, k, v, keep, causal=causal and q.shape[2] > 1)
            return (out, now) if return_state else out
        mask = None if attn_mask is None else as_mask(attn_mask, "attn_mask")
        square = q.shape[2] == k.shape[2]
        if mask is not None and padding is None and square and is_causal(mask, q.shape[2]):
            return self._attend(q, k, v, None, causal=True)
        return self._attend(q, k, v, kept(mask, padding, q, k))

    def remember(self, keys: Tensor, values: Tensor, key_lengths: Any) -> Memory:
        """The state of a memory (N, S, H, E), (N, S, H, M), for queries that come later."""
        return Memory(keys, values, key_mask(key_lengths, keys))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, causal: bool = False
    ) -> Tensor:
        """(N, H, L, E), (N, H, S, E), (N, H, S, M) to (N, L, H, M); ``causal`` asks for L = S."""
        temp, dtype = self.temperature(q), q.dtype
        q = q.to(k.dtype)  # of a cache that was filled in another dtype
        if self.event_dispatcher.wants(AttentionEvent, self):
            if causal:
                keep = _triangle(q.shape[2], k.shape[2], q)
            weights = self.dropout(softmax(temp * q @ k.mT, keep))
            self.event_dispatcher.dispatch(AttentionEvent(self, weights))
            return (weights @ v).transpose(1, 2).contiguous().to(dtype)
        dropout = self.dropout.p if self.training else 0.0
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=keep, dropout_p=dropout, is_causal=causal, scale=temp
        )
        if keep is not None:  # some backends average the values of a row without keys
            out = out.masked_fill(~keep.any(-1, keepdim=True), 0.0)
        return out.transpose(1, 2).contiguous().to(dtype)


def go_on(
    past: KeysValues | None, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None
) -> KeysValues:
    """The state after L more tokens (N, H, L, ...), which later gradients may flow through."""
    if past is None and padding is None:
        return KeysValues(k, v)
    past = KeysValues(k[:, :, :0], v[:, :, :0]) if past is None else past
    seen = (q, k, v, *past[:])
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in seen)
    return past.append(k, v, padding, copy=trains or torch.compiler.is_compiling() or exporting())


def visible(
    past: KeysValues | None, now: KeysValues, length: int, padding: Tensor | None
) -> Tensor | None:
    """Which keys of a state each of its last ``length`` tokens sees, as a bool tensor that
    broadcasts to (N, H, L, S); None for all."""
    if now.lengths is None:
        return None if length == 1 else _triangle(length, now.length, now.key_buffer)
    start = now.counts() * 0 if past is None else past.counts()
    at = positions(start, length, padding)
    assert isinstance(at, Tensor)
    return (torch.arange(now.length, device=at.device) <= at[..., None])[:, None]


def _triangle(queries: int, keys: int, like: Tensor) -> Tensor:
    """(queries, keys) bool: the last query sees all keys, the one before all but the last."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=like.device)
    return ones.tril(keys - queries)


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
