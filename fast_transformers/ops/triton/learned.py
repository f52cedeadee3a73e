"""The gradient of a trained projection W, from that of the products u = s x W of all rows.

    dW = s sum over tokens and heads of x^T du

Kernels compute du anyway, block by block, and store it if W is trained. The sum is a product of
matrices over all tokens, which torch does best. What Favor subtracts, |x|^2, has no part in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Launch


def of_products(call: Launch, x: Tensor) -> Tensor:
    """Memory for du (N, length, H*R, K) of the queries, or of the keys of each query head."""
    dtype = x.dtype if x.dtype == torch.bfloat16 else torch.float32  # float16 has no range
    return call.empty(*x.shape[:2], call.q_heads, call.map.PAIRS.value, dtype=dtype)


def of_projection(call: Launch, x: Tensor, mask: Tensor | None, du: Tensor) -> Tensor:
    """dW (E, K) in float32, of rows x (N, length, H, E); masked ones may hold anything."""
    if x.shape[2] < du.shape[2]:
        du = du.unflatten(2, (x.shape[2], -1)).sum(3)
    if mask is not None:
        x = x.masked_fill(~mask[:, :, None, None], 0)
    product = x.flatten(0, 2).mT.to(du.dtype) @ du.flatten(0, 2)
    return product.float() * call.map.back
