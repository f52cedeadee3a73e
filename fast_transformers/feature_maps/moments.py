"""First and second moments of queries or keys, which some maps are fitted to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .heads import check_heads


class Moments(NamedTuple):
    """Means over tokens, in float64 on the CPU; with H in front if they are kept per head.

    Those of several texts may be averaged.
    """

    mean: Tensor  # (E) or (H, E)
    second: Tensor  # (E, E) or (H, E, E), the mean of x x^T

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor, heads: int | None = None) -> Moments:
        """Moments of x (..., H, E): of each head, or of all heads together if ``heads`` is None.

        Raises:
            ValueError: if there is no token, or not the given number of heads.
        """
        if x.numel() == 0:
            raise ValueError(f"moments are means over tokens, got none: shape {tuple(x.shape)}")
        x = x.detach().to("cpu", torch.float64)
        if heads is None:
            rows = x.flatten(0, -2)
        else:
            check_heads(x, heads)
            rows = x.movedim(-2, 0).flatten(1, -2) if x.ndim > 2 else x[:, None]
        return cls(rows.mean(-2), rows.mT @ rows / rows.shape[-2])

    def scaled(self, factor: float) -> Moments:
        """Those of factor x."""
        return Moments(self.mean * factor, self.second * factor**2)

    def transformed(self, matrix: Tensor) -> Moments:
        """Those of x matrix."""
        mean = (self.mean[..., None, :] @ matrix)[..., 0, :]
        return Moments(mean, matrix.mT @ self.second @ matrix)


def of_sum(x: Moments, y: Moments) -> Tensor:
    """The mean of (x + y)(x + y)^T, for x and y independent of each other."""
    cross = x.mean[..., :, None] * y.mean[..., None, :]
    return x.second + y.second + cross + cross.mT
