"""Sketches of polynomial kernels of high degree."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from .base import widen
from .polynomial import SymmetricPower
from .projections import fill_
from .random import RandomFeatureMap, redraw_

_OTHER_STREAM = 2**61  # keeps the seeds of the mixers apart from those of omega


class PolySketch(RandomFeatureMap):
    """phi(x) = p(S(x)): squares of a sketch S, with S(x).S(y) unbiased for (x'.y')^(degree/2).

        S_1(x) = x',   S_2k(x) = (S_k(x) G * S'_k(x) G') / sqrt(sketch),   p(s).p(t) = (s.t)^2

    with Gaussian G and G' of ``sketch`` columns, and S', S independent. Kacham, Mirrokni and Zhong
    2023, "PolySketchFormer" (arXiv:2310.01655), the non-negative sketch: weights cannot be
    negative, whereas those of an unbiased sketch of the whole degree can, and then denominators
    vanish. The square raises the mean by the variance of the sketch; :meth:`kernel` includes
    that. The paper does not pack the products, sketch^2 of them.

    Args:
        query_dimensions: E.
        sketch: r; r (r + 1)/2 features.
        degree: 4, 8 or 16 (for 2, :class:`~.polynomial.PolynomialFeatureMap` is exact).
        softmax_temp: factor of the dot product; None is 1/sqrt(E).
        normalize: bring inputs to mean 0 and variance 1 over their entries, as the paper does.
        projection, redraw, deterministic_eval, generator: see :class:`RandomFeatureMap`. S stays
            unbiased with any projection, while the mean of its square is known for "iid" alone.

    Raises:
        ValueError: for a ``sketch`` below 1 or so large that the features are more than 2^18, or
            another ``degree``.
    """

    positive = True
    mixers: Tensor

    def __init__(
        self,
        query_dimensions: int,
        sketch: int = 16,
        degree: int = 4,
        softmax_temp: float | None = None,
        normalize: bool = True,
        projection: str = "iid",
        redraw: int = 1,
        deterministic_eval: bool = True,
        generator: Generator | int | None = None,
    ) -> None:
        if degree not in (4, 8, 16):
            raise ValueError(f"degree of PolySketch must be 4, 8 or 16, got {degree}")
        if sketch < 1:
            raise ValueError(f"sketch must be at least 1, got {sketch}")
        if isinstance(generator, int):
            generator = Generator().manual_seed(generator)
        square = SymmetricPower(sketch, 2)
        self.parts = degree // 2
        super().__init__(
            query_dimensions, self.parts * sketch, softmax_temp, projection, redraw,
            deterministic_eval, generator,
        )  # fmt: skip
        self.sketch_dims, self.degree, self.normalize = sketch, degree, normalize
        self.square = square
        # the Gs of S_4 and beyond, sketch x sketch each, side by side
        self.register_buffer("mixers", torch.empty(sketch, (self.parts - 2) * sketch))
        self._fill_mixers(generator)

    @property
    def feature_dims(self) -> int:
        return self.square.features

    def _redraw(self) -> None:
        if self.mixers.numel():
            redraw_(
                self.mixers, self.calls.clone(), self.seed + _OTHER_STREAM, self.redraw, "iid", 1
            )
        super()._redraw()

    def resample(self, generator: Generator | None = None) -> None:
        super().resample(generator)
        self._fill_mixers(generator)

    def _fill_mixers(self, generator: Generator | None) -> None:
        if self.mixers.numel():
            fill_(self.mixers, "iid", generator)

    def sketch(self, x: Tensor) -> Tensor:
        """S of ``degree``/2: (..., E) to (..., sketch), in float32 at least."""
        u = self.project(self._normalized(x))[1].unflatten(-1, (self.parts, self.sketch_dims))
        mixers = (
            self.mixers.to(u.dtype).unflatten(1, (-1, self.sketch_dims))
            if (self.parts > 2)
            else None
        )
        used = 0
        while True:
            u = u[..., 0::2, :] * u[..., 1::2, :] * self.sketch_dims**-0.5
            count = u.shape[-2]
            if count == 1 or mixers is None:
                return u[..., 0, :]
            u = torch.einsum("...ci,icj->...cj", u, mixers[:, used : used + count])
            used += count

    def _normalized(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(widen(x), x.shape[-1:]) if self.normalize else x

    def forward(self, x: Tensor) -> Tensor:
        return self.square(self.sketch(x)).to(x.dtype)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """E (S(x).S(y))^2 for independent directions: (x'.y')^degree and a variance of order 1/r.

        By the fourth moments of Gaussian vectors: with m and n the means of (S_k(x).S_k(y))^2
        and of |S_k(x)|^2 |S_k(y)|^2, those of S_2k are (n + 2 m)^2 / r + (1 - 1/r) m^2, and the
        same with n^2 in place of m^2.

        Raises:
            NotImplementedError: for another projection.
        """
        if self.projection != "iid":
            raise NotImplementedError(
                f"the kernel of PolySketch is known for projection='iid', not {self.projection!r}"
            )
        x, y = (self.scaled(self._normalized(v)) for v in (x, y))
        m = (x * y).sum(-1).square()
        n = x.square().sum(-1) * y.square().sum(-1)
        for _ in range(self.parts.bit_length() - 1):
            same = (n + 2 * m).square() / self.sketch_dims
            m, n = (same + (1 - 1 / self.sketch_dims) * v.square() for v in (m, n))
        return m
