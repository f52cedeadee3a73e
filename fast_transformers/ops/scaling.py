"""Exponential features, exponentiated relative to running maxima that cancel exactly.

Normalised attention with features phi = exp(.) is a softmax over the pairs (feature i, key j)
with logits b_ti + a_ji, where b = log phi(q) and a = log phi(k). A factor exp(shift_i) taken out
of every key's feature i, and a factor exp(offset_t) taken out of query t, cancel in the ratio.
With the running maximum of the keys as shift and max_i(b_ti + shift_i) as offset every factor is
at most 1, so nothing overflows, and what underflows is negligible against a total of at least 1.

Features that are no exponentials have ``shift=None`` and pass through unchanged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lowest(dtype: torch.dtype) -> float:
    """A shift below every feature that stays finite under subtraction (unlike -inf)."""
    return torch.finfo(dtype).min


def headroom(dtype: torch.dtype) -> float:
    """How many nats a factor may exceed 1, or fall below it, without loss: 62 in float32."""
    return 0.7 * math.log(torch.finfo(dtype).max)


def key_factors(a: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """exp(a - new shift), the new shift, and the factor that old sums must be multiplied by.

    ``a`` is (G, C, F), ``shift`` (G, F).
    """
    if shift is None:
        return a, None, None
    new = torch.maximum(shift, a.detach().amax(1))  # a constant: the result does not depend on it
    return (a - new[:, None]).exp(), new, (shift - new).exp_()


def query_factors(b: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """exp(b + shift - offset) and the offset (G, C, 1), None for features that pass through."""
    if shift is None:
        return b, None
    b = b + shift[:, None]
    offset = b.detach().amax(-1, keepdim=True).clamp_(min=lowest(b.dtype))
    return (b - offset).exp(), offset


def normalise(
    numerator: Tensor, denominator: Tensor, offset: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """numerator / denominator with 0/0 = 0, and what the backward pass needs of the denominator.

    The second result, (G, C, 1), is the logarithm of the true denominator for exponential
    features (infinity where no key was seen) and the reciprocal of the denominator otherwise.
    ``eps`` is added to the denominator of features that are not exponentials.
    """
    if offset is None:
        denominator = denominator + eps
    empty = denominator == 0
    reciprocal = denominator.masked_fill(empty, 1.0).reciprocal().masked_fill(empty, 0.0)
    values = numerator * reciprocal
    if offset is None:
        return values, reciprocal
    return values, (denominator.detach().log() + offset).masked_fill_(empty, math.inf)


def is_spread(a: Tensor, shift: Tensor | None, masked: Tensor | None) -> bool:
    """Whether one reference for all keys of a chunk would cost some query of it its precision.

    A query sees only the keys before it, whose maximum may lie far below that of the chunk. The
    distance is at most that between the chunk's maximum and its first key (or its smallest key,
    if the first may be masked); one value is read back from the device to decide.
    """
    if shift is None or a.shape[1] == 1:
        return False
    first = a[:, 0] if masked is None else a.masked_fill(masked, math.inf).amin(1)
    gap = torch.maximum(shift, a.amax(1)) - torch.maximum(shift, first)
    return bool(gap.amax() > headroom(a.dtype))
