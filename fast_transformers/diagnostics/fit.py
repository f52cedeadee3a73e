"""What a map knows of its inputs, fitted to softmax attention on examples with any mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..feature_maps import FeatureMap
from ..feature_maps.fitting import fit_weights
from .sample import make_sample


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
    """Move a map's parameters and statistics so that its weights are softmax's, in place.

    Calibrate the map first: this goes on from there. See
    :func:`~fast_transformers.feature_maps.fitting.fit_weights` for how it is done; without a mask
    ``feature_map.calibrate(q, k, fit_steps=...)`` does both.

    Args:
        feature_map: a map with nothing to fit is returned as it is.
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
    return fit_weights(
        feature_map,
        sample.q,
        sample.k,
        keep=sample.keep,
        softmax_temp=sample.softmax_temp,
        steps=steps,
        lr=lr,
    )
