"""Exponentials of the entries themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Formula
from .base import FeatureMap, widen
from .heads import check_heads, hold, leading

_SLOPE, _INTERCEPT = 0.148552, -0.354870  # a and b of the moment matching, fitted in the paper


class ExponentialFeatureMap(FeatureMap):
    """phi(x) = exp(scale x), element by element, or its softmax over the features.

    The exponential map that Zhang et al. 2024, "The Hedgehog & the Porcupine" (arXiv:2402.04347),
    section 3, study as phi_t: spiky, but not monotone in the dot product. A softmax over the
    features of queries changes nothing, as a factor per query cancels; one over the features of
    keys is a modelling choice. (Shen et al. 2018, "Efficient Attention" (arXiv:1812.01243),
    section 3.2, take the softmax of keys over the sequence, which looks at future tokens.)

    Args:
        query_dimensions: E, which is also the number of features.
        scale: t.
        softmax: phi(x) = softmax(scale x).
    """

    exponential = True
    any_input = True
    drawn = True
    positive = True

    def __init__(self, query_dimensions: int, scale: float = 1.0, softmax: bool = False) -> None:
        super().__init__(query_dimensions)
        self.scale, self.softmax = scale, softmax

    @property
    def feature_dims(self) -> int:
        return self.query_dimensions

    def forward(self, x: Tensor) -> Tensor:
        return self.log_keys(x).exp().to(x.dtype)

    def log_queries(self, x: Tensor) -> Tensor:
        return self.log_keys(x)

    def log_keys(self, x: Tensor) -> Tensor:
        x = widen(x) * self.scale
        return x.log_softmax(-1) if self.softmax else x

    def formula(self) -> Formula | None:
        return Formula("logarithm") if self.scale == 1 and not self.softmax else None

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return (self(x) * self(y)).sum(-1)


class LogNormal(FeatureMap):
    """phi(q) = exp(alpha q), phi(k) = exp(beta k), element by element; LLN attention.

    Nahshan et al. 2023, "Linear Log-Normal Attention with Unbiased Concentration"
    (arXiv:2311.13541), its moment matching: alpha and beta are chosen so that the logarithms of
    the weights vary as those of softmax attention do,

        alpha = s / std(q),  beta = s / std(k),  s^2 = (std(q)^2 std(k)^2 - b) / (2 a)

    with the fitted constants a = 0.148552, b = -0.354870. Matches moments; estimates no kernel.
    The paper's code takes the deviations over the whole batch, future tokens included; here they
    are those of :meth:`calibrate`, and 1 before.

    Args:
        query_dimensions: E, which is also the number of features.
        heads: H, for an alpha and a beta of each head; None for one of all heads.
        learned: whether alpha and beta are trained.
    """

    exponential = True
    drawn = True
    positive = True
    fitted_buffers = ("alpha", "beta")
    alpha: Tensor
    beta: Tensor

    def __init__(
        self, query_dimensions: int, heads: int | None = None, learned: bool = False
    ) -> None:
        super().__init__(query_dimensions)
        self.heads, self.any_input = heads, heads is None
        of_unit_deviation = ((1 - _INTERCEPT) / (2 * _SLOPE)) ** 0.5
        for name in ("alpha", "beta"):
            hold(self, name, torch.full((*leading(heads), 1), of_unit_deviation), learned)

    @property
    def feature_dims(self) -> int:
        return self.query_dimensions

    @torch.no_grad()
    def _calibrate(self, queries: Tensor, keys: Tensor) -> None:
        """Set alpha and beta by the deviations of examples (..., H, E) around their mean."""
        deviations = []
        for x in (queries, keys):
            if self.heads is not None:
                check_heads(x, self.heads)
                deviations.append(x.double().movedim(-2, 0).flatten(1).std(1, keepdim=True))
            else:
                deviations.append(x.double().std()[None])
        of_queries, of_keys = deviations
        s = (((of_queries * of_keys).square() - _INTERCEPT) / (2 * _SLOPE)).sqrt()
        self.alpha.copy_(s / of_queries)
        self.beta.copy_(s / of_keys)

    def forward_queries(self, x: Tensor) -> Tensor:
        return self.log_queries(x).exp().to(x.dtype)

    def forward_keys(self, x: Tensor) -> Tensor:
        return self.log_keys(x).exp().to(x.dtype)

    def log_queries(self, x: Tensor) -> Tensor:
        return self._times(x, self.alpha)

    def log_keys(self, x: Tensor) -> Tensor:
        return self._times(x, self.beta)

    def _times(self, x: Tensor, factor: Tensor) -> Tensor:
        if self.heads is not None:
            check_heads(x, self.heads)
        x = widen(x)
        return x * factor.to(x.dtype)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.forward_queries(x) * self.forward_keys(y)).sum(-1)
