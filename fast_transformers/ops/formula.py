"""A feature map by its name, and what the passes ask of it: value and derivative of one chunk.

A map in :mod:`.kinds` is given as a name, a projection and a few numbers, so that it can be an
argument of an operator of ``torch.library``, and its derivative is a handful of element-wise
operations on the features themselves, which the backward pass has at hand anyway. Any other map
is differentiated by autograd, chunk by chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)


class Formula(NamedTuple):
    """A feature map by name.

    Attributes:
        kind: a key of :data:`~.kinds.KINDS`.
        projection: (E, K) directions of the kinds that project, random or trained.
        numbers: what else the kind needs, see its class.
    """

    kind: str
    projection: Tensor | None = None
    numbers: tuple[float, ...] = ()


class Kind:
    """phi of rows, (..., E) to (..., F), and its pull-back; this one is phi(x) = x.

    Exponential kinds give log2(phi), and are pulled back from the gradient of log(phi). ``out``
    is memory for the features, (..., F) in one piece.
    """

    exponential = False
    positive = False  # no feature below 0; above 0, if exponential
    never_zero = True  # above 0, so that no denominator is small; or given by the caller
    in_blocks = False  # one block is evaluated after the other, and done with before the next

    def __init__(self, formula: Formula, dtype: torch.dtype) -> None:
        """Prepare what all chunks share; ``dtype`` is that of the sums."""

    @classmethod
    def width(cls, formula: Formula, dims: int) -> int:
        """F of E."""
        return dims

    def queries(self, x: Tensor, shift: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """``shift`` is added to the logarithms of exponential kinds."""
        phi = self.value(x, out)
        return phi if shift is None else phi.add_(shift)

    def keys(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self.value(x, out)

    def both(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of one token: small operations cost what they cost, whatever they are given."""
        of_queries, of_keys = self.value(torch.stack((q, k))).unbind()
        return of_queries, of_keys

    def value(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return x if out is None else out.copy_(x)

    def queries_back(self, gradient: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        """Gradient of x from that of phi, which may be overwritten."""
        return self.back(gradient, phi)

    def keys_back(self, gradient: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        return self.back(gradient, phi)

    def back(self, gradient: Tensor, phi: Tensor) -> Tensor:
        return gradient
