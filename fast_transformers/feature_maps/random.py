"""Random projections: how they are drawn, and when they are drawn again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.choose import exporting
from .base import FeatureMap


@torch.no_grad()
def orthogonal_random_matrix_(w: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``w`` (rows, columns) with columns that are N(0, I) and orthogonal in groups of rows.

    Each group is a Haar-distributed rotation, whose columns are given independent norms of the
    chi distribution. Without the sign correction of the QR decomposition the columns would have
    a mean, which biases features that are not even functions of the projection.

    Drawn on the CPU, so that a seed means the same on every device.
    """
    rows, columns = w.shape
    groups = []
    for _ in range(0, columns, rows):
        q, r = torch.linalg.qr(torch.randn(rows, rows, generator=generator, device="cpu"))
        norms = torch.randn(rows, rows, generator=generator, device="cpu").norm(dim=0)
        groups.append(q * (r.diagonal().sign() * norms))
    return w.copy_(torch.cat(groups, 1)[:, :columns])


@torch.no_grad()
def fill_(omega: Tensor, orthogonal: bool, generator: torch.Generator | None = None) -> None:
    """Draw a projection (E, columns) in place, on the CPU: a seed means the same anywhere."""
    if orthogonal:
        orthogonal_random_matrix_(omega, generator)
    else:
        omega.copy_(torch.randn(omega.shape, generator=generator, device="cpu"))


@torch.library.custom_op(
    "fast_transformers::redraw",
    mutates_args=("omega", "calls"),
    schema="(Tensor(a!) omega, Tensor(b!) calls, Tensor seed, int every, bool orthogonal) -> ()",
)
def _redraw(omega: Tensor, calls: Tensor, seed: Tensor, every: int, orthogonal: bool) -> None:
    """Count a call and draw, if it is time to; an operator, so that compiled models redraw."""
    n = int(calls)
    if n and n % every == 0:  # call 0 uses what was drawn first, or loaded
        fill_(omega, orthogonal, torch.Generator().manual_seed((int(seed) + n) % 2**63))
    calls += 1


@_redraw.register_fake
def _(*_: Any) -> None:
    return None


class RandomFeatureMap(FeatureMap):
    """Base of the maps that look at x through a random matrix ``omega`` with N(0, 1) entries.

    ``omega`` is drawn at construction, is part of the state dict and is only ever overwritten in
    place. In training it is drawn again at every ``redraw``-th call of ``new_feature_map``;
    in evaluation it stays. The n-th draw of a map depends on nothing but its seed and n, so
    processes that construct a model alike redraw alike.

    Args:
        query_dimensions: E.
        columns: number of random directions.
        softmax_temp: factor of the dot product; None is 1/sqrt(E).
        orthogonal: draw orthogonal directions (Haar rotations, independent chi norms) instead
            of independent ones.
        redraw: training calls between two draws.
        deterministic_eval: keep the map in evaluation mode. The older library's default, False,
            gives different results for the same input.
        generator: source of the map's seed; an int seeds a new one, None is torch's global one.
    """

    any_input = True
    drawn = True
    omega: Tensor
    calls: Tensor
    seed: Tensor

    def __init__(
        self,
        query_dimensions: int,
        columns: int,
        softmax_temp: float | None,
        orthogonal: bool,
        redraw: int,
        deterministic_eval: bool,
        generator: torch.Generator | int | None,
    ) -> None:
        super().__init__(query_dimensions)
        if redraw < 1:
            raise ValueError(f"redraw must be at least 1 training call, got {redraw}")
        self.softmax_temp = query_dimensions**-0.5 if softmax_temp is None else softmax_temp
        if self.softmax_temp < 0:
            raise ValueError(f"softmax_temp must not be negative, got {softmax_temp}")
        self.orthogonal = orthogonal
        self.redraw = redraw
        self.deterministic_eval = deterministic_eval
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        seed = torch.randint(2**62, (), generator=generator, device="cpu")
        # checkpoints of the older library hold omega alone
        self.register_buffer("omega", torch.empty(query_dimensions, columns))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("seed", seed.to(self.omega.device), persistent=False)
        fill_(self.omega, orthogonal, torch.Generator().manual_seed(int(seed)))

    def new_feature_map(self, device: torch.device | None = None) -> None:
        """Redraw, if it is time to; see the class."""
        if self.deterministic_eval and not self.training:
            return
        if exporting():
            raise RuntimeError(
                f"{type(self).__name__} draws random features, which an exported program cannot; "
                "call model.eval() first, and leave deterministic_eval=True"
            )
        _redraw(self.omega, self.calls, self.seed, self.redraw, self.orthogonal)

    def resample(self, generator: torch.Generator | None = None) -> None:
        """Draw ``omega`` now, from ``generator`` or torch's global one."""
        fill_(self.omega, self.orthogonal, generator)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(softmax_temp) x, and its products with omega, in float32 at least."""
        if x.shape[-1] != self.query_dimensions:
            raise ValueError(
                f"{type(self).__name__} was made for {self.query_dimensions} query dimensions, "
                f"got inputs of {x.shape[-1]}; make it with query_dimensions={x.shape[-1]}"
            )
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.softmax_temp != 1.0:
            x = x * self.softmax_temp**0.5
        return x, x @ self.omega.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.query_dimensions}, feature_dims={self.feature_dims}, "
            f"softmax_temp={self.softmax_temp:.4g}, orthogonal={self.orthogonal}, "
            f"redraw={self.redraw}"
        )


def split_in_pairs(name: str, query_dimensions: int, n_dims: int | None) -> int:
    """The even number of features asked for; None is ``query_dimensions``."""
    features = query_dimensions if n_dims is None else n_dims
    if features < 2 or features % 2:
        origin = " (from query_dimensions)" if n_dims is None else ""
        nearest = max(features // 2 * 2, 2)
        raise ValueError(
            f"n_dims of {name} must be even and at least 2, as features come in pairs, got "
            f"{features}{origin}; pass n_dims={nearest}"
        )
    return features
