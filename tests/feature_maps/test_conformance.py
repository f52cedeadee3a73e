"""Every built-in map, and maps as users write them, through the conformance suite."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from fast_transformers.feature_maps import (
    ActivationFunctionFeatureMap,
    Favor,
    FeatureMap,
    GeneralizedRandomFeatures,
    RandomFourierFeatures,
    SmoothedRandomFourierFeatures,
    elu_feature_map,
)
from fast_transformers.testing import check_feature_map
from tests.maps import CATALOGUE, PROJECTED

BUILT_IN = {
    "default": None,
    "elu": elu_feature_map,
    "relu": ActivationFunctionFeatureMap.factory(torch.relu),
    "activation module": lambda dims: ActivationFunctionFeatureMap(dims, nn.PReLU()),
    "rff": RandomFourierFeatures,
    "rff, orthogonal": RandomFourierFeatures.factory(n_dims=40, orthogonal=True),
    "smoothed": SmoothedRandomFourierFeatures,
    "smoothed, odd": functools.partial(SmoothedRandomFourierFeatures, n_dims=33, smoothing=0.3),
    "favor": Favor,
    "favor, independent": Favor.factory(n_dims=64, orthogonal=False, softmax_temp=0.5),
    "generalized": GeneralizedRandomFeatures,
    "generalized, wide": GeneralizedRandomFeatures.factory(n_dims=50, softmax_temp=None),
    "generalized, tanh": GeneralizedRandomFeatures.factory(kernel_fn=torch.sigmoid),
    **CATALOGUE,
    **PROJECTED,
}


class AsymmetricTrained(FeatureMap):
    """Only the two sides are defined, each with weights; as the feature-map document prints it."""

    def __init__(self, query_dimensions: int) -> None:
        super().__init__(query_dimensions)
        self.q = nn.Linear(query_dimensions, 24)
        self.k = nn.Linear(query_dimensions, 24)

    def new_feature_map(self) -> None:
        pass

    def forward_queries(self, x: Tensor) -> Tensor:
        return self.q(x).sigmoid()

    def forward_keys(self, x: Tensor) -> Tensor:
        return self.k(x).exp()


class OlderRandom(nn.Module):
    """The older library's style: no base class, a buffer registered anew at each draw."""

    def __init__(self, query_dimensions: int) -> None:
        super().__init__()
        self.query_dims = query_dimensions
        self.register_buffer("w", torch.zeros(query_dimensions, 20))

    def new_feature_map(self, device: torch.device) -> None:
        if self.training or not self.w.any():
            self.register_buffer("w", torch.randn(self.query_dims, 20, device=device).to(self.w))

    def forward_queries(self, x: Tensor) -> Tensor:
        return (x @ self.w).relu() + 0.1

    forward_keys = forward_queries


class TrainedExponential(FeatureMap):
    """Hedgehog-like: the exponential protocol with weights, in a user's hands."""

    exponential = True

    def __init__(self, query_dimensions: int) -> None:
        super().__init__(query_dimensions)
        self.w = nn.Linear(query_dimensions, query_dimensions)

    def log_queries(self, x: Tensor) -> Tensor:
        return torch.cat([self.w(x), -self.w(x)], -1)

    log_keys = log_queries

    def forward(self, x: Tensor) -> Tensor:
        return self.log_keys(x).exp()


class PerHead(FeatureMap):
    """Weights for each head: depends on heads being the last dimension but one."""

    def __init__(self, query_dimensions: int) -> None:
        super().__init__(query_dimensions)
        self.w = nn.Parameter(torch.randn(query_dimensions, 6))

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
        return (x @ self.w * scale).sigmoid()


USERS = [AsymmetricTrained, OlderRandom, TrainedExponential, PerHead]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in(name: str) -> None:
    check_feature_map(BUILT_IN[name])


@pytest.mark.parametrize("factory", USERS, ids=lambda f: f.__name__)
def test_users(factory) -> None:
    check_feature_map(factory)


class Broken(FeatureMap):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def _leaks(x: Tensor) -> Tensor:
    return (x - x.amax(1, keepdim=True)).exp() if x.ndim == 4 else x.exp()


class WrongScale(Favor):
    def log_keys(self, x: Tensor) -> Tensor:
        return super().log_keys(x) + 0.1

    def log_queries(self, x: Tensor) -> Tensor:
        return super().log_queries(x)


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (type("A", (Broken,), {"forward_keys": lambda s, x: x[..., 1:]}), "keys must become"),
        (lambda d: ActivationFunctionFeatureMap(d, _leaks), "first tokens, alone"),
        (type("B", (Broken,), {"kernel": lambda s, x, y: (x * y).sum(-1)}), "on average"),
        (WrongScale.factory(n_dims=64), "on average"),
    ],
)
def test_the_suite_fails_broken_maps(broken, sentence) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_feature_map(broken)
