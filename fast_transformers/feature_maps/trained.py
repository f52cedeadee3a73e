"""Maps with trained weights, as conversions of softmax models use them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Composition, Features, Formula
from .base import FeatureMap, widen
from .heads import TwoSides


class _Linear(FeatureMap):
    """Base of the maps that begin with a linear layer of their own, of queries and of keys."""

    drawn = True
    positive = True

    def __init__(
        self,
        query_dimensions: int,
        width: int,
        heads: int | None,
        bias: bool,
        tied: bool,
        initial: str,
    ) -> None:
        super().__init__(query_dimensions)
        self.heads, self.any_input = heads, heads is None
        self.linear = TwoSides(query_dimensions, width, heads, bias, initial, tied=tied)
        self.width = width

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.forward_queries(x) * self.forward_keys(y)).sum(-1)


class T2R(_Linear):
    """phi(x) = relu(x W + b).

    Kasai et al. 2021, "Finetuning Pretrained Transformers into RNNs" (arXiv:2103.13076), section
    2.2. A token with no positive feature attends to nothing, and gets 0.

    Args:
        query_dimensions: E.
        n_dims: F; None is E.
        heads: H, for a W and b of each head, as in the paper; None for one of all heads.
        bias: whether there is a b.
        tied: whether queries and keys share W and b, as in the paper.

    Raises:
        ValueError: for an ``n_dims`` or ``heads`` below 1.
    """

    def __init__(
        self,
        query_dimensions: int,
        n_dims: int | None = None,
        heads: int | None = None,
        bias: bool = True,
        tied: bool = True,
    ) -> None:
        features = query_dimensions if n_dims is None else n_dims
        if features < 1:
            raise ValueError(f"n_dims of T2R must be at least 1, got {features}")
        super().__init__(query_dimensions, features, heads, bias, tied, "uniform")

    @property
    def feature_dims(self) -> int:
        return self.width

    def forward_queries(self, x: Tensor) -> Tensor:
        return self.linear.of_queries(widen(x)).relu().to(x.dtype)

    def forward_keys(self, x: Tensor) -> Tensor:
        return self.linear.of_keys(widen(x)).relu().to(x.dtype)

    def formula(self) -> Formula | None:
        """relu of one projection; a b, or a W for some only, is computed before the kernels."""
        one = self.linear.queries
        if self.heads is not None or self.linear.keys is not None or one.bias is not None:
            return None
        return Formula("projected_relu", one.weight, (1.0,))

    def composition(self) -> Composition | None:
        of_queries, of_keys = self.linear.of_queries, self.linear.of_keys
        relu = Features(torch.relu, torch.relu, any_heads=True, formula=Formula("relu"))
        return Composition(lambda x: of_queries(widen(x)), lambda x: of_keys(widen(x)), relu)


class Hedgehog(_Linear):
    """phi(x) = [exp(u), exp(-u)], u = x W + b, perhaps normalised; W = 1, b = 0 at first.

    Zhang et al. 2024, "The Hedgehog & the Porcupine" (arXiv:2402.04347), section 4.2. Spiky and
    monotone in the dot product, if trained to mimic softmax attention. How features are
    normalised matters for keys: these are three different kernels.

    Args:
        query_dimensions: E; 2 E features.
        normalize: "softmax", [softmax(u), softmax(-u)] (the paper's stable form, and that of
            Zhang et al. 2024, "LoLCATs", arXiv:2410.10254); "joint", softmax([u, -u]); or "none".
        heads: H, for a W and b of each head, as in the paper; None for one of all heads.
        bias: whether there is a b.
        tied: whether queries and keys share W and b.

    Raises:
        ValueError: for another ``normalize``, or ``heads`` below 1.
    """

    exponential = True

    def __init__(
        self,
        query_dimensions: int,
        normalize: str = "softmax",
        heads: int | None = None,
        bias: bool = True,
        tied: bool = False,
    ) -> None:
        if normalize not in ("softmax", "joint", "none"):
            raise ValueError(f"normalize must be softmax, joint or none, got {normalize!r}")
        super().__init__(query_dimensions, query_dimensions, heads, bias, tied, "identity")
        self.normalize = normalize

    @property
    def feature_dims(self) -> int:
        return 2 * self.width

    def forward_queries(self, x: Tensor) -> Tensor:
        return self.log_queries(x).exp().to(x.dtype)

    def forward_keys(self, x: Tensor) -> Tensor:
        return self.log_keys(x).exp().to(x.dtype)

    def log_queries(self, x: Tensor) -> Tensor:
        return self._both_signs(self.linear.of_queries(widen(x)))

    def log_keys(self, x: Tensor) -> Tensor:
        return self._both_signs(self.linear.of_keys(widen(x)))

    def _both_signs(self, u: Tensor) -> Tensor:
        if self.normalize == "softmax":
            return torch.cat([u.log_softmax(-1), (-u).log_softmax(-1)], -1)
        both = torch.cat([u, -u], -1)
        return both.log_softmax(-1) if self.normalize == "joint" else both
