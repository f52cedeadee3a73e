"""Random projections: how they are drawn, and when they are drawn again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.choose import exporting
from ..ops.features import transforming
from .base import FeatureMap, widen
from .projections import check_projection, draw_


def redraw_(
    omega: Tensor, calls: Tensor, known: Tensor, seed: Tensor, stream: int, every: int,
    projection: str, parts: int
) -> None:  # fmt: skip
    """Count a call and draw, if it is time to.

    ``calls`` and ``known``, which remembers the seed, are on the CPU: a device is asked once.
    """
    redraw = _operator if torch.compiler.is_compiling() or transforming() else _redraw
    redraw(omega, calls, known, seed, stream, every, projection, parts)


def _redraw(
    omega: Tensor, calls: Tensor, known: Tensor, seed: Tensor, stream: int, every: int,
    projection: str, parts: int
) -> None:  # fmt: skip
    n = int(calls)
    if n and n % every == 0:  # call 0 uses what was drawn first, or loaded
        if known < 0:
            known.copy_(seed)
        number = (int(known) + stream + n) % 2**63
        draw_(omega, projection, torch.Generator().manual_seed(number), parts)
    calls += 1


# an operator, which compilers and torch.func leave alone; its call takes a quarter of a draw
_operator = torch.library.custom_op(
    "fast_transformers::redraw",
    _redraw,
    mutates_args=("omega", "calls", "known"),
    schema="(Tensor(a!) omega, Tensor(b!) calls, Tensor(c!) known, Tensor seed, int stream, "
    "int every, str projection, int parts) -> ()",
)


@_operator.register_fake
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
        projection: how directions are drawn, a key of
            :data:`~fast_transformers.feature_maps.projections.PROJECTIONS`: "iid" (independent),
            "orthogonal", "sorf", "simplex", "qmc" or "antithetic".
        redraw: training calls between two draws.
        deterministic_eval: keep the map in evaluation mode. The older library's default, False,
            gives different results for the same input.
        generator: source of the map's seed; an int seeds a new one, None is torch's global one.

    Attributes:
        parts: number of equal parts of ``omega`` that are drawn independently of each other.
        drawn_buffers: names of the buffers that are drawn.

    Raises:
        ValueError: for a ``redraw`` below 1, a negative ``softmax_temp``, or an unknown
            ``projection``.
    """

    random = True
    any_input = True
    drawn = True
    parts = 1
    drawn_buffers: tuple[str, ...] = ("omega",)
    omega: Tensor
    seed: Tensor

    def __init__(
        self,
        query_dimensions: int,
        columns: int,
        softmax_temp: float | None = None,
        projection: str = "orthogonal",
        redraw: int = 1,
        deterministic_eval: bool = True,
        generator: torch.Generator | int | None = None,
    ) -> None:
        super().__init__(query_dimensions)
        if redraw < 1:
            raise ValueError(f"redraw must be at least 1 training call, got {redraw}")
        self.softmax_temp = query_dimensions**-0.5 if softmax_temp is None else softmax_temp
        if self.softmax_temp < 0:
            raise ValueError(f"softmax_temp must not be negative, got {softmax_temp}")
        self.projection = check_projection(projection)
        self.redraw = redraw
        self.deterministic_eval = deterministic_eval
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        seed = torch.randint(2**62, (), generator=generator, device="cpu")
        # checkpoints of the older library hold omega alone
        self.register_buffer("omega", torch.empty(query_dimensions, columns))
        # a buffer, so that processes that train together have one; the other two never move
        self.register_buffer("seed", seed.to(self.omega.device), persistent=False)
        self.calls, self.known = (torch.tensor(x, device="cpu") for x in (0, -1))
        draw_(self.omega, projection, torch.Generator().manual_seed(int(seed)), self.parts)

    def reseed(self, seed: int) -> None:
        """Draw from another seed from the next redraw on, and count calls from 0."""
        for x, value in ((self.calls, 0), (self.known, -1), (self.seed, seed)):
            x.fill_(value)

    def new_feature_map(self, device: torch.device | None = None) -> None:
        """Redraw, if it is time to; see the class."""
        if self.deterministic_eval and not self.training:
            return
        if exporting():
            raise RuntimeError(
                f"{type(self).__name__} draws random features, which an exported program cannot; "
                "call model.eval() first, and leave deterministic_eval=True"
            )
        self._redraw()

    def _redraw(self) -> None:
        counter = self.calls, self.known, self.seed
        redraw_(self.omega, *counter, 0, self.redraw, self.projection, self.parts)

    def resample(self, generator: torch.Generator | None = None) -> None:
        """Draw ``omega`` now, from ``generator`` or torch's global one."""
        draw_(self.omega, self.projection, generator, self.parts)

    @property
    def orthogonal(self) -> bool:
        """Whether directions are orthogonal; the older library's way to say ``projection``."""
        return self.projection == "orthogonal"

    def scaled(self, x: Tensor) -> Tensor:
        """sqrt(softmax_temp) x, in float32 at least."""
        if x.shape[-1] != self.query_dimensions:
            raise ValueError(
                f"{type(self).__name__} was made for {self.query_dimensions} query dimensions, "
                f"got inputs of {x.shape[-1]}; make it with query_dimensions={x.shape[-1]}"
            )
        x = widen(x)
        return x if self.softmax_temp == 1.0 else x * self.softmax_temp**0.5

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(softmax_temp) x, and its products with omega, in float32 at least."""
        x = self.scaled(x)
        return x, x @ self.omega.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.query_dimensions}, feature_dims={self.feature_dims}, "
            f"softmax_temp={self.softmax_temp:.4g}, projection={self.projection}, "
            f"redraw={self.redraw}"
        )


def projection_of(orthogonal: bool, projection: str | None) -> str:
    """``projection``, or what ``orthogonal`` of the older library stands for."""
    if projection is not None:
        return projection
    return "orthogonal" if orthogonal else "iid"


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
