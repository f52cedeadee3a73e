"""The matrix of weights of an attention: of any feature map, of softmax, and all alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.full_attention import softmax
from ..feature_maps import FeatureMap
from .sample import Sample, make_sample

SMALLEST = 1e-200  # of the sum of a row's weights, relative to the largest term of any row
CHUNK = 2**22  # elements (rows, S, F) of the slow form


def attention_map(
    feature_map: Any,
    q: Tensor,
    k: Tensor,
    *,
    attn_mask: Any = None,
    key_lengths: Any = None,
    rows: int | slice | Sequence[int] | Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The weights W_ij = phi(q_i).phi(k_j) / (sum_j phi(q_i).phi(k_j) + eps) that values get.

    What linear attention multiplies values by, which it never forms itself. Works for any map
    and any mask, in float64, and is exact for exponential features of any norm (to which no
    ``eps`` is added, as in attention). A query without keys has weights 0.

    Args:
        feature_map: a map, used as it is: nothing is drawn.
        q: (N, L, H, E). k: (N, S, H, E), or fewer heads that each serve several of the queries'.
        attn_mask: (L, S), (N, L, S), (N, 1, L, S) or (N, H, L, S); None keeps everything.
        key_lengths: which keys are real, or None for all.
        rows: which queries, default all.
        eps: see :func:`fast_transformers.ops.linear_attention`.

    Returns:
        (N, H, rows, S) in float64.

    Raises:
        ValueError: for shapes that do not fit each other, or inputs that are not finite.

    >>> from fast_transformers.feature_maps import Favor
    >>> from fast_transformers.masking import TriangularCausalMask
    >>> q, k = torch.randn(2, 1, 100, 4, 16)
    >>> attention_map(Favor(16), q, k, attn_mask=TriangularCausalMask(100), rows=[5, 99]).shape
    torch.Size([1, 4, 2, 100])
    """
    sample = make_sample(q, k, attn_mask=attn_mask, key_lengths=key_lengths)
    return linear_weights(feature_map, sample, rows=rows, eps=eps)


def softmax_weights(sample: Sample) -> Tensor:
    """(N, H, L, S) of softmax attention, in float64."""
    return softmax(logits_of(sample), sample.keep)


def uniform_weights(sample: Sample) -> Tensor:
    """(N, H, L, S) of attention that looks at all keys alike, in float64."""
    shape = (sample.q.shape[0], sample.q.shape[2], sample.q.shape[1], sample.k.shape[1])
    shown = sample.shown().double().expand(shape)
    return shown / shown.sum(-1, keepdim=True).clamp(min=1)


def logits_of(sample: Sample) -> Tensor:
    """softmax_temp q.k, (N, H, L, S) in float64."""
    q, k = (x.transpose(1, 2).double() for x in (sample.q, sample.k))
    return sample.temperature * (q @ k.mT)


@torch.no_grad()
def linear_weights(
    feature_map: Any,
    sample: Sample,
    *,
    rows: int | slice | Sequence[int] | Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """:func:`attention_map` of a sample."""
    exponential = bool(getattr(feature_map, "exponential", False))
    b = encode(feature_map, sample.q, of_keys=False)
    a = encode(feature_map, sample.k, of_keys=True)
    shown = sample.shown()
    if rows is not None:
        index = torch.arange(b.shape[2], device=b.device)
        picked = index[rows].reshape(-1)
        b, shown = b[:, :, picked], shown[:, :, picked]
    weights = _exponential(b, a, shown) if exponential else (b @ a.mT).masked_fill(~shown, 0.0)
    total = weights.sum(-1, keepdim=True) + (0.0 if exponential else eps)
    return weights / total.masked_fill(total == 0, torch.inf)


@torch.no_grad()
def encode(feature_map: Any, x: Tensor, *, of_keys: bool) -> Tensor:
    """phi of (N, length, H, E) as (N, H, length, F) in float64; log(phi) if exponential."""
    part = "keys" if of_keys else "queries"
    exponential = getattr(feature_map, "exponential", False)
    function = getattr(feature_map, f"log_{part}" if exponential else f"forward_{part}")
    if isinstance(feature_map, FeatureMap) and feature_map.positional:
        x = feature_map.add_positions(x)
    return function(x.to(input_dtype(feature_map))).transpose(1, 2).double()


def input_dtype(feature_map: Any) -> torch.dtype:
    """The most precise dtype that the map's functions take: float64, or that of its weights."""
    if getattr(feature_map, "any_input", False) or not isinstance(feature_map, nn.Module):
        return torch.float64
    own = [*feature_map.parameters(), *feature_map.buffers()]
    return next((t.dtype for t in own if t.is_floating_point()), torch.float64)


def _exponential(b: Tensor, a: Tensor, shown: Tensor) -> Tensor:
    """exp(b) exp(a)^T, every row up to a factor of its own, from the logarithms.

    A factor taken out of every feature of the keys, and one out of every query, leave terms of
    at most 1, the largest of which is 1, so what underflows is below 1e-300 of the row. Rows that
    do not see the keys those factors belong to are summed by logsumexp instead.
    """
    shift = a.amax(2, keepdim=True)
    queries = b + shift
    queries = (queries - queries.amax(-1, keepdim=True)).exp()
    weights = (queries @ (a - shift).exp().mT).masked_fill(~shown, 0.0)
    lost = (weights.sum(-1) < SMALLEST) & shown.any(-1)
    if lost.any():
        place = lost.nonzero()
        step = max(CHUNK // max(a.shape[2] * a.shape[3], 1), 1)
        for n, h, row in (part.unbind(1) for part in place.split(step)):
            logs = (b[n, h, row][:, None] + a[n, h]).logsumexp(-1)
            seen = shown.expand(*weights.shape)[n, h, row]
            logs = logs.masked_fill(~seen, -torch.inf)
            weights[n, h, row] = (logs - logs.amax(-1, keepdim=True)).exp()
    return weights
