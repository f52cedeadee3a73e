"""What a worker measures: a call without arguments on inputs that were made before.

Inputs depend on their shape alone, so every process makes the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

HEADS, DIM = 8, 64
TAIL = 16  # tokens at the end of a sequence whose results are compared with the reference
# Queries and keys are small enough for denominators far above the eps of every contender, and
# for Favor's features not to vanish in those that work with the features themselves.
SCALE = 0.5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Job(Protocol):
    """One call, and what it gives."""

    def __call__(self) -> object: ...

    def results(self) -> dict[str, Tensor]:
        """What there is to check, by name: small tensors."""
        ...


class Inputs(NamedTuple):
    """Queries, keys, values and the gradient of the result, all (N, length, H, dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor


@functools.lru_cache(maxsize=1)
def make_inputs(batch: int, length: int) -> Inputs:
    """The inputs of a shape; the last ones are kept, as contenders come one after the other."""
    generator = torch.Generator().manual_seed(length)
    shape = (batch, length, HEADS, DIM)
    q, k, v, gradient = (torch.randn(shape, generator=generator) for _ in range(4))
    return Inputs(q.mul_(SCALE), k.mul_(SCALE), v, gradient)


class AttentionJob:
    """Attention over a whole sequence: the forward pass without gradients, or both passes.

    Args:
        attend: (N, L, H, E), (N, L, H, E), (N, L, H, M) to (N, L, H, M).
        batch: N.
        length: L.
        backward: whether gradients of queries, keys and values are computed as well.
        tail: how many tokens at the end :meth:`results` are of.
    """

    def __init__(
        self, attend: Attend, batch: int, length: int, backward: bool, tail: int = TAIL
    ) -> None:
        self.attend, self.backward, self.tail = attend, backward, tail
        *qkv, self.gradient = make_inputs(batch, length)
        self.qkv = [x.detach().requires_grad_(backward) for x in qkv]

    def __call__(self) -> Tensor:
        if not self.backward:
            with torch.no_grad():
                return self.attend(*self.qkv)
        self.forget()
        values = self.attend(*self.qkv)
        values.backward(self.gradient)
        return values

    def forget(self) -> None:
        """Drop the gradients of the last call."""
        for x in self.qkv:
            x.grad = None

    def results(self) -> dict[str, Tensor]:
        """Values and gradients at the last tokens of the last sequence's last head."""

        def corner(x: Tensor) -> Tensor:
            return x.detach()[-1, -self.tail :, -1].clone()

        found = {"values": corner(self())}
        if self.backward:
            names = ("query gradients", "key gradients", "value gradients")
            found |= {
                name: corner(x.grad)
                for name, x in zip(names, self.qkv, strict=True)
                if x.grad is not None
            }
            self.forget()
        return found
