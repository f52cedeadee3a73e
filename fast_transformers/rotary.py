"""Rotary positions, for softmax and for linear attention alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Turn each pair of dimensions (i, i + E/2) by position * base^(-2i/E).

    "RoFormer" (Su et al. 2021), equation 34, applied to queries and keys *before* the feature
    map. The dot product of a rotated query and key depends on their distance alone; so does any
    kernel of it, and the mean over draws of random features that stand for such a kernel. Maps
    that work element by element (elu + 1) see absolute positions as well. Features stay
    positive, so the attention stays normalised, and a recurrent state stays constant in size.

    Has no weights and no state-dict entries.

    Args:
        query_dimensions: E, even.
        base: wavelengths run from 2 pi to 2 pi ``base`` tokens.

    Raises:
        ValueError: for an odd ``query_dimensions``.
    """

    def __init__(self, query_dimensions: int, base: float = 10_000.0) -> None:
        super().__init__()
        if query_dimensions % 2:
            raise ValueError(
                f"rotary positions turn pairs of dimensions: query_dimensions must be even, got "
                f"{query_dimensions}"
            )
        self.query_dimensions, self.base = query_dimensions, base

    def forward(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """Rotate ``x`` (N, L, H, E).

        Args:
            start: position of the first token, or (N, L) positions of all.
        """
        half = self.query_dimensions // 2
        exact = {"device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
        exponents = torch.arange(half, **exact) / half
        if isinstance(start, Tensor) and start.ndim == 2:
            positions = start.to(**exact)
        else:
            positions = torch.arange(x.shape[1], **exact) + start
        angles = positions[..., None, None] * self.base**-exponents  # (L, 1, E/2), (N, L, 1, E/2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
