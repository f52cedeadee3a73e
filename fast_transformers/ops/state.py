"""What linear attention remembers of the keys and values it has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LinearState:
    """Sums over the keys seen so far; a value: no function changes it behind the caller's back.

    With features that are exponentials the sums are kept relative to the largest key feature
    seen, so that they neither overflow nor underflow: the true sums are ``2**shift * kv`` and
    ``2**shift * z``.

    Unpacks as the pair of true sums that the older library used: ``S, Z = state``. Such a pair
    (list or tuple) is accepted wherever a state goes in; it lacks the shift and so its range.

    Attributes:
        kv: (N, H, F, M) sum of phi(k) v^T. float32; float64 if the inputs are.
        z: (N, H, F) sum of phi(k), in the same dtype.
        shift: (N, H, F) log2 of the factor taken out of each feature, or None for
            features that are not exponentials.
    """

    kv: Tensor
    z: Tensor
    shift: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        if self.shift is None:
            return iter((self.kv, self.z))
        scale = self.shift.exp2()
        return iter((scale[..., None] * self.kv, scale * self.z))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return tuple(self)[index]

    def map(self, function: Callable[[Tensor], Tensor]) -> LinearState:
        """A state with ``function`` applied to each tensor: ``state.map(Tensor.detach)``."""
        shift = None if self.shift is None else function(self.shift)
        return type(self)(function(self.kv), function(self.z), shift)

    def reorder(self, rows: Tensor) -> LinearState:
        """The state of the given batch rows (int64, 1-D), as a beam search needs it."""
        return self.map(lambda tensor: tensor.index_select(0, rows))

    @property
    def nbytes(self) -> int:
        """Bytes that the state occupies, whatever the length of the past."""
        return sum(t.nbytes for t in (self.kv, self.z, self.shift) if t is not None)


class OwnedState(LinearState):
    """Sums that belong to one loop of generation: a step writes the new sums over them.

    Whatever else is made of it is an ordinary :class:`LinearState`.
    """

    def map(self, function: Callable[[Tensor], Tensor]) -> LinearState:
        """An ordinary state with ``function`` applied to each tensor."""
        return LinearState(self.kv, self.z, self.shift).map(function)


torch.export.register_dataclass(LinearState)  # states may go in and out of an exported program


class Attended(NamedTuple):
    """The result of every form of linear attention."""

    values: Tensor  # (N, L, H, M); (N, H, M) for a single step
    state: LinearState


def as_state(
    state: LinearState | Sequence[Tensor] | None, exponential: bool
) -> LinearState | None:
    """Read a state or the older ``[S, Z]`` pair; a pair holds true sums, hence a shift of 0."""
    if state is None or isinstance(state, LinearState):
        return state
    if not (isinstance(state, list | tuple) and len(state) == 2):
        raise TypeError(
            "state must be the state an earlier call returned, or a pair [S, Z], "
            f"got {type(state).__name__}"
        )
    kv, z = state
    return LinearState(kv, z, torch.zeros_like(z) if exponential else None)
