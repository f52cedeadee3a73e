"""The running sums over the keys, S = sum phi(k) v^T and z = sum phi(k), of one tile."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_state_width
from .layout import Tile
from .scaling import lowest, reference

Triple = tuple[Tensor, Tensor, Tensor | None]  # kv (N, H, F, M), z and shift (N, H, F)
SPREAD = 80.0  # powers of 2 between features, twice what :class:`.projected.Hyperbolic` takes


def empty_sums(v: Tensor, features: int, exponential: bool, dtype: torch.dtype) -> Triple:
    """The sums before the first key, for values like ``v`` (N, S, H, M)."""
    n, _, h, m = v.shape
    kv = v.new_zeros(n, h, features, m, dtype=dtype)
    z = v.new_zeros(n, h, features, dtype=dtype)
    return kv, z, torch.full_like(z, lowest(dtype)) if exponential else None


def start_from(state: Triple | None, sums: Triple) -> None:
    """Copy a state to sums of the same features."""
    if state is None:
        return
    check_state_width(state[1].shape[-1], sums[1].shape[-1])
    for given, mine in zip(state, sums, strict=True):
        if given is not None and mine is not None:
            mine.copy_(given)


class Sums:
    """S (G, F, M) and z (G, F), relative to 2^shift (G, F) for exponential features.

    S is a part of the (contiguous) state that it was taken from, and is changed in place; the
    other two are replaced, and :meth:`write` puts them back. While the sums are ``plain`` they
    are relative to 1 though features are exponential, and there is no shift.
    """

    def __init__(self, kv: Tensor, z: Tensor, shift: Tensor | None, plain: bool = False) -> None:
        self.kv, self.z, self.shift, self.plain = kv, z, shift, plain
        self._running: tuple[Tensor, ...] | None = None

    @classmethod
    def of_tile(cls, state: Triple, tile: Tile) -> Sums:
        kv, z, shift = (
            None if x is None else x.detach()[tile.rows, tile.heads].flatten(0, 1) for x in state
        )
        return cls(kv, z, shift)  # pyright: ignore[reportArgumentType]

    def write(self, state: Triple, tile: Tile) -> None:
        for mine, whole in zip((self.z, self.shift), state[1:], strict=True):
            if mine is not None and whole is not None:
                # cut as mine was: it may be this very memory
                whole[tile.rows, tile.heads].flatten(0, 1).copy_(mine)

    def snapshot(self) -> Sums:
        return Sums(self.kv.clone(), self.z.clone(), self.shift, self.plain)

    def level(self) -> tuple[Sums, Tensor] | None:
        """The same relative to one power of 2 for all features of a head, and its logarithm
        (G, 1, 1); None if they differ too much."""
        assert self.shift is not None
        top = self.shift.amax(-1, keepdim=True)
        less = self.shift - top
        if not less.amin() >= -SPREAD:
            return None
        factor = less.exp2_()
        return Sums(self.kv * factor[..., None], self.z * factor, None), top[..., None]

    def unshift(self) -> None:
        """Make the sums plain, if they are in range."""
        assert self.shift is not None
        some = self.z > 0
        low, high = torch.where(some, self.z.log2() + self.shift, 0.0).aminmax()
        if low >= -SPREAD / 2 and high <= SPREAD / 2:
            self._scale(torch.where(some, self.shift, 0.0).exp2_())
            self.shift, self.plain = None, True

    def settle(self) -> None:
        """Give sums that are plain the shift that :meth:`enter` works with."""
        if self.plain:
            self.shift, self.plain = self.z.log2().floor_().clamp_(min=lowest(self.z.dtype)), False
            self._scale(self.shift.clamp(min=-SPREAD).neg_().exp2_())

    def enter(self, a: Tensor, masked: bool = False, whole: bool = True) -> Tensor | None:
        """Factors of the keys of a block relative to a shift that includes them.

        None, and nothing is changed, if the block must be split: see :func:`.scaling.reference`.
        """
        if self.shift is None:
            return a
        shift = reference(a, self.shift, masked, whole)
        if shift is None:
            return None
        if shift is not self.shift:
            self._scale((self.shift - shift).exp2_())
            self.shift = shift
        return a.sub_(shift[:, None]).exp2_()

    def lower(self, shift: Tensor) -> None:
        """Sums of the future, R 2^shift, follow the shift on its way back to earlier keys."""
        if self.shift is not None and shift is not self.shift:
            self._scale((shift - self.shift).exp2_())
            self.shift = shift

    def _scale(self, factor: Tensor) -> None:
        self.kv.mul_(factor[..., None])
        self.z = self.z * factor

    def add(self, kappa: Tensor, v: Tensor) -> None:
        """Add keys (G, F, C) and values of one chunk to S; z is for :meth:`z_before` to follow."""
        self.kv.baddbmm_(kappa, v)

    def absorb(self, kappa: Tensor, across: Tensor, v: Tensor) -> None:
        """Add keys (G, C, F), and as (G, F, C), and their values (G, C, M)."""
        self.add(across, v)
        self.z = self.z + kappa.sum(1)

    def z_before(self, kappa: Tensor) -> Tensor:
        """z before each chunk of a block, (T*G, 1, F), in memory that the next block overwrites;
        afterwards z includes the block."""
        t, g, _, f = kappa.shape
        if self._running is None or len(self._running[0]) != t + 1:
            running = kappa.new_empty(t + 1, g, f)
            before = running[:-1].view(t * g, 1, f)
            self._running = running, running[1:], before, running[0], running[-1]
        running, totals, before, first, last = self._running
        first.copy_(self.z)
        torch.sum(kappa, 2, out=totals)
        running.cumsum_(0)
        self.z = last
        return before

    def z_after(self, totals: Tensor) -> Tensor:
        """z after each chunk of a block that is swept in reverse, (T, G, 1, F); then z includes
        the block, whose chunks' queries add ``totals`` (T*G, 1, F)."""
        after = []
        for total in reversed(totals.view(-1, *self.z.shape)):
            after.append(self.z)
            self.z = self.z + total
        return torch.stack(after[::-1])[:, :, None]
