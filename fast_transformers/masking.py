"""Masks. Everywhere in this package True (or 1) means *keep*, False (or 0) means drop.

This is the opposite of torch's `key_padding_mask`, where True means drop.

    FullMask(mask)                   any boolean matrix
    LengthMask(lengths, max_len)     row i keeps its first lengths[i] columns: padding
    TriangularCausalMask(N)          row i keeps columns 0..i: no looking ahead

A mask is an object, not a tensor, and always truthy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Device = torch.device | str | int


class BaseMask:
    """What every mask offers; a subclass need only define `bool_matrix`.

    All are computed on first use and kept. The bools `all_ones` and `lower_triangular` then wait
    for the device, unless the constructor knew them.
    """

    # None until known; set by the constructors that know without looking at any data.
    _all_ones: bool | None = None
    _lower_triangular: bool | None = None

    @property
    def bool_matrix(self) -> Tensor:
        """The mask itself, True = keep; most often (rows, columns)."""
        raise NotImplementedError(f"{type(self).__name__} must define bool_matrix")

    @property
    def float_matrix(self) -> Tensor:
        """`bool_matrix` in float32: 1 keep, 0 drop."""
        return self._cached("float_matrix", lambda: self.bool_matrix.float())

    @property
    def additive_matrix(self) -> Tensor:
        """Float32 to add to logits: 0 keep, -inf drop."""
        return self._cached("additive_matrix", lambda: torch.log(self.float_matrix))

    @property
    def additive_matrix_finite(self) -> Tensor:
        """Float32 to add to logits: 0 keep, -1e24 drop."""
        return self._cached("additive_matrix_finite", lambda: (~self.bool_matrix).float() * -1e24)

    @property
    def lengths(self) -> Tensor:
        """How many columns each row keeps: int64, the shape without its last dimension.

        Raises ValueError unless every row is a block of True, then a block of False.
        """

        def count() -> Tensor:
            counts = self.bool_matrix.sum(-1)
            if not torch.equal(self.bool_matrix, _first_columns(counts, self.shape[-1])):
                raise ValueError("The mask is not a length mask")
            return counts

        return self._cached("lengths", count)

    @property
    def shape(self) -> torch.Size:
        """The shape of `bool_matrix`."""
        return self.bool_matrix.shape

    @property
    def all_ones(self) -> bool:
        """Whether everything is kept."""
        if self._all_ones is None:
            self._all_ones = bool(self.bool_matrix.all())
        return self._all_ones

    @property
    def known_all_ones(self) -> bool:
        """Whether everything is kept as far as is known by now; never waits for the device."""
        return self._all_ones is True

    @property
    def lower_triangular(self) -> bool:
        """Whether row i keeps exactly columns 0..i; columns past the last row do not count."""
        if self._lower_triangular is None:
            try:
                self._lower_triangular = _counts_from_one(self.lengths)
            except ValueError:
                self._lower_triangular = False
        return self._lower_triangular

    def to(self, device: Device) -> BaseMask:
        """The same mask on `device`; this very object when it is there already."""
        mine = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved = {name: _move(value, device) for name, value in mine.items()}
        if all(moved[name] is mine[name] for name in mine):
            return self
        mask = copy.copy(self)
        vars(mask).update(moved, _cache={})
        return mask

    def _cached(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        if torch.compiler.is_compiling():
            return build()  # a tensor of a compiled graph must not outlive the call
        cache: dict[str, Tensor] = vars(self).setdefault("_cache", {})
        if name not in cache:
            with torch.inference_mode(False):  # a later training step may use it too
                cache[name] = build()
        return cache[name]


class FullMask(BaseMask):
    """Any boolean matrix, `FullMask(mask)`, or all ones, `FullMask(N)` and `FullMask(N, M)`.

    Args:
        mask: boolean tensor of any rank, True = keep, which is copied; the rest is then ignored.
        N: number of rows of an all-ones mask, which takes no memory.
        M: number of columns, default N.
        device: where the all-ones mask lives, default "cpu".

    Raises ValueError if `mask` is another tensor, or neither `mask` nor `N` is given.
    """

    def __init__(
        self,
        mask: Tensor | int | None = None,
        N: int | None = None,
        M: int | None = None,
        device: Device = "cpu",
    ) -> None:
        if isinstance(mask, Tensor):
            if mask.dtype != torch.bool:
                raise ValueError(
                    f"FullMask expects the mask to be bool, got {mask.dtype}; pass mask.bool()"
                )
            self._mask = mask.clone()
            return
        if isinstance(mask, int | torch.SymInt):
            if N is None:
                N = mask
            elif M is None:
                N, M = mask, N
        if N is None:
            raise ValueError(f"Either mask or N should be provided, got mask={mask!r}, N=None")
        M = M or N
        self._mask = torch.ones((), dtype=torch.bool, device=device).expand(N, M)
        self._all_ones = True
        self._lower_triangular = 1 == N == M  # an exporter must not compare N with M

    @property
    def bool_matrix(self) -> Tensor:
        return self._mask


class LengthMask(BaseMask):
    """Row i keeps its first `lengths[i]` columns.

    Args:
        lengths: (N,) tensor (integer or float) or list; copied.
        max_len: number of columns, default the longest length, or as many as the keys where
            the mask serves as key lengths.
        device: where the mask lives, default the device of `lengths`.

    Raises TypeError for boolean `lengths`, RuntimeError for empty ones without `max_len`.
    """

    def __init__(
        self,
        lengths: Tensor | Sequence[float],
        max_len: int | None = None,
        device: Device | None = None,
    ) -> None:
        lengths = torch.as_tensor(lengths)
        if lengths.dtype == torch.bool:
            raise TypeError("lengths must be numbers, got bool; use FullMask(mask) for a matrix")
        self._lengths = lengths.detach().clone().to(lengths.device if device is None else device)
        self.max_len = max_len if isinstance(max_len, torch.SymInt) else int(max_len or 0) or None
        if self.max_len is None and not self._lengths.numel():
            raise RuntimeError("lengths is empty, so it has no longest one; pass max_len")

    @staticmethod
    def full(n: int, length: int, device: Device | None = None) -> LengthMask:
        """`n` rows that keep all of their `length` columns, known without reading any data."""
        mask = LengthMask(torch.full((n,), length, device=device), max_len=length)
        mask._all_ones = True
        return mask

    @property
    def lengths(self) -> Tensor:
        """The lengths as given: not clamped to `max_len`, and in their own dtype."""
        return self._lengths

    @property
    def bool_matrix(self) -> Tensor:
        return self._cached("bool_matrix", lambda: self._columns(self._width))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self._lengths.numel(), self._width))

    @property
    def known_all_ones(self) -> bool:
        # without max_len the mask may be widened, by columns that are dropped
        return self.max_len is not None and self._all_ones is True

    def at_width(self, width: int) -> Tensor:
        """(N, width) boolean matrix, without a wait; ValueError if `max_len` is another width."""
        if self.max_len is None:
            return self._columns(width)
        if self.max_len != width:
            wanted = f"max_len must be {width}, the padded length, or left out"
            raise ValueError(f"{wanted}; got {self.max_len}: build the mask with max_len={width}")
        return self.bool_matrix

    def _columns(self, width: int) -> Tensor:
        return _first_columns(self._lengths.reshape(-1), width)

    @property
    def _width(self) -> int:
        return self.max_len or max(0, math.ceil(self._lengths.max().item()))


class TriangularCausalMask(LengthMask):
    """Row i keeps columns 0..i of N, so a position sees its past; ValueError if N < 1."""

    def __init__(self, N: int, device: Device = "cpu") -> None:
        if N < 1:
            raise ValueError(f"N must be at least 1, got {N}; skip empty sequences")
        super().__init__(torch.arange(1, N + 1, device=device), max_len=N)
        self._all_ones = N == 1
        self._lower_triangular = True


def as_mask(mask: object, name: str) -> BaseMask:
    """`mask` as a `BaseMask`: masks pass through, a boolean tensor becomes a `FullMask`.

    Raises TypeError, with `name` in its message, for anything else.
    """
    if isinstance(mask, BaseMask):
        return mask
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return FullMask(mask)
    got, remedy = type(mask).__name__, "use FullMask(tensor) or LengthMask(lengths)"
    if isinstance(mask, Tensor):
        got = f"a {mask.dtype} tensor of shape {tuple(mask.shape)}"
        are_lengths = mask.ndim == 1 and not mask.is_floating_point()
        remedy = "use LengthMask(lengths, max_len=...)" if are_lengths else "pass mask.bool()"
        remedy += "; torch's key_padding_mask is the opposite, True = drop"
    raise TypeError(f"{name} must be a mask or a bool tensor, True = keep, got {got}; {remedy}")


def key_padding(mask: BaseMask, n: int, length: int, name: str = "key_lengths") -> Tensor | None:
    """Which keys of which sequence are real; never waits for the device.

    Raises ValueError, with `name` in its message, if the mask has another shape.

    Args:
        mask: (n, length) or (1, length); a `LengthMask` without `max_len` widens to `length`.
        n: number of sequences.
        length: padded length of the keys.

    Returns:
        (n, length) bool, on the mask's device; None if the mask is known to keep every key.
    """
    widens = isinstance(mask, LengthMask) and mask.max_len is None
    shape = (mask.lengths.numel(), length) if widens else tuple(mask.shape)
    if shape not in ((n, length), (1, length)):
        raise ValueError(
            f"{name} must have shape ({n}, {length}) or (1, {length}), a row for each sequence, "
            f"got {shape}; use LengthMask(lengths, max_len={length}) with {n} lengths"
        )
    if mask.known_all_ones:
        return None
    keep = mask.at_width(length) if isinstance(mask, LengthMask) else mask.bool_matrix
    return keep.expand(n, length)


def _first_columns(lengths: Tensor, width: int) -> Tensor:
    """(..., width): True in the first `lengths` columns of each row."""
    if lengths.is_floating_point():  # half precision cannot count up to the usual widths
        lengths = lengths.to(torch.promote_types(lengths.dtype, torch.float32))
    return torch.arange(width, device=lengths.device) < lengths[..., None]


def _counts_from_one(lengths: Tensor) -> bool:
    """Whether `lengths` is the vector 1, 2, 3, ..."""
    steps = torch.arange(1, lengths.numel() + 1, device=lengths.device)
    return lengths.ndim == 1 and bool((lengths == steps).all())


def _move(tensor: Tensor, device: Device) -> Tensor:
    """`tensor.to(device)`, but a matrix expanded from a single value stays that small."""
    value = tensor if any(tensor.stride()) else tensor.as_strided((), ())
    moved = value.to(device)
    return tensor if moved is value else moved.expand(tensor.shape)
