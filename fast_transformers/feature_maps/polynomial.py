"""Exact features of polynomials of the dot product."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import torch
from torch import Tensor, nn

from .base import FeatureMap, widen

MOST_FEATURES = 2**18


class SymmetricPower(nn.Module):
    """x to the products of ``degree`` of its entries, each once: p(x).p(y) = (x.y)^degree.

    C(E + degree - 1, degree) features; a product that stands for several orders of its factors
    is weighed by the root of their number.

    Raises:
        ValueError: for a degree below 1, or more than 2^18 features.
    """

    indices: Tensor
    orders: Tensor

    def __init__(self, dims: int, degree: int) -> None:
        super().__init__()
        if degree < 1:
            raise ValueError(f"degree must be at least 1, got {degree}")
        self.dims, self.degree = dims, degree
        if self.features > MOST_FEATURES:
            raise ValueError(
                f"degree {degree} of {dims} dimensions has {self.features} products, more than "
                f"{MOST_FEATURES}; lower the degree, or project to fewer dimensions first"
            )
        # functions of the sizes alone: no part of a checkpoint
        self.register_buffer(
            "indices", torch.empty(degree, self.features, dtype=torch.int64), persistent=False
        )
        self.register_buffer(
            "orders", torch.empty(self.features, dtype=torch.int64), persistent=False
        )
        self.reset_parameters()

    @property
    def features(self) -> int:
        return math.comb(self.dims + self.degree - 1, self.degree)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the table of products, after a construction that left it empty."""
        rows = list(itertools.combinations_with_replacement(range(self.dims), self.degree))
        orders = [_orders(row) for row in rows]
        self.indices.copy_(torch.tensor(rows, device="cpu").mT)
        self.orders.copy_(torch.tensor(orders, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        product = x[..., self.indices[0]]
        for factor in self.indices[1:].unbind():
            product = product * x[..., factor]
        return product * self.orders.to(x.dtype).sqrt()


def _orders(factors: tuple[int, ...]) -> int:
    """In how many orders the factors of a product can be written."""
    repeats = (math.factorial(count) for count in Counter(factors).values())
    return math.factorial(len(factors)) // math.prod(repeats)


class TaylorFeatureMap(FeatureMap):
    """phi(x) = [1, x', p(x')/sqrt(2)], the Taylor series of exp up to (x'.y')^2 / 2.

    x' = sqrt(softmax_temp) x, and p holds the products of two entries, each once. Arora et al.
    2024, "Simple linear attention language models balance the recall-throughput tradeoff" (Based,
    arXiv:2402.18668), section 4.1 and equation 4, which does not pack them. The kernel
    1 + z + z^2/2 is at least 1/2: close to exp for |z| below 1, never close to 0, and not monotone
    below z = -1. Centre the queries and keys (:class:`~.centered.Centered`) to make z small.

    Args:
        query_dimensions: E.
        order: 1 or 2. The series of order 1, 1 + z, may be negative.
        softmax_temp: factor of the dot product; None is 1/sqrt(E).

    Raises:
        ValueError: for another ``order``, or a negative ``softmax_temp``.
    """

    any_input = True
    drawn = True
    estimates = "softmax"

    def __init__(
        self, query_dimensions: int, order: int = 2, softmax_temp: float | None = None
    ) -> None:
        super().__init__(query_dimensions)
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order}")
        self.order = order
        self.positive = order == 2
        self.softmax_temp = _temperature(softmax_temp, query_dimensions)
        self.square = SymmetricPower(query_dimensions, 2) if order == 2 else None

    @property
    def feature_dims(self) -> int:
        squares = 0 if self.square is None else self.square.features
        return 1 + self.query_dimensions + squares

    def forward(self, x: Tensor) -> Tensor:
        scaled = widen(x) * self.softmax_temp**0.5
        parts = [torch.ones_like(scaled[..., :1]), scaled]
        if self.square is not None:
            parts.append(self.square(scaled) * 0.5**0.5)
        return torch.cat(parts, -1).to(x.dtype)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.softmax_temp * (x * y).sum(-1)
        return 1 + z if self.order == 1 else 1 + z + z.square() / 2


class PolynomialFeatureMap(FeatureMap):
    """phi(x).phi(y) = (softmax_temp x.y)^degree, by all products of ``degree`` entries.

    Symmetric powers: the kernel of which theorem 1.1 of Kacham et al. 2023, "PolySketchFormer"
    (arXiv:2310.01655), is a sketch, and degrees of 4 and more match softmax attention there. Even
    degrees cannot tell x from -x; of odd ones the kernel may be negative.

    Args:
        query_dimensions: E.
        degree: p; C(E + p - 1, p) features.
        softmax_temp: factor of the dot product; None is 1/sqrt(E).

    Raises:
        ValueError: for a degree below 1, a negative ``softmax_temp``, or more than 2^18 features.
    """

    any_input = True
    drawn = True

    def __init__(
        self, query_dimensions: int, degree: int = 2, softmax_temp: float | None = None
    ) -> None:
        super().__init__(query_dimensions)
        self.softmax_temp = _temperature(softmax_temp, query_dimensions)
        self.power = SymmetricPower(query_dimensions, degree)
        self.positive = degree % 2 == 0

    @property
    def feature_dims(self) -> int:
        return self.power.features

    def forward(self, x: Tensor) -> Tensor:
        return self.power(widen(x) * self.softmax_temp**0.5).to(x.dtype)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.softmax_temp * (x * y).sum(-1)) ** self.power.degree


class ReBased(FeatureMap):
    """phi(q).phi(k) = (q'.k')^2 / E, x' = gamma * norm(x) + beta, with gamma, beta of each side.

    Aksenov et al. 2024, "Linear Transformers with Learnable Kernel Functions are Better In-Context
    Models" (arXiv:2402.10644), section 4, whose equations have no numbers: unlike Taylor's series
    the square can reach 0, at an angle that is learned. norm(x) has mean 0 and variance 1 over the
    entries.

    Args:
        query_dimensions: E; E (E + 1)/2 features.
        beta: where every beta starts. From 0 the kernel cannot tell x from -x at first; from 1
            it starts as (norm(q).norm(k) + E)^2 / E, which rises with the dot product everywhere.
        tied: whether queries and keys share gamma and beta.
    """

    any_input = True
    drawn = True
    positive = True

    def __init__(self, query_dimensions: int, beta: float = 0.0, tied: bool = False) -> None:
        super().__init__(query_dimensions)
        self.initial_beta, self.tied = beta, tied
        sides = 1 if tied else 2
        self.gamma = nn.Parameter(torch.empty(sides, query_dimensions))
        self.beta = nn.Parameter(torch.empty(sides, query_dimensions))
        self.square = SymmetricPower(query_dimensions, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gamma)
        nn.init.constant_(self.beta, self.initial_beta)

    @property
    def feature_dims(self) -> int:
        return self.square.features

    def forward_queries(self, x: Tensor) -> Tensor:
        return self._square(self._affine(x, 0)).to(x.dtype)

    def forward_keys(self, x: Tensor) -> Tensor:
        return self._square(self._affine(x, -1)).to(x.dtype)

    def _square(self, x: Tensor) -> Tensor:
        return self.square(x) * self.query_dimensions**-0.5

    def _affine(self, x: Tensor, side: int) -> Tensor:
        x = nn.functional.layer_norm(widen(x), (self.query_dimensions,))
        return x * self.gamma[side].to(x.dtype) + self.beta[side].to(x.dtype)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        product = self._affine(x, 0) * self._affine(y, -1)
        return product.sum(-1).square() / self.query_dimensions


def _temperature(softmax_temp: float | None, dims: int) -> float:
    if softmax_temp is None:
        return dims**-0.5
    if softmax_temp < 0:
        raise ValueError(f"softmax_temp must not be negative, got {softmax_temp}")
    return softmax_temp
