"""Exponential features, exponentiated relative to running maxima that cancel exactly.

Normalised attention with features phi = 2^(.) is a softmax over the pairs (feature i, key j)
with logits b_ti + a_ji, where b = log2 phi(q) and a = log2 phi(k). A factor 2^shift_i taken out
of every key's feature i, and a factor 2^offset_t taken out of query t, cancel in the ratio.
With the running maximum of the keys as shift and max_i(b_ti + shift_i) as offset every factor is
at most 1, so nothing overflows, and what underflows is negligible against a total of at least 1.

Logarithms are to base 2 throughout: powers of 2 are the cheaper exponentials. Features that are
no exponentials have ``shift=None`` and pass through unchanged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lowest(dtype: torch.dtype) -> float:
    """A shift below every feature that stays finite under subtraction (unlike -inf)."""
    return torch.finfo(dtype).min


def headroom(dtype: torch.dtype) -> float:
    """How many powers of 2 a factor may exceed 1, or fall below it, without loss."""
    return 0.7 * math.log2(torch.finfo(dtype).max)


def key_factors(a: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """2^(a - new shift), the new shift, and the factor that old sums must be multiplied by.

    ``a`` is (T, G, C, F) and overwritten if exponential, ``shift`` (G, F).
    """
    if shift is None:
        return a, None, None
    new = torch.maximum(shift, largest(a))
    return a.sub_(new[:, None]).exp2_(), new, (shift - new).exp2_()


def query_factors(b: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """2^(b + shift - offset) and the offset (T, G, C, 1), None for features that pass through."""
    if shift is None:
        return b, None
    b.add_(shift[:, None])
    offset = b.amax(-1, keepdim=True).clamp_(min=lowest(b.dtype))
    return b.sub_(offset).exp2_(), offset


def largest(a: Tensor) -> Tensor:
    """Of each feature, over the tokens: (T, G, C, F) to (G, F)."""
    return a.amax(2).amax(0)


def factors_of(denominator: Tensor, offset: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Reciprocal of a denominator, 0 for 0, and what the backward pass needs of it.

    The latter is log2 of the true denominator for exponential features (infinity where no key
    was seen) and the reciprocal otherwise. ``eps`` is added to the denominator of features that
    are not exponentials. All are (T, G, C, 1); the denominator is overwritten.
    """
    if offset is None:
        denominator += eps
    denominator.masked_fill_(denominator == 0, math.inf)
    reciprocal = denominator.reciprocal()
    return reciprocal, reciprocal if offset is None else denominator.log2_().add_(offset)


def is_spread(a: Tensor, shift: Tensor | None, drop: Tensor | None) -> bool:
    """Whether one reference for all keys of a block would cost some query of it its precision.

    A query sees only the keys before it, whose maximum may lie far below that of the block. The
    distance is at most that between the block's maximum and its first key (or its smallest key,
    if the first may be masked); one value is read back from the device to decide.
    """
    if shift is None or a.shape[0] * a.shape[2] == 1:
        return False
    first = a[0, :, 0] if drop is None else a.masked_fill(drop, math.inf).amin(2).amin(0)
    gap = torch.maximum(shift, largest(a)) - torch.maximum(shift, first)
    return bool(gap.amax() > headroom(a.dtype))
