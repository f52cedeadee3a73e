"""Maps of fewer dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Composition
from .adapt import build_feature_map
from .base import widen
from .heads import TwoSides
from .polynomial import TaylorFeatureMap
from .wrappers import Factory, Wrapper


class Projected(Wrapper):
    """phi(x W): a map of fewer dimensions, with trained projections of queries and of keys.

    What Arora et al. 2024, Based (arXiv:2402.18668), section 4.1, put in front of the Taylor
    series, whose features are quadratic in the dimensions; it also lowers the variance of random
    features, which is exponential in them. W starts with orthonormal columns, the same for both.

    Args:
        query_dimensions: E.
        inner: factory of the map, called with ``dim``.
        dim: dimensions of the projection.
        heads: H, for a W of each head; None for one of all heads.
        tied: whether queries and keys share W.

    Raises:
        ValueError: for a ``dim`` or ``heads`` below 1.
    """

    def __init__(
        self,
        query_dimensions: int,
        inner: Factory = TaylorFeatureMap,
        dim: int = 16,
        heads: int | None = None,
        tied: bool = False,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        super().__init__(query_dimensions, [build_feature_map(inner, dim)])
        self._tell_heads_apart(heads)
        self.linear = TwoSides(query_dimensions, dim, heads, False, "orthonormal", tied=tied)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let the projections of queries and keys start alike."""
        if self.linear.keys is not None:
            self.linear.keys.weight.copy_(self.linear.queries.weight)

    @property
    def feature_dims(self) -> int:
        return self.inner.feature_dims

    @torch.no_grad()
    def _calibrate(self, queries: Tensor, keys: Tensor) -> None:
        super()._calibrate(self._queries(queries), self._keys(keys))

    def _queries(self, x: Tensor) -> Tensor:
        return self._handed(self.linear.of_queries(widen(x)), x)

    def _keys(self, x: Tensor) -> Tensor:
        return self._handed(self.linear.of_keys(widen(x)), x)

    def forward_queries(self, x: Tensor) -> Tensor:
        return self.inner.forward_queries(self._queries(x)).to(x.dtype)

    def forward_keys(self, x: Tensor) -> Tensor:
        return self.inner.forward_keys(self._keys(x)).to(x.dtype)

    def log_queries(self, x: Tensor) -> Tensor:
        return self.inner.log_queries(self._queries(x))

    def log_keys(self, x: Tensor) -> Tensor:
        return self.inner.log_keys(self._keys(x))

    def query_offset(self, x: Tensor) -> Tensor | float:
        return self.inner.query_offset(self._queries(x))

    def composition(self) -> Composition | None:
        return self._composed(self._queries, self._keys)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner.kernel(self._queries(x), self._keys(y))

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner.relative_variance(self._queries(x), self._keys(y))
