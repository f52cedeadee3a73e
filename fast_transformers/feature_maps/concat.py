"""Maps side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .adapt import build_feature_map
from .wrappers import Factory, Wrapper


class Concat(Wrapper):
    """[sqrt(w_1) phi_1(x), sqrt(w_2) phi_2(x), ...]: the kernel is the weighted sum of kernels.

    Exponential if all of the maps are; then it is exact at any norm, as they are.

    Args:
        query_dimensions: E.
        inners: factories of the maps.
        weights: positive factors of the kernels; None is 1 for each.

    Raises:
        ValueError: for no map, or weights that are not as many positive numbers.
    """

    def __init__(
        self,
        query_dimensions: int,
        inners: Sequence[Factory],
        weights: Sequence[float] | None = None,
    ) -> None:
        if not inners:
            raise ValueError("inners must be one map at least, got none")
        weights = [1.0] * len(inners) if weights is None else list(weights)
        if len(weights) != len(inners) or not all(w > 0 for w in weights):
            raise ValueError(
                f"weights must be {len(inners)} positive numbers, one for each map, got {weights}"
            )
        super().__init__(
            query_dimensions, [build_feature_map(inner, query_dimensions) for inner in inners]
        )
        self.weights = weights

    @property
    def feature_dims(self) -> int:
        return sum(inner.feature_dims for inner in self.maps)

    def forward_queries(self, x: Tensor) -> Tensor:
        return self._joined([inner.forward_queries(x) for inner in self.maps])

    def forward_keys(self, x: Tensor) -> Tensor:
        return self._joined([inner.forward_keys(x) for inner in self.maps])

    def _joined(self, parts: list[Tensor]) -> Tensor:
        pairs = zip(parts, self.weights, strict=True)
        return torch.cat([phi * weight**0.5 for phi, weight in pairs], -1)

    def log_queries(self, x: Tensor) -> Tensor:
        """With the offset of each map: they differ from map to map, and do not cancel."""
        return self._added([inner.log_queries(x) + inner.query_offset(x) for inner in self.maps])

    def log_keys(self, x: Tensor) -> Tensor:
        return self._added([inner.log_keys(x) for inner in self.maps])

    def _added(self, logs: list[Tensor]) -> Tensor:
        pairs = zip(logs, self.weights, strict=True)
        return torch.cat([log + math.log(weight) / 2 for log, weight in pairs], -1)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.maps, self.weights, strict=True)
        return sum((weight * inner.kernel(x, y) for inner, weight in pairs), torch.zeros(()))

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        """That of independent maps."""
        pairs = zip(self.maps, self.weights, strict=True)
        variances = (
            (weight * inner.kernel(x, y)).square() * inner.relative_variance(x, y)
            for inner, weight in pairs
        )
        return sum(variances, torch.zeros(())) / self.kernel(x, y).square()
