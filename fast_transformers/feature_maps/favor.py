"""Positive random features of the softmax kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import Formula
from .random import RandomFeatureMap, split_in_pairs


class Favor(RandomFeatureMap):
    """phi(x) = [exp(w_i.x'), exp(-w_i.x')] exp(-|x'|^2/2) / sqrt(F), x' = sqrt(softmax_temp) x.

    FAVOR+ with hyperbolic features: positive and unbiased for exp(softmax_temp x.y), the kernel
    of softmax attention. Choromanski et al., "Rethinking Attention with Performers" (2021),
    lemma 1, the variant with hyperbolic cosines.

    The variance of the estimate grows like exp(|x' + y'|^2): with E = 64 and queries and keys of
    unit variance hundreds of features do not make it close to softmax attention, while a trained
    model adapts to the features it has.

    Args:
        query_dimensions: E.
        n_dims: F, even; None is E.
        softmax_temp: factor of the dot product; None is 1/sqrt(E).
        orthogonal: see :class:`RandomFeatureMap`.
        stabilize: accepted for older code. Attention always works with the logarithms of the
            features and is exact at any norm.
        redraw, deterministic_eval, generator: see :class:`RandomFeatureMap`.

    Raises:
        ValueError: for an ``n_dims`` that is odd or below 2.
    """

    exponential = True

    def __init__(
        self,
        query_dimensions: int,
        n_dims: int | None = None,
        softmax_temp: float | None = None,
        orthogonal: bool = True,
        stabilize: bool = True,
        redraw: int = 1,
        deterministic_eval: bool = True,
        generator: torch.Generator | int | None = None,
    ) -> None:
        self.n_dims = split_in_pairs("Favor", query_dimensions, n_dims)
        self.stabilize = stabilize
        super().__init__(
            query_dimensions, self.n_dims // 2, softmax_temp, orthogonal, redraw,
            deterministic_eval, generator,
        )  # fmt: skip

    @property
    def feature_dims(self) -> int:
        return self.n_dims

    def forward(self, x: Tensor) -> Tensor:
        """The features themselves; they overflow or vanish where their logarithms do not."""
        return self.log_keys(x).exp().to(x.dtype)

    def log_queries(self, x: Tensor) -> Tensor:
        u = self.project(x)[1]  # |x|^2 / 2 and the number of features cancel per query
        return torch.cat([u, -u], -1)

    def log_keys(self, x: Tensor) -> Tensor:
        x, u = self.project(x)
        offset = x.square().sum(-1, keepdim=True) / 2 + math.log(self.n_dims) / 2
        return torch.cat([u - offset, -u - offset], -1)

    def formula(self) -> Formula:
        return Formula("hyperbolic", self.omega, (self.softmax_temp,))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.softmax_temp * (x * y).sum(-1)).exp()
