"""Element-wise functions and their derivatives, float32 to float32.

Those of users are registered in :mod:`..elementwise`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..elementwise import KERNELS


@triton.jit
def identity(x):
    return x


@triton.jit
def one(x):
    return x * 0.0 + 1.0


@triton.jit
def elu_plus_one(x):
    return tl.exp2(tl.minimum(x, 0.0) * 1.4426950408889634) + tl.maximum(x, 0.0)


@triton.jit
def elu_plus_one_slope(x):
    return tl.exp2(tl.minimum(x, 0.0) * 1.4426950408889634)


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0)


@triton.jit
def relu_slope(x):
    return tl.where(x > 0.0, 1.0, 0.0)


_FUNCTIONS = {
    "elu_plus_one": (elu_plus_one, elu_plus_one_slope),
    "relu": (relu, relu_slope),
}


def functions_of(name: str) -> tuple[Any, Any]:
    """Value and slope; those of the identity for kinds that need none."""
    return _FUNCTIONS.get(name) or KERNELS.get(name) or (identity, one)
