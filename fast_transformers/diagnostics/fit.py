"""The trained part of a map, fitted to softmax attention on examples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..feature_maps import FeatureMap, RandomFeatureMap
from .sample import Sample, make_sample
from .weights import softmax_weights

FLOOR = 1e-12  # of a weight: one that is 0 would have an infinite gradient


def fit(
    feature_map: FeatureMap,
    q: Tensor,
    k: Tensor,
    *,
    attn_mask: Any = None,
    key_lengths: Any = None,
    softmax_temp: float | None = None,
    steps: int = 100,
    lr: float = 0.02,
) -> FeatureMap:
    """Train a map's parameters so that its attention is that of softmax, in place.

    Minimises -sum_j P_ij log W_ij, P the weights of softmax and W the map's: the distillation of
    Zhang et al. 2024, "The Hedgehog & the Porcupine" (arXiv:2402.04347), section 4.2, for any map
    with trained parameters. What is random in the map is drawn anew for every step, and put back
    at the end. Adam, with a cosine schedule, on one sequence after the other.

    Args:
        feature_map: a map without parameters is returned as it is.
        q: queries (N, L, H, E) of examples. k: their keys (N, S, H, E).
        attn_mask, key_lengths, softmax_temp: see
            :func:`~fast_transformers.diagnostics.attention_report`.
        steps: of gradient descent; 0 leaves the map as it is.
        lr: of the first step.

    Returns:
        The same map, in evaluation mode.

    Raises:
        ValueError: for a negative number of steps, or shapes that do not fit.
    """
    sample = make_sample(
        q, k, attn_mask=attn_mask, key_lengths=key_lengths, softmax_temp=softmax_temp
    )
    return fit_to(feature_map, sample, steps=steps, lr=lr)


def fit_to(
    feature_map: FeatureMap, examples: Sample, *, steps: int, lr: float = 0.02
) -> FeatureMap:
    """:func:`fit` of a sample."""
    if steps < 0 or not lr > 0:
        raise ValueError(f"steps must be at least 0 and lr positive, got {steps} and {lr}")
    trained = [p for p in feature_map.parameters() if p.requires_grad]
    if not trained or not steps:
        return feature_map.eval()
    random = [m for m in feature_map.modules() if isinstance(m, RandomFeatureMap)]
    drawn = [m.omega.clone() for m in random]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(trained, lr=lr)
    count = examples.q.shape[0]
    with torch.enable_grad():
        for step in range(steps):
            for part in random:
                part.resample(generator)
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            one = examples.sequences(slice(step % count, step % count + 1))
            loss = cross_entropy(feature_map, one)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        for part, omega in zip(random, drawn, strict=True):
            part.omega.copy_(omega)
    return feature_map.eval()


def cross_entropy(feature_map: Any, sample: Sample) -> Tensor:
    """Mean over the queries of -sum_j P_ij log W_ij, differentiable in the map's parameters."""
    exact, shown = softmax_weights(sample).to(sample.q.dtype), sample.shown()
    exponential = getattr(feature_map, "exponential", False)
    names = ("log_queries", "log_keys") if exponential else ("forward_queries", "forward_keys")
    q, k = sample.q, sample.k
    if getattr(feature_map, "positional", False):
        q, k = feature_map.add_positions(q), feature_map.add_positions(k)
    b, a = (getattr(feature_map, n)(x).transpose(1, 2) for n, x in zip(names, (q, k), strict=True))
    if exponential:
        # factors that cancel, as in weights.py: no gradient goes through them
        shift = a.detach().amax(2, keepdim=True)
        b = b + shift
        b, a = (b - b.detach().amax(-1, keepdim=True)).exp(), (a - shift).exp()
    weights = (b @ a.mT).masked_fill(~shown, 0.0).clamp(min=FLOOR)
    log = weights.log() - weights.sum(-1, keepdim=True).log()
    rows = shown.any(-1)
    return -((exact * log).sum(-1) * rows).sum() / (rows.expand(exact.shape[:-1]).sum())
