"""Positive random features of the softmax kernel whose variance is minimal for the data."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from .alignment import TRANSFORMS
from .heads import hold, leading, multiply
from .moments import Moments, of_sum
from .random import RandomFeatureMap


def optimal_a(mean_square: Tensor) -> Tensor:
    """A* = (1 - 2 s - sqrt((2 s + 1)^2 + 8 s)) / 16 for s, the mean of z_l^2, z = x + y.

    The minimum of the mean log second moment; 0 for s = 0, and never above.
    """
    s = mean_square.clamp(min=0)
    return (1 - 2 * s - ((2 * s + 1).square() + 8 * s).sqrt()) / 16


class OptimalPositiveFeatures(RandomFeatureMap):
    """phi_i(x) = D exp(A |w_i|^2 + sqrt(1 - 4 A) w_i.x' - |x'|^2 / 2) / sqrt(F): FAVOR++.

    D = (1 - 4 A)^(E/4), x' = sqrt(softmax_temp) x: positive, unbiased for exp(softmax_temp x.y) at
    any A < 1/8, and bounded for A < 0. Likhosherstov et al. 2022, "Chefs' Random Tables"
    (arXiv:2205.15317), theorem 3.1 (the features) and theorem 3.3 with equation 7 (OPRF): the A of
    smallest variance for the mean of |x' + y'|^2 over queries and keys, equation 8. A = 0 is
    FAVOR+ with features of one sign.

    The mean is that of :meth:`calibrate`; before, ``sum_norm``. It is a constant of the map, so
    no token sees another one. What is kept is log_rho = -log(1 - 8 A), any real number, so that
    training cannot leave the A that are possible.

    Args:
        query_dimensions: E.
        n_dims: F; None is E.
        softmax_temp: factor of the dot product; None is 1/sqrt(E).
        sum_norm: mean of |x' + y'|^2 to begin with; None is that of queries and keys with unit
            variance, 2 E softmax_temp.
        heads: H, for an A of each head; None for one of all heads.
        learned: whether A is trained, one for each dimension.
        projection, redraw, deterministic_eval, generator: see :class:`RandomFeatureMap`. Being
            of one sign, these features gain most from "simplex" if norms are small.

    Raises:
        ValueError: for an ``n_dims`` or ``heads`` below 1, or a negative ``sum_norm``.
    """

    exponential = True
    positive = True
    estimates = "softmax"
    fitted_buffers = ("log_rho",)
    log_rho: Tensor

    def __init__(
        self,
        query_dimensions: int,
        n_dims: int | None = None,
        softmax_temp: float | None = None,
        sum_norm: float | None = None,
        heads: int | None = None,
        learned: bool = False,
        projection: str = "orthogonal",
        redraw: int = 1,
        deterministic_eval: bool = True,
        generator: Generator | int | None = None,
    ) -> None:
        self.n_dims = query_dimensions if n_dims is None else n_dims
        if self.n_dims < 1:
            raise ValueError(f"n_dims of {type(self).__name__} must be at least 1, got {n_dims}")
        super().__init__(
            query_dimensions, self.n_dims, softmax_temp, projection, redraw, deterministic_eval,
            generator,
        )  # fmt: skip
        self.heads, self.any_input = heads, heads is None
        square = 2 * self.softmax_temp if sum_norm is None else sum_norm / query_dimensions
        if square < 0:
            raise ValueError(f"sum_norm is a mean of squares: it must be >= 0, got {sum_norm}")
        squares = torch.full((*leading(heads), query_dimensions), square)
        hold(self, "log_rho", _log_rho(optimal_a(squares)), learned)

    @property
    def feature_dims(self) -> int:
        return self.n_dims

    def _calibrate(self, queries: Tensor, keys: Tensor) -> None:
        """Fit to the moments of examples (..., H, E)."""
        self.set_moments(Moments.of(queries, self.heads), Moments.of(keys, self.heads))

    @torch.no_grad()
    def set_moments(self, queries: Moments, keys: Moments) -> None:
        """Fit to the moments of queries and of keys."""
        mean = of_sum(*self._scaled(queries, keys)).diagonal(dim1=-2, dim2=-1).mean(-1)
        self.log_rho.copy_(_log_rho(optimal_a(mean))[..., None].expand(self.log_rho.shape))

    def _scaled(self, queries: Moments, keys: Moments) -> tuple[Moments, Moments]:
        factor = self.softmax_temp**0.5
        return queries.scaled(factor), keys.scaled(factor)

    def forward_queries(self, x: Tensor) -> Tensor:
        return (self.log_queries(x) + self.query_offset(x)).exp().to(x.dtype)

    def forward_keys(self, x: Tensor) -> Tensor:
        return self.log_keys(x).exp().to(x.dtype)

    def log_queries(self, x: Tensor) -> Tensor:
        return self._directions(self.aligned_queries(x))

    def query_offset(self, x: Tensor) -> Tensor:
        return self._offset(self.aligned_queries(x))

    def log_keys(self, x: Tensor) -> Tensor:
        x = self.aligned_keys(x)
        return self._directions(x) + self._offset(x)

    @property
    def a(self) -> Tensor:
        """A of each dimension, (E) or (H, E)."""
        return self._a(self.log_rho)

    def aligned_queries(self, x: Tensor) -> Tensor:
        """x' of queries, (..., E), in float32 at least."""
        return self.scaled(x)

    def aligned_keys(self, x: Tensor) -> Tensor:
        """x' of keys, (..., E), in float32 at least."""
        return self.scaled(x)

    def _a(self, like: Tensor) -> Tensor:
        """A in the dtype of a tensor."""
        return (1 - (-self.log_rho.to(like.dtype)).exp()) / 8

    def _directions(self, x: Tensor) -> Tensor:
        """The part of the logarithms that tells features apart."""
        a, omega = self._a(x), self.omega.to(x.dtype)
        return (x * (1 - 4 * a).sqrt()) @ omega + a @ omega.square()

    def _offset(self, x: Tensor) -> Tensor:
        """What all features have in common."""
        a = self._a(x)
        log_d = (1 - 4 * a).log().sum(-1, keepdim=True) / 4
        return log_d - math.log(self.n_dims) / 2 - x.square().sum(-1, keepdim=True) / 2

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.softmax_temp * (x * y).sum(-1)).exp()

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        """(prod_l (1 + r_l) / (2 sqrt(r_l)) exp(r_l z_l^2) - 1) / F, r = 1/(1 - 8 A), z = x' + y'.

        Theorem 3.2 of the paper, for one A; for an A of each dimension it is the same integral.
        """
        z = self.aligned_queries(x) + self.aligned_keys(y)
        r = self.log_rho.to(z.dtype).exp()
        terms = ((1 + r) / (2 * r.sqrt())).log() + r * z.square()
        return terms.sum(-1).expm1() / self.n_dims


class DenseExponentialFeatures(OptimalPositiveFeatures):
    """Features of x~ = x' G and of y~ = y' G^-T, and an A of each dimension: FAVOR#.

        phi_i(x) = D exp(sum_l [A_l w_il^2 + sqrt(1 - 4 A_l) w_il x~_l] - |x~|^2 / 2) / sqrt(F)

    D = prod_l (1 - 4 A_l)^(1/4). x~.y~ = x'.y', so these are positive and unbiased for
    exp(softmax_temp x.y) whatever G and A < 1/8. Likhosherstov et al. 2023, "FAVOR#: Sharp
    Attention Kernel Approximations via New Classes of Positive Random Features" (arXiv:2302.00787)
    has the first three modes under these names: theorem 4.1 (the features and their variance), 4.2
    (ADERF), 4.3 (SDERF), and SADERF by rescaling. G and A come from the moments of queries and
    keys that :meth:`calibrate` is given; before, from those of unit variance, where all four are
    :class:`OptimalPositiveFeatures`. They are constants of the map, kept as buffers.

    Args:
        query_dimensions: E.
        n_dims: F; None is E.
        mode: "sderf", G the eigenvectors of the second moment of x' + y', an A of each; "saderf",
            G diagonal, equal variances for queries and keys, one A; "aderf", G by singular
            values, so that x~ and y~ have the same diagonal second moment, one A; "aligned", the G
            of "aderf" with the A of each dimension that is optimal there, which is ours and the
            best of the four in most cases.
        softmax_temp: factor of the dot product; None is 1/sqrt(E).
        heads: H, for a G and A of each head; None for one of all heads.
        learned: whether A is trained, one for each dimension; G is not.
        projection, redraw, deterministic_eval, generator: see :class:`RandomFeatureMap`.

    Raises:
        ValueError: for another ``mode``, or an ``n_dims`` or ``heads`` below 1.
    """

    fitted_buffers = ("log_rho", "of_queries")
    of_queries: Tensor
    of_keys: Tensor

    def __init__(
        self,
        query_dimensions: int,
        n_dims: int | None = None,
        mode: str = "aligned",
        softmax_temp: float | None = None,
        heads: int | None = None,
        learned: bool = False,
        projection: str = "orthogonal",
        redraw: int = 1,
        deterministic_eval: bool = True,
        generator: Generator | int | None = None,
    ) -> None:
        if mode not in TRANSFORMS:
            raise ValueError(f"mode must be one of {', '.join(TRANSFORMS)}, got {mode!r}")
        super().__init__(
            query_dimensions, n_dims, softmax_temp, None, heads, learned, projection, redraw,
            deterministic_eval, generator,
        )  # fmt: skip
        self.mode = mode
        identity = torch.eye(query_dimensions).expand(*leading(heads), -1, -1)
        self.register_buffer("of_queries", identity.clone())
        self.register_buffer("of_keys", identity.clone())

    @torch.no_grad()
    def set_moments(self, queries: Moments, keys: Moments) -> None:
        """Fit to the moments of queries and of keys."""
        queries, keys = self._scaled(queries, keys)
        transform, one_a = TRANSFORMS[self.mode]
        matrix, other = transform(queries, keys)
        moments = of_sum(queries.transformed(matrix), keys.transformed(other))
        mean_square = moments.diagonal(dim1=-2, dim2=-1)
        if one_a:
            mean_square = mean_square.mean(-1, keepdim=True).expand(mean_square.shape)
        self._set(matrix, other, optimal_a(mean_square))

    def moved(self, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        """G (1 + change), and G^-T to go with it."""
        changes = dict(changes)
        one = torch.eye(self.query_dimensions).to(self.of_queries) + changes.pop("of_queries")
        matrix, other = self.of_queries @ one, self.of_keys @ torch.linalg.inv(one).mT
        return {**super().moved(changes), "of_queries": matrix, "of_keys": other}

    @torch.no_grad()
    def set_transform(self, matrix: Tensor, a: Tensor) -> None:
        """Set G (E, E) and A (E) themselves, (H, E, E) and (H, E) per head.

        Raises:
            ValueError: if an A is not below 1/8, where the features have no variance.
        """
        if not bool((a < 1 / 8).all()):
            raise ValueError(f"every A must be below 1/8, got up to {float(a.max()):.4g}")
        matrix = matrix.to("cpu", torch.float64)
        self._set(matrix, torch.linalg.inv(matrix).mT, a)

    def _set(self, matrix: Tensor, other: Tensor, a: Tensor) -> None:
        self.of_queries.copy_(matrix)
        self.of_keys.copy_(other)
        self.log_rho.copy_(_log_rho(a))

    def aligned_queries(self, x: Tensor) -> Tensor:
        return multiply(self.scaled(x), self.of_queries)

    def aligned_keys(self, x: Tensor) -> Tensor:
        return multiply(self.scaled(x), self.of_keys)


def _log_rho(a: Tensor) -> Tensor:
    return -(1 - 8 * a).log()
