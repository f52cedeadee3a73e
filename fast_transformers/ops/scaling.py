"""Exponential features, exponentiated relative to running maxima that cancel exactly.

Normalised attention with features phi = 2^(.) is a softmax over the pairs (feature i, key j)
with logits b_ti + a_ji, where b = log2 phi(q) and a = log2 phi(k). A factor 2^shift_i taken out
of every key's feature i, and a factor 2^offset_t taken out of query t, cancel in the ratio.
With the running maximum of the keys as shift and max_i(b_ti + shift_i) as offset every factor is
at most 1, so nothing overflows, and what underflows is negligible against a total of at least 1.
(The shift may lag behind by a few powers of 2, see :func:`reference`.)

On a CPU the features 2^(offset +- u) of most keys are summed as they are, from the first block
on and until one is out of range (:meth:`.sums.Sums.unshift`): |u| and -offset are at most 40, and
sums begin between 2^-40 and 2^40. Features are 2^-80 to 2^40 then; what a million keys add to
products with queries is less than 2^110; and denominators, one of each pair of whose terms is at
least 2^offset, are at least 2^-40: far from the ends of float32, 2^-126 and 2^128. Queries that
are out of range themselves have an offset of their own; what of their factors underflows is
negligible, as the features of a key, and so sums over keys, differ by 2^80 at most.

Logarithms are to base 2 throughout: powers of 2 are the cheaper exponentials. Features that are
no exponentials have ``shift=None`` and pass through unchanged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SLACK = 10.0  # powers of 2 by which keys may exceed the shift


def lowest(dtype: torch.dtype) -> float:
    """A shift below every feature that stays finite under subtraction (unlike -inf)."""
    return torch.finfo(dtype).min


def headroom(dtype: torch.dtype) -> float:
    """How many powers of 2 a factor may exceed 1, or fall below it, without loss."""
    return 0.7 * math.log2(torch.finfo(dtype).max)


def reference(a: Tensor, shift: Tensor, masked: bool, whole: bool) -> Tensor | None:
    """The shift for a block of keys; None if its keys differ too much for a common one.

    The shift stays as it is while no key exceeds it by much, which saves the work of rescaling
    the sums; a value is read back from the device to decide. Only on a GPU a ``whole`` block,
    which no query is part of, is given a new one without reading.

    Args:
        a: (T, G, C, F) log2 of the keys' features.
        shift: (G, F) so far.
        masked: whether keys may be masked, with features of 0.
        whole: whether all queries see all keys of the block.
    """
    top = a.amax(2).amax(0)  # over both at once takes ten times as long
    if not whole or a.device.type == "cpu":
        if float((top - shift).amax()) <= SLACK:
            return shift
        single = a.shape[0] * a.shape[2] == 1
        if not whole and not single and _gap(a, top, shift, masked) > headroom(a.dtype):
            return None
    return torch.maximum(shift, top)


def _gap(a: Tensor, top: Tensor, shift: Tensor, masked: bool) -> float:
    """How far a block's shift may lie above what one of its queries sees, in powers of 2.

    A query sees what came before the block, or else the block's first key at least. If that may
    be masked the smallest key stands for it.
    """
    if masked:
        smallest = a.masked_fill(a == -math.inf, math.inf).amin(2).amin(0)
        seen = torch.where(shift > lowest(a.dtype), shift, smallest)
    else:
        seen = torch.maximum(shift, a[0, :, 0])
    return float((torch.maximum(shift, top) - torch.maximum(shift, seen)).amax())


def query_factors(b: Tensor) -> tuple[Tensor, Tensor]:
    """2^(b - offset) and the offset (T, G, C, 1), for b that include the shift of the keys."""
    offset = b.amax(-1, keepdim=True).clamp_(min=lowest(b.dtype))
    return b.sub_(offset).exp2_(), offset


def factor_of(denominator: Tensor, eps: float, positive: bool) -> Tensor:
    """Reciprocal of a denominator after ``eps`` is added to it in place, and 0 for 0.

    ``positive`` says that it is known to be larger than 0 with ``eps``.
    """
    if eps:
        denominator += eps
    if not positive:
        denominator.masked_fill_(denominator == 0, math.inf)
    return denominator.reciprocal()


def norm_of(denominator: Tensor, factor: Tensor, offset: Tensor | float | None) -> Tensor:
    """What the backward pass needs of a denominator, which may be overwritten.

    For exponential features, log2 of the true denominator (infinity where no key was seen).
    """
    return factor if offset is None else denominator.log2_().add_(offset)
