"""The feature maps that the tests of attentions and models run through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fast_transformers.feature_maps import (
    Favor,
    FeatureMap,
    GeneralizedRandomFeatures,
    RandomFourierFeatures,
    SmoothedRandomFourierFeatures,
    elu_feature_map,
)


class Asymmetric(FeatureMap):
    """A user's map: trained weights, other features for queries than for keys, F != E."""

    def __init__(self, query_dims: int) -> None:
        super().__init__(query_dims)
        self.of_queries = nn.Linear(query_dims, 11)
        self.of_keys = nn.Linear(query_dims, 11)

    def forward_queries(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(self.of_queries(x))

    def forward_keys(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(self.of_keys(x)) + 0.1


BUILT_IN = {
    "elu": elu_feature_map,
    "favor": Favor.factory(n_dims=16),
    "rff": RandomFourierFeatures.factory(n_dims=64),
    "smoothed": SmoothedRandomFourierFeatures.factory(n_dims=9),
    "generalized": GeneralizedRandomFeatures.factory(n_dims=16),
}
ALL = {**BUILT_IN, "asymmetric": Asymmetric}
