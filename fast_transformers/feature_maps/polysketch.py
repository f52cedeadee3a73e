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
    2023, "PolySketchFormer" (arXiv:2310.01655), algorithm 1 and theorem 1.1, the non-negative
    sketch: weights cannot be negative, whereas those of an unbiased sketch of the whole degree
    can, and then denominators vanish. The square raises the mean by the variance of the sketch;
    :meth:`kernel` includes that. The paper does not pack the products, sketch^2 of them.

    Args:
        query_dimensions: E.
        sketch: r; r (r + 1)/2 features.
        degree: 4, 8 or 16 (for 2, :class:`~.polynomial.PolynomialFeatureMap` is exact).
        softmax_temp: factor of the dot product; None is 1/sqrt(E).
        normalize: bring inputs to mean 0 and variance 1 over their entries, as the paper does.
        projection, redraw, deterministic_eval, generator: see :class:`RandomFeatureMap`. S stays
            unbiased with any projection; the mean of its square is not known for "sorf" and "qmc".

    Raises:
        ValueError: for a ``sketch`` below 1 or so large that the features are more than 2^18, or
            another ``degree``.
    """

    positive = True
    drawn_buffers = ("omega", "mixers")
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
            counter = self.calls.clone(), self.known, self.seed
            redraw_(self.mixers, *counter, _OTHER_STREAM, self.redraw, "iid", 1)
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
        mixers = self.mixers.to(u.dtype).unflatten(1, (self.parts - 2, self.sketch_dims))
        while True:
            u = u[..., 0::2, :] * u[..., 1::2, :] * self.sketch_dims**-0.5
            count = u.shape[-2]
            if count == 1:
                return u[..., 0, :]
            u = torch.einsum("...ci,icj->...cj", u, mixers[:, :count])
            mixers = mixers[:, count:]

    def _normalized(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(widen(x), x.shape[-1:]) if self.normalize else x

    def forward(self, x: Tensor) -> Tensor:
        return self.square(self.sketch(x)).to(x.dtype)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """E (S(x).S(y))^2: (x'.y')^degree and, mostly upwards, a bias of order 1/r.

        By the fourth moments of the directions: with m and n the means of (S_k(x).S_k(y))^2 and
        of |S_k(x)|^2 |S_k(y)|^2, those of S_2k are (n + 2 m)^2 / r + (1 - 1/r) m^2, and the same
        with n^2 in place of m^2, if columns are independent. So they are above S_2, which mixes
        with Gaussians whatever the projection; below, pairs of columns of one group depend on
        each other.

        Raises:
            NotImplementedError: for "sorf" and "qmc", whose pairs have no such moments in closed
                form.
        """
        m, n = self._squares(x, y)
        r, dependent = self.sketch_dims, self._dependent_pairs()
        twice = n + 2 * m
        for level in range(self.parts.bit_length() - 1):
            pairs = (self._pair(m, twice), self._pair(n, twice))
            count = dependent if level == 0 else 0
            m, n = (
                (r * twice**2 + count * pair**2 + (r * r - r - count) * v**2) / r**2
                for pair, v in zip(pairs, (m, n), strict=True)
            )
            twice = n + 2 * m
        return m

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        """Var[(S(x).S(y))^2] / kernel(x, y)^2 for degree 4 and independent directions.

        S(x).S(y) is the mean of r independent products of two u = (g.x')(g.y'), whose moments are
        those of two correlated normal variables: E u^4 = 9 n^2 + 72 n m + 24 m^2, for instance.

        Raises:
            NotImplementedError: for another degree or projection, whose eighth moments are not
                known in closed form.
        """
        if self.degree != 4 or self.projection != "iid":
            raise NotImplementedError(
                "the variance of PolySketch is known for degree=4 and projection='iid', not for "
                f"degree={self.degree} and projection={self.projection!r}"
            )
        r, (m, n) = self.sketch_dims, self._squares(x, y)
        # moments 1 to 4 of u, squared: those of a product of two
        first, second = m, (n + 2 * m) ** 2
        third, fourth = m * (9 * n + 6 * m) ** 2, (9 * n**2 + 72 * n * m + 24 * m**2) ** 2
        fourth_of_sum = (
            r * fourth
            + r * (r - 1) * (4 * third * first + 3 * second**2)
            + r * (r - 1) * (r - 2) * (6 * second * first**2 + (r - 3) * first**4)
        )
        return fourth_of_sum / r**4 / self.kernel(x, y).square() - 1

    def _squares(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(x'.y')^2 and |x'|^2 |y'|^2."""
        x, y = (self.scaled(self._normalized(v)) for v in (x, y))
        return (x * y).sum(-1).square(), x.square().sum(-1) * y.square().sum(-1)

    def _dependent_pairs(self) -> int:
        """Of the columns of a part, how many ordered pairs are not independent."""
        r, size = self.sketch_dims, self.query_dimensions
        if self.projection in ("sorf", "qmc"):
            raise NotImplementedError(
                f"the mean of a squared sketch with projection={self.projection!r} is not known "
                "in closed form; that of S(x).S(y) itself is"
            )
        if self.projection == "antithetic":
            return 2 * (r // 2)
        if self.projection == "iid":
            return 0
        full, rest = divmod(r, size)
        return full * size * (size - 1) + rest * (rest - 1)

    def _pair(self, straight: Tensor, twice: Tensor) -> Tensor:
        """E (g.a)(g.b)(h.c)(h.d) for two columns g and h that depend on each other.

        ``straight`` is (a.b)(c.d), which it is for independent ones; ``twice`` that and the other
        two pairings, which it is for g = h.
        """
        if self.projection == "antithetic":
            return twice
        if self.projection == "iid":
            return straight
        d = self.query_dimensions
        # of u u^T and v v^T for orthonormal u, v of a Haar rotation, with E |g|^2 |h|^2 = d^2
        others = twice - straight
        orthogonal = d / ((d - 1) * (d + 2)) * ((d + 1) * straight - others) if d > 1 else straight
        if self.projection == "orthogonal":
            return orthogonal
        cosine2 = (d - 1) ** -2  # simplex: h is in part along g
        return cosine2 * d / (d + 2) * twice + (1 - cosine2) * orthogonal
