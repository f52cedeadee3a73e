"""Products of each head with a matrix of its own, or of all heads with one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def leading(heads: int | None) -> tuple[int, ...]:
    """The first dimensions of what a map keeps per head; ValueError for less than one head."""
    if heads is not None and heads < 1:
        raise ValueError(f"heads must be at least 1, or None to treat all alike, got {heads}")
    return () if heads is None else (heads,)


def multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """x (..., E) times (E, F), or x (..., H, E) times (H, E, F): (..., F) in the dtype of x."""
    matrix = matrix.to(x.dtype)
    if matrix.ndim == 2:
        return x @ matrix
    check_heads(x, matrix.shape[0])
    return torch.einsum("...he,hef->...hf", x, matrix)


def check_heads(x: Tensor, heads: int) -> None:
    """x is (..., H, E) of so many heads, or ValueError."""
    if x.ndim < 2 or x.shape[-2] != heads:
        raise ValueError(
            f"the feature map was made with heads={heads}, got inputs of shape "
            f"{tuple(x.shape)}; make it with the heads of the queries, which keys must have too"
        )


def hold(module: nn.Module, name: str, value: Tensor, learned: bool) -> None:
    """Register a parameter if it is ``learned``, else a buffer."""
    if learned:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


class HeadLinear(nn.Module):
    """x W + b, with W (E, F) and b (F), or W (H, E, F) and b (H, F) for each head.

    Args:
        dims: E.
        features: F.
        heads: H; None for one W that all heads share.
        bias: whether there is a b, which starts at 0 or as that of ``nn.Linear``.
        initial: W starts as "uniform" (as in ``nn.Linear``), "identity", or "orthonormal" columns.
    """

    def __init__(
        self,
        dims: int,
        features: int,
        heads: int | None = None,
        bias: bool = True,
        initial: str = "uniform",
    ) -> None:
        super().__init__()
        first = leading(heads)
        self.initial = initial
        self.weight = nn.Parameter(torch.empty(*first, dims, features))
        self.bias = nn.Parameter(torch.empty(*first, features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        dims = self.weight.shape[-2]
        bound = dims**-0.5
        with torch.no_grad():
            for matrix in self.weight.view(-1, *self.weight.shape[-2:]).unbind():
                if self.initial == "identity":
                    nn.init.eye_(matrix)
                elif self.initial == "orthonormal":
                    nn.init.orthogonal_(matrix)
                else:
                    nn.init.uniform_(matrix, -bound, bound)
        if self.bias is not None:
            if self.initial == "uniform":
                nn.init.uniform_(self.bias, -bound, bound)
            else:
                nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = multiply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class TwoSides(nn.Module):
    """A :class:`HeadLinear` of queries and one of keys, or one of both if they are ``tied``.

    Args: those of :class:`HeadLinear`.
    """

    def __init__(self, *args: Any, tied: bool, **options: Any) -> None:
        super().__init__()
        self.queries = HeadLinear(*args, **options)
        self.keys = None if tied else HeadLinear(*args, **options)

    def of_queries(self, x: Tensor) -> Tensor:
        return self.queries(x)

    def of_keys(self, x: Tensor) -> Tensor:
        return self.queries(x) if self.keys is None else self.keys(x)
