"""Queries and keys moved to their means, which changes the weights of no query."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapt import build_feature_map
from .base import widen
from .favor import Favor
from .heads import check_heads, hold, leading
from .moments import Moments
from .wrappers import Factory, Wrapper


class Centered(Wrapper):
    """phi(q - a) for queries and exp(t a.(k - b)) phi(k - b) for keys, t = ``softmax_temp``.

    Exact for every map of the softmax kernel, by

        exp(t q.k) = exp(t (q - a).(k - b)) exp(t a.(k - b)) exp(t q.b)

    whose last factor is one number per query and cancels in attention. What is estimated stays
    the same; with a and b at the means of queries and keys the vectors that the inner map sees
    are smaller, and so are the variances of random features and the error of a Taylor series.

    The factor that cancels is part of features that are exponentials, which attention sees as
    logarithms. Of others, such as those of a Taylor series, and of their kernel, it is left out:
    it could make a denominator overflow, or as small as the ``eps`` that is added to it.

    a and b are 0 at first. :meth:`calibrate` sets them to the means of examples (and calibrates
    the inner map on the centred ones); ``learned`` trains them from there; or write to them. Never
    do they follow the tokens of a call, so causal attention may use them.

    Args:
        query_dimensions: E.
        inner: factory of a map with ``estimates = "softmax"``.
        heads: H, for an a and b of each head; None for one of all heads. (Keys then need H heads
            as well.)
        learned: whether a and b are trained.

    Attributes:
        of_queries: a, (E) or (H, E).
        of_keys: b, (E) or (H, E).

    Raises:
        ValueError: for an inner map of another kernel, or ``heads`` below 1.
    """

    estimates = "softmax"
    fitted_buffers = ("of_queries", "of_keys")
    of_queries: Tensor
    of_keys: Tensor

    def __init__(
        self,
        query_dimensions: int,
        inner: Factory = Favor,
        heads: int | None = None,
        learned: bool = False,
    ) -> None:
        made = build_feature_map(inner, query_dimensions)
        super().__init__(query_dimensions, [made])
        if made.estimates != "softmax":
            raise ValueError(
                "Centered is exact for maps that estimate the softmax kernel, such as Favor or "
                f"TaylorFeatureMap; {type(made).__name__} does not"
            )
        self._tell_heads_apart(heads)
        for name in ("of_queries", "of_keys"):
            hold(self, name, torch.zeros(*leading(heads), query_dimensions), learned)

    @property
    def softmax_temp(self) -> float:
        """That of the inner map."""
        return self.inner.softmax_temp  # type: ignore[return-value]

    @property
    def feature_dims(self) -> int:
        return self.inner.feature_dims

    @property
    def has_statistics(self) -> bool:
        return True

    @torch.no_grad()
    def _calibrate(self, queries: Tensor, keys: Tensor) -> None:
        """Set a and b to the means of examples (..., H, E), and calibrate the inner map."""
        heads = self.heads if self.of_queries.ndim == 2 else None
        self.of_queries.copy_(Moments.of(queries, heads).mean)
        self.of_keys.copy_(Moments.of(keys, heads).mean)
        self.inner.calibrate(self._queries(queries)[0], self._keys(keys)[0])

    def _minus(self, x: Tensor, center: Tensor) -> Tensor:
        if center.ndim == 2:
            check_heads(x, len(center))
        x = widen(x)
        return x - center.to(x.dtype)

    def _queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q - a, and the logarithm t q.b of what cancels, or 0 where that is left out."""
        shifted = self._minus(x, self.of_queries)
        b = self.of_keys.to(shifted.dtype)
        temp = self.softmax_temp if self.exponential else 0.0
        return self._handed(shifted, x), temp * (widen(x) * b).sum(-1, keepdim=True)

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """k - b, and the logarithm t a.(k - b) of the weight of the key."""
        shifted = self._minus(x, self.of_keys)
        a = self.of_queries.to(shifted.dtype)
        log_weight = self.softmax_temp * (shifted * a).sum(-1, keepdim=True)
        return self._handed(shifted, x), log_weight

    def forward_queries(self, x: Tensor) -> Tensor:
        shifted, log_weight = self._queries(x)
        return (self.inner.forward_queries(shifted) * log_weight.exp()).to(x.dtype)

    def forward_keys(self, x: Tensor) -> Tensor:
        shifted, log_weight = self._keys(x)
        return (self.inner.forward_keys(shifted) * log_weight.exp()).to(x.dtype)

    def log_queries(self, x: Tensor) -> Tensor:
        return self.inner.log_queries(self._queries(x)[0])

    def query_offset(self, x: Tensor) -> Tensor:
        shifted, log_weight = self._queries(x)
        return self.inner.query_offset(shifted) + log_weight

    def log_keys(self, x: Tensor) -> Tensor:
        shifted, log_weight = self._keys(x)
        return self.inner.log_keys(shifted) + log_weight

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        (x, of_query), (y, of_key) = self._queries(x), self._keys(y)
        return self.inner.kernel(x, y) * (of_query + of_key).squeeze(-1).exp()

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        """That of the inner map between x - a and y - b."""
        return self.inner.relative_variance(self._queries(x)[0], self._keys(y)[0])
