"""This library and PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fast_transformers
from fast_transformers import ops
from fast_transformers.attention import CausalLinearAttention, LinearAttention
from fast_transformers.feature_maps import (
    ActivationFunctionFeatureMap,
    Favor,
    FeatureMap,
    GeneralizedRandomFeatures,
    RandomFourierFeatures,
    SmoothedRandomFourierFeatures,
    elu_feature_map,
    features_of,
)
from fast_transformers.masking import FullMask, TriangularCausalMask
from fast_transformers.recurrent.attention import RecurrentLinearAttention

from . import model
from .decoding import CachedJob, DecodeJob
from .jobs import DIM, AttentionJob, Job

ABOUT = {
    "torch": torch.__version__,
    "fast-transformers": fast_transformers.__version__,
}

FEATURES = 256
SEED = 0
MAPS: dict[str, Callable[[int], FeatureMap]] = {
    "elu+1": elu_feature_map,
    "relu": ActivationFunctionFeatureMap.factory(torch.relu),
    "Favor 256": Favor.factory(n_dims=FEATURES, generator=SEED),
    "Fourier 256": RandomFourierFeatures.factory(n_dims=FEATURES, generator=SEED),
    "smoothed Fourier 257": SmoothedRandomFourierFeatures.factory(
        n_dims=FEATURES + 1, generator=SEED
    ),
    "generalized 256": GeneralizedRandomFeatures.factory(n_dims=FEATURES, generator=SEED),
}


def linear(map: str, causal: bool, length: int, omega: Tensor | None = None, **shape: Any) -> Job:
    """Attention with a feature map, as a module in evaluation mode: nothing is redrawn."""
    kind = CausalLinearAttention if causal else LinearAttention
    attention = kind(DIM, MAPS[map]).eval()
    _set_omega(attention.feature_map, omega)
    mask = TriangularCausalMask(length) if causal else FullMask(length)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask, None, None)

    return AttentionJob(attend, length=length, **shape)


def _set_omega(feature_map: Any, omega: Tensor | None) -> None:
    if omega is not None:
        feature_map.load_state_dict({"omega": omega})


def softmax(causal: bool, **shape: Any) -> Job:
    """PyTorch's scaled_dot_product_attention on transposed views."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        values = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return values.transpose(1, 2)

    return AttentionJob(attend, **shape)


def decode(map: str, batch: int, omega: Tensor | None = None) -> Job:
    """One token of the recurrent module."""
    attention = RecurrentLinearAttention(DIM, MAPS[map]).eval()
    _set_omega(attention.feature_map, omega)
    return DecodeJob(attention, batch)


def step(map: str, batch: int, omega: Tensor | None = None, inplace: bool = False) -> Job:
    """One token of the function ``ops.linear_attention_step``."""
    feature_map = MAPS[map](DIM).eval()
    _set_omega(feature_map, omega)
    with torch.no_grad():  # gradients would have it copy the random matrix
        features = features_of(feature_map)

    def one(q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        return ops.linear_attention_step(q, k, v, features, state=state, inplace=inplace)

    return DecodeJob(one, batch)


def cached(batch: int, length: int) -> Job:
    """PyTorch's attention of one query over a cache."""
    return CachedJob(functional.scaled_dot_product_attention, batch, length)


TASKS: dict[str, Callable[..., Job]] = {
    "linear": linear,
    "softmax": softmax,
    "decode": decode,
    "step": step,
    "step in place": partial(step, inplace=True),
    "cached": cached,
    **model.TASKS,
}
