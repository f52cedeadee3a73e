"""A function of random projections, without the exponentials of the softmax kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import Formula
from ..ops.elementwise import formula_of
from .random import RandomFeatureMap, projection_of


class GeneralizedRandomFeatures(RandomFeatureMap):
    """phi(x) = f(w_i.x'), x' = sqrt(softmax_temp) x.

    Does not approximate softmax; raises the rank of the attention matrix at a bounded variance.
    Choromanski et al., "Rethinking Attention with Performers" (2021), equation 5 with f = relu:
    Performer-ReLU. With relu a query may have no positive feature; its attention is then 0.

    Args:
        query_dimensions: E.
        n_dims: F; None is E.
        softmax_temp: factor of the dot product, 1 by default; None is 1/sqrt(E).
        orthogonal: the older way to say ``projection``: "orthogonal", or "iid" if False.
        kernel_fn: f, applied element by element.
        redraw, deterministic_eval, generator, projection: see :class:`RandomFeatureMap`.

    Raises:
        ValueError: for an ``n_dims`` below 1.
    """

    def __init__(
        self,
        query_dimensions: int,
        n_dims: int | None = None,
        softmax_temp: float | None = 1.0,
        orthogonal: bool = True,
        kernel_fn: Callable[[Tensor], Tensor] = torch.relu,
        redraw: int = 1,
        deterministic_eval: bool = True,
        generator: torch.Generator | int | None = None,
        projection: str | None = None,
    ) -> None:
        self.n_dims = query_dimensions if n_dims is None else n_dims
        if self.n_dims < 1:
            raise ValueError(
                f"n_dims of GeneralizedRandomFeatures must be at least 1, got {self.n_dims}"
            )
        super().__init__(
            query_dimensions, self.n_dims, softmax_temp,
            projection_of(orthogonal, projection), redraw, deterministic_eval, generator,
        )  # fmt: skip
        self.kernel_fn = kernel_fn
        self.positive = self.formula() is not None  # of other functions nothing is known

    @property
    def feature_dims(self) -> int:
        return self.n_dims

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel_fn(self.project(x)[1]).to(x.dtype)

    def formula(self) -> Formula | None:
        return formula_of(self.kernel_fn, self.omega, (self.softmax_temp,))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """F E[f(w.x') f(w.y')], w ~ N(0, I).

        For relu the arc-cosine kernel of degree 1 (Cho and Saul 2009, equation 6), otherwise
        Gauss-Hermite quadrature over the two correlated normal variables.
        """
        return self.n_dims * self._mean(x, y, 1)

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        """(E[f(w.x')^2 f(w.y')^2] / E[f(w.x') f(w.y')]^2 - 1) / F.

        For relu from the arc-cosine kernel of degree 2 (Cho and Saul 2009, equation 7).
        """
        ratio = self._mean(x, y, 2) / self._mean(x, y, 1).square()
        return (ratio - 1) / self.n_dims

    def _mean(self, x: Tensor, y: Tensor, power: int) -> Tensor:
        """E[(f(w.x') f(w.y'))^power] for a power of 1 or 2."""
        x, y = x * self.softmax_temp**0.5, y * self.softmax_temp**0.5
        nx, ny = x.norm(dim=-1), y.norm(dim=-1)
        cosine = ((x * y).sum(-1) / (nx * ny).clamp(min=1e-30)).clamp(-1, 1)
        if self.kernel_fn in (torch.relu, torch.nn.functional.relu):
            angle = cosine.arccos()
            rest = math.pi - angle
            if power == 1:
                shape = angle.sin() + rest * cosine
            else:
                shape = 3 * angle.sin() * cosine + rest * (1 + 2 * cosine.square())
            return (nx * ny) ** power * shape / (2 * math.pi)
        nodes, weights = _gauss_hermite(64, x)
        u = nx[..., None, None] * nodes[:, None]
        sine = (1 - cosine.square()).sqrt()
        v = cosine[..., None, None] * nodes[:, None] + sine[..., None, None] * nodes
        f = self.kernel_fn(u) * self.kernel_fn(ny[..., None, None] * v)
        return torch.einsum("...ij,i,j->...", f**power, weights, weights)


def _gauss_hermite(order: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights for the mean over N(0, 1), from the recurrence's Jacobi matrix."""
    off = torch.arange(1, order, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes.to(like), vectors[0].square().to(like)
