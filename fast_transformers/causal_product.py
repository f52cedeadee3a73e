"""The older library's kernel entry point: the causal product of features, not normalised."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .ops import checks, stream
from .ops.features import IDENTITY, without_autocast


def causal_dot_product(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """out_l = Q_l sum_{s<=l} K_s V_s^T.

    Args:
        Q: (N, H, L, F), any strides, any floating dtype.
        K: (N, H, L, F).
        V: (N, H, L, M).

    Returns:
        (N, H, L, M) in the dtype of ``V``; the sums are float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for inputs that do not fit together.
    """
    q, k, v = (x.transpose(1, 2) for x in (Q, K, V))
    checks.check_inputs(q, k, v)
    checks.check_widths(q.shape[-1], k.shape[-1])
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"Q and K must have one length, got {q.shape[1]} and {k.shape[1]}; cut or pad them"
        )
    with without_autocast(Q):
        out, _ = stream.prefix_attention(
            q, k, v, IDENTITY, key_mask=None, state=None, eps=0.0, chunk_size=64, normalised=False
        )
    return out.to(v.dtype).transpose(1, 2)


def _dot(Q: Tensor, K: Tensor, V: Tensor, product: Tensor) -> None:
    product.copy_(causal_dot_product(Q, K, V))


def _dot_backward(
    Q: Tensor, K: Tensor, V: Tensor, grad: Tensor, gQ: Tensor, gK: Tensor, gV: Tensor
) -> None:
    inputs = [x.detach().requires_grad_() for x in (Q, K, V)]
    with torch.enable_grad():
        gradients = torch.autograd.grad(causal_dot_product(*inputs), inputs, grad)
    for out, gradient in zip((gQ, gK, gV), gradients, strict=True):
        out.copy_(gradient)


class CausalDotProduct:
    """The name other projects import; ``CausalDotProduct.apply(Q, K, V)``."""

    apply = staticmethod(causal_dot_product)
    dot: ClassVar[dict[str, Callable[..., None]]] = {"cpu": _dot, "cuda": _dot}
    dot_backward: ClassVar[dict[str, Callable[..., None]]] = {
        "cpu": _dot_backward,
        "cuda": _dot_backward,
    }
