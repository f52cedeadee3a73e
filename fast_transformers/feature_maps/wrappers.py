"""Maps made of other maps: what they share, and normalised ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from ..ops import Composition
from .adapt import build_feature_map, draw, features_of
from .base import FeatureMap, elu_feature_map, widen
from .random import RandomFeatureMap

Factory = Callable[[int], FeatureMap]


class Wrapper(FeatureMap):
    """Base of the maps that use others: drawn, resampled and calibrated together with them.

    Args:
        query_dimensions: E of what comes in.
        inners: the maps inside.

    Raises:
        TypeError: for an inner map that is no :class:`FeatureMap`.
        ValueError: for one that needs positions, which only the outermost map is given.
    """

    def __init__(self, query_dimensions: int, inners: Sequence[FeatureMap]) -> None:
        super().__init__(query_dimensions)
        for inner in inners:
            if not isinstance(inner, FeatureMap):
                raise TypeError(
                    f"{type(self).__name__} wraps feature maps that derive from FeatureMap, got "
                    f"{type(inner).__name__}"
                )
            if inner.positional:
                raise ValueError(
                    f"{type(inner).__name__} needs positions, so it must be outermost: wrap "
                    f"{type(self).__name__} in it instead"
                )
        self.inners = nn.ModuleList(inners)
        for name in ("exponential", "any_input", "drawn", "positive", "causal_safe"):
            setattr(self, name, all(getattr(inner, name) for inner in inners))
        self.random = any(inner.random for inner in inners)
        self._tell_heads_apart(*(inner.heads for inner in inners))

    def _tell_heads_apart(self, *heads: int | None) -> None:
        """Take note of parts that are kept per head; they must agree."""
        known = {count for count in (self.heads, *heads) if count is not None}
        if len(known) > 1:
            raise ValueError(
                f"heads must be the same in {type(self).__name__} and what it wraps, got "
                f"{' and '.join(map(str, sorted(known)))}"
            )
        self.heads = next(iter(known), None)
        self.any_input = self.any_input and self.heads is None

    @property
    def maps(self) -> list[FeatureMap]:
        """The maps inside."""
        return [inner for inner in self.inners if isinstance(inner, FeatureMap)]

    @property
    def inner(self) -> FeatureMap:
        """The map inside, if there is one only; else the first."""
        return self.maps[0]

    def _composed(
        self, queries: Callable[[Tensor], Tensor], keys: Callable[[Tensor], Tensor]
    ) -> Composition | None:
        """The map inside, if it has a formula, of functions of queries and keys."""
        inner = features_of(self.inner)
        return None if inner.formula is None else Composition(queries, keys, inner)

    def _handed(self, x: Tensor, given: Tensor) -> Tensor:
        """x, computed in float32 at least, as the inner map takes it: in the dtype of what was
        ``given``, if the map may have weights that want no other."""
        takes_any = self.inner.any_input or self.inner.heads is not None
        return x if takes_any else x.to(given.dtype)

    def new_feature_map(self, device: torch.device | None = None) -> None:
        for inner in self.maps:
            draw(inner, torch.device("cpu") if device is None else device)

    def resample(self, generator: Generator | None = None) -> None:
        """Draw the random maps inside now, one after the other."""
        for inner in self.maps:
            if isinstance(inner, RandomFeatureMap | Wrapper):
                inner.resample(generator)

    @property
    def has_statistics(self) -> bool:
        return any(inner.has_statistics for inner in self.maps)

    def _calibrate(self, queries: Tensor, keys: Tensor) -> None:
        for inner in self.maps:
            inner.calibrate(queries, keys)


class Normalized(Wrapper):
    """phi(x) / |phi(x)|, or phi(x / |x|).

    Features with a sum of 1 are those of Schlag et al. 2021 (arXiv:2102.11174), equation 29; keys
    of norm 1 those of DeltaNet, Yang et al. 2024 (arXiv:2406.06484); inputs of norm 1 keep the
    variance of random features bounded, Peng et al. 2021, "Random Feature Attention"
    (arXiv:2103.02143), section 3.1. What multiplies all features of a query cancels in attention.

    Args:
        query_dimensions: E.
        inner: factory of the map to normalise.
        norm: "l1" (sum of absolute values), "l2", or "rms" (root of the mean square).
        of: "features" or "inputs". Set the ``softmax_temp`` of the inner map for inputs.

    Raises:
        ValueError: for another ``norm`` or ``of``.
    """

    def __init__(
        self,
        query_dimensions: int,
        inner: Factory = elu_feature_map,
        norm: str = "l2",
        of: str = "features",
    ) -> None:
        if norm not in ("l1", "l2", "rms"):
            raise ValueError(f"norm must be l1, l2 or rms, got {norm!r}")
        if of not in ("features", "inputs"):
            raise ValueError(f"of must be features or inputs, got {of!r}")
        super().__init__(query_dimensions, [build_feature_map(inner, query_dimensions)])
        self.norm, self.of = norm, of

    @property
    def feature_dims(self) -> int:
        return self.inner.feature_dims

    def _calibrate(self, queries: Tensor, keys: Tensor) -> None:
        super()._calibrate(self._input(queries), self._input(keys))

    def forward_queries(self, x: Tensor) -> Tensor:
        return self._features(self.inner.forward_queries, self.inner.log_queries, x)

    def forward_keys(self, x: Tensor) -> Tensor:
        return self._features(self.inner.forward_keys, self.inner.log_keys, x)

    def _features(self, plain: Callable, log: Callable, x: Tensor) -> Tensor:
        if self.of == "features" and self.exponential:
            return self._log(log(x)).exp().to(x.dtype)
        phi = plain(self._input(x))
        return (phi if self.of == "inputs" else self._divide(phi)).to(x.dtype)

    def log_queries(self, x: Tensor) -> Tensor:
        return self._log(self.inner.log_queries(self._input(x)))

    def log_keys(self, x: Tensor) -> Tensor:
        return self._log(self.inner.log_keys(self._input(x)))

    def query_offset(self, x: Tensor) -> Tensor | float:
        return self.inner.query_offset(self._input(x)) if self.of == "inputs" else 0.0

    def composition(self) -> Composition | None:
        return self._composed(self._input, self._input) if self.of == "inputs" else None

    def _input(self, x: Tensor) -> Tensor:
        return x if self.of == "features" else self._divide(widen(x)).to(x.dtype)

    def _divide(self, x: Tensor) -> Tensor:
        size = x.abs().sum(-1, keepdim=True) if self.norm == "l1" else x.norm(dim=-1, keepdim=True)
        if self.norm == "rms":
            size = size * x.shape[-1] ** -0.5
        return x / size.masked_fill(size == 0, 1.0)

    def _log(self, log: Tensor) -> Tensor:
        """The logarithms of features divided by their norm."""
        if self.of == "inputs":
            return log
        if self.norm == "l1":
            return log.log_softmax(-1)
        normed = log - (2 * log).logsumexp(-1, keepdim=True) / 2
        return normed if self.norm == "l2" else normed + math.log(log.shape[-1]) / 2

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        if self.of == "inputs":
            return self.inner.kernel(self._input(x), self._input(y))
        if self.random:
            raise NotImplementedError("the mean of normalised random features is not known")
        return (self.forward_queries(x) * self.forward_keys(y)).sum(-1)

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        if self.of == "features":
            return super().relative_variance(x, y)
        return self.inner.relative_variance(self._input(x), self._input(y))
