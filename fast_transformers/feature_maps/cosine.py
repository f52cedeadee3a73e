"""Weights that fall with the distance between positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.choose import exporting
from ..ops.features import transforming
from .adapt import build_feature_map
from .base import relu_feature_map
from .wrappers import Factory, Wrapper


class CosReweight(Wrapper):
    """[phi(x_i) cos t_i, phi(x_i) sin t_i], t_i = pi (i + 1/2) / (2 M): cosFormer.

    The kernel of positions i and j is that of phi times cos(pi (i - j) / (2 M)). Qin et al. 2022,
    "cosFormer: Rethinking Softmax in Attention" (arXiv:2202.08791), its cos-based re-weighting for
    phi = relu; the half turns no weight negative, and keeps every factor above 0, so that
    logarithms exist. M is a constant: with the length of the call in its place, as in the authors'
    code, a token would change when others follow.

    Attention adds the positions; features called by themselves want them behind the dimensions,
    see :meth:`add_positions`.

    Args:
        query_dimensions: E.
        inner: factory of phi, whose weights should not be negative; None is relu, as in the paper.
        max_length: M, tokens of the longest sequence, queries and keys alike.

    Raises:
        ValueError: for a ``max_length`` below 1; later, for a longer sequence.
    """

    positional = True

    def __init__(
        self, query_dimensions: int, inner: Factory | None = None, max_length: int = 4096
    ) -> None:
        super().__init__(
            query_dimensions, [build_feature_map(inner or relu_feature_map, query_dimensions)]
        )
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.max_length = max_length

    @property
    def feature_dims(self) -> int:
        return 2 * self.inner.feature_dims

    def add_positions(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """x (N, L, H, E) with cosine and sine behind: (N, L, H, E + 2).

        Args:
            start: position of the first token, or (N, L) positions of all.

        Raises:
            ValueError: for positions beyond ``max_length``. Positions in tensors are looked at on
                a CPU only, and not inside compiled models, since the host would have to wait.
        """
        length = x.shape[1]
        last = _last(start, length)
        if last is not None and last >= self.max_length:
            raise ValueError(
                f"CosReweight was made for {self.max_length} tokens, got position {last}; make it "
                "with a larger max_length"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        if isinstance(start, Tensor) and start.ndim == 2:
            positions = start.to(x.device, dtype)
        else:
            positions = torch.arange(length, device=x.device, dtype=dtype) + start
        angles = (positions[..., None] + 0.5) * (math.pi / 2 / self.max_length)
        turned = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)  # (L, 2) or (N, L, 2)
        return torch.cat([x, turned[..., None, :].expand(*x.shape[:-1], 2)], -1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself, and its cosine and sine as factors (..., 1, 2)."""
        if x.shape[-1] != self.query_dimensions + 2:
            raise ValueError(
                f"CosReweight wants {self.query_dimensions} dimensions and a cosine and sine "
                f"behind them, got {x.shape[-1]}; call add_positions(x) first"
            )
        return x[..., :-2], x[..., None, -2:]

    def forward_queries(self, x: Tensor) -> Tensor:
        x, turn = self._split(x)
        return _both(self.inner.forward_queries(x)[..., None] * turn)

    def forward_keys(self, x: Tensor) -> Tensor:
        x, turn = self._split(x)
        return _both(self.inner.forward_keys(x)[..., None] * turn)

    def log_queries(self, x: Tensor) -> Tensor:
        x, turn = self._split(x)
        return _both(self.inner.log_queries(x)[..., None] + turn.log())

    def log_keys(self, x: Tensor) -> Tensor:
        x, turn = self._split(x)
        return _both(self.inner.log_keys(x)[..., None] + turn.log())

    def query_offset(self, x: Tensor) -> Tensor | float:
        return self.inner.query_offset(self._split(x)[0])

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """Of vectors with positions, (..., E + 2)."""
        (x, of_x), (y, of_y) = self._split(x), self._split(y)
        return self.inner.kernel(x, y) * (of_x * of_y).sum((-1, -2))

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        """That of the inner map: the factors are exact."""
        return self.inner.relative_variance(self._split(x)[0], self._split(y)[0])


def _last(start: int | Tensor, length: int) -> int | None:
    """The largest position, if it can be known at once."""
    if exporting():
        return None
    if isinstance(start, int):
        return start + length - 1
    hidden = torch.compiler.is_compiling() or transforming() or start.device.type != "cpu"
    if hidden or not start.numel():
        return None
    return int(start.max()) + (0 if start.ndim == 2 else length - 1)


def _both(features: Tensor) -> Tensor:
    """(..., F, 2) to (..., 2 F)."""
    return features.flatten(-2)
