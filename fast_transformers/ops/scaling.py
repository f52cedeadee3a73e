"""Exponential features, exponentiated relative to running maxima that cancel exactly.

Normalised attention with features phi = 2^(.) is a softmax over the pairs (feature i, key j)
with logits b_ti + a_ji, where b = log2 phi(q) and a = log2 phi(k). A factor 2^shift_i taken out
of every key's feature i, and a factor 2^offset_t taken out of query t, cancel in the ratio.
With the running maximum of the keys as shift and max_i(b_ti + shift_i) as offset every factor is
at most 1, so nothing overflows, and what underflows is negligible against a total of at least 1.
(The shift may lag behind by a few powers of 2, see :func:`reference`.)

Logarithms are to base 2 throughout: powers of 2 are the cheaper exponentials. Features that are
no exponentials have ``shift=None`` and pass through unchanged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SLACK = 10.0  # powers of 2 by which keys may exceed the shift


def lowest(dtype: torch.dtype) -> float:
    """A shift below every feature that stays finite under subtraction (unlike -inf)."""
    return torch.finfo(dtype).min


def headroom(dtype: torch.dtype) -> float:
    """How many powers of 2 a factor may exceed 1, or fall below it, without loss."""
    return 0.7 * math.log2(torch.finfo(dtype).max)


def reference(a: Tensor, shift: Tensor, drop: Tensor | None, whole: bool) -> Tensor | None:
    """The shift for a block of keys; None if its keys differ too much for a common one.

    Too much would cost some query of the block its precision: a query sees only the keys before
    it, whose maximum may lie far below that of the block. The distance is at most that between
    the block's maximum and its first key (or its smallest key, if the first may be masked).

    The shift stays as it is while no key exceeds it by much, which saves the work of rescaling
    the sums. One or two values are read back from the device to decide; a ``whole`` block, which
    no query is part of, has a shift in any case and needs no reading on a GPU.

    Args:
        a: (T, G, C, F) log2 of the keys' features.
        shift: (G, F) so far.
        drop: (T, G, C, 1), where keys are masked.
        whole: whether all queries see all keys of the block.
    """
    top = a.amax(2).amax(0)
    rise = (top - shift).amax()
    if whole or a.shape[0] * a.shape[2] == 1:
        stays = a.device.type == "cpu" and bool(rise <= _SLACK)
    else:
        first = a[0, :, 0] if drop is None else a.masked_fill(drop, math.inf).amin(2).amin(0)
        gap = (torch.maximum(shift, top) - torch.maximum(shift, first)).amax()
        highest, widest = torch.stack([rise, gap]).tolist()
        if widest > headroom(a.dtype):
            return None
        stays = highest <= _SLACK
    return shift if stays else torch.maximum(shift, top)


def query_factors(b: Tensor) -> tuple[Tensor, Tensor]:
    """2^(b - offset) and the offset (T, G, C, 1), for b that include the shift of the keys."""
    offset = b.amax(-1, keepdim=True).clamp_(min=lowest(b.dtype))
    return b.sub_(offset).exp2_(), offset


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
