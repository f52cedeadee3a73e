"""Products of neighbouring rectified entries."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import FeatureMap


class DPFP(FeatureMap):
    """phi(x) = [z_i z_{i-j}], z = [relu(x), relu(-x)] of 2 E entries, j = 1..nu, cyclic.

    The deterministic parameter-free projection of Schlag, Irie and Schmidhuber 2021, "Linear
    Transformers Are Secretly Fast Weight Programmers" (arXiv:2102.11174), section 5.4 and
    equation 37: sparse, non-negative and, for most pairs, nearly orthogonal, which is what
    recalling many pairs needs. Two tokens may share no feature; a denominator of 0 gives 0.

    Args:
        query_dimensions: E.
        nu: number of neighbours; 2 E ``nu`` features.

    Raises:
        ValueError: for a ``nu`` outside 1..2 E - 1, where features would repeat.
    """

    any_input = True
    drawn = True
    positive = True

    def __init__(self, query_dimensions: int, nu: int = 1) -> None:
        super().__init__(query_dimensions)
        if not 1 <= nu < 2 * query_dimensions:
            raise ValueError(
                f"nu of DPFP counts neighbours among {2 * query_dimensions} entries: it must be "
                f"1..{2 * query_dimensions - 1}, got {nu}"
            )
        self.nu = nu

    @property
    def feature_dims(self) -> int:
        return 2 * self.query_dimensions * self.nu

    def forward(self, x: Tensor) -> Tensor:
        z = torch.cat([x.relu(), (-x).relu()], -1)
        return torch.cat([z * z.roll(j, -1) for j in range(1, self.nu + 1)], -1)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return (self(x) * self(y)).sum(-1)
