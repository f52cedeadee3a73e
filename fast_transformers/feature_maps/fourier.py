"""Trigonometric random features of the Gaussian (RBF) kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import Formula
from .random import RandomFeatureMap, projection_of, split_in_pairs


def _gaussian_kernel(x: Tensor, y: Tensor, softmax_temp: float) -> Tensor:
    return (-softmax_temp * (x - y).square().sum(-1) / 2).exp()


def _variance(x: Tensor, y: Tensor, softmax_temp: float, directions: int) -> Tensor:
    """(1 - exp(-d))^2 / 2 per direction, d = |x' - y'|^2."""
    distance = softmax_temp * (x - y).square().sum(-1)
    return (-distance).expm1().square() / (2 * directions)


def _trigonometric(u: Tensor) -> Tensor:
    return torch.cat([u.cos(), u.sin()], -1) / math.sqrt(u.shape[-1])


class RandomFourierFeatures(RandomFeatureMap):
    """phi(x) = sqrt(2/F) [cos(w_i.x'), sin(w_i.x')], x' = sqrt(softmax_temp) x.

    Unbiased for the kernel exp(-softmax_temp |x - y|^2 / 2). Rahimi and Recht, "Random Features
    for Large-Scale Kernel Machines" (2007), algorithm 1. Features have either sign, so the
    denominator of the attention may cross zero: prefer :class:`Favor`.

    Args:
        query_dimensions: E.
        n_dims: F, even; None is E.
        softmax_temp, redraw, deterministic_eval, generator, projection: see
            :class:`RandomFeatureMap`.
        orthogonal: the older way to say ``projection``: "orthogonal", or "iid" if False.

    Raises:
        ValueError: for an ``n_dims`` that is odd or below 2.
    """

    estimates = "gaussian"

    def __init__(
        self,
        query_dimensions: int,
        n_dims: int | None = None,
        softmax_temp: float | None = None,
        orthogonal: bool = False,
        redraw: int = 1,
        deterministic_eval: bool = True,
        generator: torch.Generator | int | None = None,
        projection: str | None = None,
    ) -> None:
        self.n_dims = split_in_pairs("RandomFourierFeatures", query_dimensions, n_dims)
        super().__init__(
            query_dimensions, self.n_dims // 2, softmax_temp,
            projection_of(orthogonal, projection), redraw, deterministic_eval, generator,
        )  # fmt: skip

    @property
    def feature_dims(self) -> int:
        return self.n_dims

    def forward(self, x: Tensor) -> Tensor:
        return _trigonometric(self.project(x)[1]).to(x.dtype)

    def formula(self) -> Formula:
        return Formula("fourier", self.omega, (self.softmax_temp,))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return _gaussian_kernel(x, y, self.softmax_temp)

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        """exp(d) (1 - exp(-d))^2 / F, d = |x' - y'|^2.

        Choromanski et al. 2021, "Rethinking Attention with Performers", equation 8, whose first
        line is that of the softmax kernel.
        """
        variance = _variance(x, y, self.softmax_temp, self.omega.shape[1])
        return variance / self.kernel(x, y).square()


class SmoothedRandomFourierFeatures(RandomFeatureMap):
    """phi(x) = [cos(w_i.x'), sin(w_i.x')] / sqrt(K) and sqrt(smoothing), K = (F - 1)/2.

    Unbiased for the Gaussian kernel of :class:`RandomFourierFeatures` plus ``smoothing``, which
    keeps the denominator of the attention away from zero. In no paper: it comes from the library
    of "Transformers are RNNs" (2020).

    Args:
        query_dimensions: E.
        n_dims: most features to use; None is E. One is the constant and the others come in
            pairs, so an even ``n_dims`` gives ``n_dims - 1`` features (see ``feature_dims``),
            scaled for the number there is.
        smoothing: what is added to the kernel; its root is the constant feature. (The older
            library added ``smoothing**2``.)
        softmax_temp, redraw, deterministic_eval, generator, projection: see
            :class:`RandomFeatureMap`.
        orthogonal: the older way to say ``projection``: "orthogonal", or "iid" if False.

    Raises:
        ValueError: for an ``n_dims`` below 3 or a negative ``smoothing``.
    """

    def __init__(
        self,
        query_dimensions: int,
        n_dims: int | None = None,
        softmax_temp: float | None = None,
        orthogonal: bool = False,
        smoothing: float = 1.0,
        redraw: int = 1,
        deterministic_eval: bool = True,
        generator: torch.Generator | int | None = None,
        projection: str | None = None,
    ) -> None:
        self.n_dims = query_dimensions if n_dims is None else n_dims
        if self.n_dims < 3:
            raise ValueError(
                "n_dims of SmoothedRandomFourierFeatures must be at least 3, a pair and the "
                f"constant, got {self.n_dims}"
            )
        if smoothing < 0:
            raise ValueError(f"smoothing is added to the kernel: it must be >= 0, got {smoothing}")
        self.smoothing = smoothing
        self.positive = smoothing >= 1  # a mean of cosines is at least -1
        super().__init__(
            query_dimensions, (self.n_dims - 1) // 2, softmax_temp,
            projection_of(orthogonal, projection), redraw, deterministic_eval, generator,
        )  # fmt: skip

    @property
    def feature_dims(self) -> int:
        return 2 * ((self.n_dims - 1) // 2) + 1

    def forward(self, x: Tensor) -> Tensor:
        phi = _trigonometric(self.project(x)[1])
        constant = phi.new_full((*phi.shape[:-1], 1), math.sqrt(self.smoothing))
        return torch.cat([phi, constant], -1).to(x.dtype)

    def formula(self) -> Formula:
        return Formula("smoothed_fourier", self.omega, (self.softmax_temp, self.smoothing))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return _gaussian_kernel(x, y, self.softmax_temp) + self.smoothing

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        """That of :class:`RandomFourierFeatures`, of a larger kernel."""
        variance = _variance(x, y, self.softmax_temp, self.omega.shape[1])
        return variance / self.kernel(x, y).square()
