"""How the mathematics sees a feature map, and how it evaluates one chunk of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from .formula import Formula


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
        composition: the same map as one with a formula, of other rows; None if it is none.
    """

    queries: Callable[[Tensor], Tensor] = _identity
    keys: Callable[[Tensor], Tensor] = _identity
    exponential: bool = False
    parameters: tuple[Tensor, ...] = ()
    dtype: torch.dtype | None = None
    any_heads: bool = False
    formula: Formula | None = None
    composition: Composition | None = None

    @property
    def learned(self) -> bool:
        """Whether the projection of the formula is to be given a gradient."""
        projection = None if self.formula is None else self.formula.projection
        if projection is None or not torch.is_grad_enabled():
            return False
        return projection.requires_grad or transformed(projection)

    @property
    def by_functions(self) -> Features:
        """The map for forms that differentiate no projection: autograd does, by its functions."""
        projection = None if self.formula is None else self.formula.projection
        if projection is None or not self.learned:
            return self
        return self._replace(formula=None, parameters=(projection,))

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x as the two functions are given it, for sums in ``dtype``."""
        return x.to(torch.promote_types(x.dtype, self.dtype) if self.dtype else dtype)


class Composition(NamedTuple):
    """phi(q) = inner(queries(q)), phi(k) = inner(keys(k)), and ``inner`` has a formula.

    Torch computes the rows in between, in the dtype of the values as any linear layer before an
    attention does, and their gradients; kernels compute the rest without writing a feature.
    """

    queries: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]
    inner: Features


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
