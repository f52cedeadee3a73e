"""Positive random features of the softmax kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import Formula
from .random import RandomFeatureMap, projection_of, split_in_pairs


class Favor(RandomFeatureMap):
    """phi(x) = [exp(w_i.x'), exp(-w_i.x')] exp(-|x'|^2/2) / sqrt(F), x' = sqrt(softmax_temp) x.

    FAVOR+ with hyperbolic features: positive and unbiased for exp(softmax_temp x.y), the kernel
    of softmax attention. Choromanski et al., "Rethinking Attention with Performers" (2021),
    lemma 1 and its equation 7, the variant with hyperbolic cosines.

    The variance of the estimate grows like exp(|x' + y'|^2): with E = 64 and queries and keys of
    unit variance hundreds of features do not make it close to softmax attention, while a trained
    model adapts to the features it has.

    Args:
        query_dimensions: E.
        n_dims: F, even; None is E.
        softmax_temp: factor of the dot product; None is 1/sqrt(E).
        orthogonal: the older way to say ``projection``: "orthogonal", or "iid" if False.
        stabilize: accepted for older code. Attention always works with the logarithms of the
            features and is exact at any norm.
        redraw, deterministic_eval, generator, projection: see :class:`RandomFeatureMap`.

    Raises:
        ValueError: for an ``n_dims`` that is odd or below 2.
    """

    exponential = True
    positive = True
    estimates = "softmax"

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
        projection: str | None = None,
    ) -> None:
        self.n_dims = split_in_pairs("Favor", query_dimensions, n_dims)
        self.stabilize = stabilize
        super().__init__(
            query_dimensions, self.n_dims // 2, softmax_temp,
            projection_of(orthogonal, projection), redraw, deterministic_eval, generator,
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
        offset = self._offset(x)
        return torch.cat([u + offset, offset - u], -1)

    def query_offset(self, x: Tensor) -> Tensor:
        return self._offset(self.scaled(x))

    def _offset(self, x: Tensor) -> Tensor:
        return -x.square().sum(-1, keepdim=True) / 2 - math.log(self.n_dims) / 2

    def formula(self) -> Formula:
        return Formula("hyperbolic", self.omega, (self.softmax_temp,))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.softmax_temp * (x * y).sum(-1)).exp()

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        """(cosh |x' + y'|^2 - 1) / (F/2): lemma 2 of the paper, equation 8."""
        exponent = self.softmax_temp * (x + y).square().sum(-1)
        return (exponent.cosh() - 1) / (self.n_dims // 2)
