"""A feature map of your own inside the GPU kernels: phi(x) = relu(x)^2, its value and slope.

Used as ``ActivationFunctionFeatureMap.factory(squared_relu)``, or of random projections as
``GeneralizedRandomFeatures.factory(kernel_fn=squared_relu)``.
"""

import torch
import triton
import triton.language as tl

from fast_transformers import ops


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return x.relu().square()


@triton.jit
def value(x):
    return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)


@triton.jit
def slope(x):
    return 2.0 * tl.maximum(x, 0.0)


ops.register_elementwise(
    "squared_relu", squared_relu, lambda x: 2 * x.relu(), kernels=(value, slope)
)
