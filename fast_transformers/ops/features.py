"""How the mathematics sees a feature map, and how it evaluates one chunk of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from .kinds import Formula


def _identity(x: Tensor) -> Tensor:
    return x


class Features(NamedTuple):
    """Two functions of the last dimension: (N, C, H, E) to (N, C, H, F), token by token.

    Attributes:
        queries: phi of the queries, or its logarithm.
        keys: phi of the keys, or its logarithm.
        exponential: whether the two functions return log(phi). Such features are exponentiated
            relative to their running maximum, which cancels exactly.
        parameters: trained tensors inside the two functions; they receive gradients.
        dtype: dtype of the functions' own weights, None if they have none. Inputs are promoted
            to it, or else to the dtype of the sums.
        any_heads: the functions treat all heads alike, so they may be given some of them.
        formula: the same map by name, which the operators evaluate and differentiate themselves;
            None for a map that has no name there.
    """

    queries: Callable[[Tensor], Tensor] = _identity
    keys: Callable[[Tensor], Tensor] = _identity
    exponential: bool = False
    parameters: tuple[Tensor, ...] = ()
    dtype: torch.dtype | None = None
    any_heads: bool = False
    formula: Formula | None = None

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x as the two functions are given it, for sums in ``dtype``."""
        return x.to(torch.promote_types(x.dtype, self.dtype) if self.dtype else dtype)


IDENTITY = Features(any_heads=True, formula=Formula("identity"))


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype of sums over the sequence: float64 if an input is, else float32."""
    for x in tensors:
        if x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def transformed(x: Tensor | None) -> bool:
    """Whether torch.func differentiates or maps over a tensor, or it has a forward tangent."""
    if x is None or not transforming():
        return False
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return True
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x) or x.requires_grad:
            return True
        x = _functorch.get_unwrapped(x)
    return False


def transforming() -> bool:
    """Whether torch.func or forward-mode differentiation is at work at all."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Sums over the sequence stay in float32 inside an autocast region, too."""
    device = x.device.type
    if device in _AUTOCAST and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _AS_IT_IS


_AUTOCAST = {d for d in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(d)}
_AS_IT_IS = nullcontext()
