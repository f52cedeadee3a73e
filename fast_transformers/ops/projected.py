"""Feature maps of projections, named: random features of every kind."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .formula import LOG2E, Formula, Kind
from .products import laid_out, product


class _Room:
    """Memory for rows (..., E) and their projections (..., K), and views of it as matrices."""

    def __init__(self, x: Tensor, directions: int) -> None:
        self.rows = x.new_empty(x.shape)
        self.u = x.new_empty(*x.shape[:-1], directions)
        self.matrix, self.product = self.rows.flatten(0, -2), self.u.flatten(0, -2)


class Projected(Kind):
    """f(u), u = sqrt(softmax_temp) x omega; ``numbers`` begins with the softmax_temp."""

    never_zero = False
    per_direction = 1
    unit = 1.0  # of u

    def __init__(self, formula: Formula, dtype: torch.dtype) -> None:
        assert formula.projection is not None
        self.temp, self.numbers = formula.numbers[0], formula.numbers[1:]
        self.omega = formula.projection.to(dtype)
        self.scale = self.temp**0.5 * self.unit
        self._scaled: Tensor | None = None
        self._back: Tensor | None = None
        self._room: _Room | None = None

    @classmethod
    def width(cls, formula: Formula, dims: int) -> int:
        assert formula.projection is not None
        return cls.per_direction * formula.projection.shape[1]

    def project(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """u, perhaps in ``out``; of one block after another, in memory that the next overwrites.

        Whatever is smaller is scaled, the one token of a step or the projection.
        """
        weights = self._scaled
        if weights is None:
            if x.numel() < self.omega.numel():
                x, weights = x * self.scale, self.omega
            else:
                weights = self._scaled = laid_out(self.omega * self.scale)
        if self.in_blocks and out is None:
            return self._project_block(x, weights)
        out = None if out is None else out.flatten(0, -2)
        u = product(x.reshape(-1, x.shape[-1]), weights, out)
        return u.view(*x.shape[:-1], weights.shape[1])

    def _project_block(self, x: Tensor, weights: Tensor) -> Tensor:
        room = self._room
        if room is None or room.rows.shape != x.shape:
            room = self._room = _Room(x, weights.shape[1])
        room.rows.copy_(x)
        found = product(room.matrix, weights, room.product)
        return room.u if found is room.product else found.view(room.u.shape)

    def project_back(self, gradient: Tensor) -> Tensor:
        if self._back is None:
            self._back = laid_out(self.omega.mT * self.temp**0.5)
        dx = product(gradient.reshape(-1, gradient.shape[-1]), self._back)
        return dx.view(*gradient.shape[:-1], self._back.shape[1])

    def value(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self.function(self.project(x), out)

    def back(self, gradient: Tensor, phi: Tensor) -> Tensor:
        return self.project_back(self.function_back(gradient, phi))

    def function(self, u: Tensor, out: Tensor | None) -> Tensor:
        """phi of u, which may be overwritten."""
        raise NotImplementedError

    def function_back(self, gradient: Tensor, phi: Tensor) -> Tensor:
        """Gradient of u."""
        raise NotImplementedError


class ProjectedRelu(Projected):
    """relu(u)."""

    positive = True

    def value(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self.function(self.project(x, out), out)

    def function(self, u: Tensor, out: Tensor | None) -> Tensor:
        return torch.clamp_min(u, 0.0, out=out)

    def function_back(self, gradient: Tensor, phi: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(gradient, phi, 0)


class Fourier(Projected):
    """[cos u, sin u] / sqrt(K)."""

    per_direction = 2

    def function(self, u: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            waves = torch.cat([u.cos(), u.sin_()], -1)
        else:
            waves, width = out[..., : 2 * u.shape[-1]], u.shape[-1]
            torch.cos(u, out=waves[..., :width])
            torch.sin(u, out=waves[..., width:])
        return waves.mul_(u.shape[-1] ** -0.5)

    def function_back(self, gradient: Tensor, phi: Tensor) -> Tensor:
        width = self.omega.shape[1]
        cos, sin = phi[..., :width], phi[..., width : 2 * width]
        d_cos, d_sin = gradient[..., :width], gradient[..., width : 2 * width]
        return (d_sin * cos).sub_(d_cos * sin)


class SmoothedFourier(Fourier):
    """Fourier features and the constant sqrt(smoothing); ``numbers``: softmax_temp, smoothing."""

    @classmethod
    def width(cls, formula: Formula, dims: int) -> int:
        return super().width(formula, dims) + 1

    def function(self, u: Tensor, out: Tensor | None) -> Tensor:
        waves, constant = super().function(u, out), math.sqrt(self.numbers[0])
        if out is None:
            return torch.cat([waves, waves.new_full((), constant).expand(*u.shape[:-1], 1)], -1)
        out[..., waves.shape[-1] :] = constant
        return out


class Halves(NamedTuple):
    """Memory for features of both signs, and that of either."""

    both: Tensor
    plus: Tensor
    minus: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Halves:
        half = features.shape[-1] // 2
        return cls(features, features[..., :half], features[..., half:])


class Hyperbolic(Projected):
    """log of [exp(u), exp(-u)] exp(-softmax_temp |x|^2 / 2) / sqrt(F): Favor.

    Queries leave out what is common to all their features; it cancels.
    """

    exponential = True
    positive = never_zero = True
    per_direction = 2
    unit = LOG2E
    most = 40.0  # of logarithms in range

    def __init__(self, formula: Formula, dtype: torch.dtype) -> None:
        super().__init__(formula, dtype)
        self.constant = math.log2(2 * self.omega.shape[1]) / 2

    def queries(self, x: Tensor, shift: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if shift is None:
            return self.value(x, out)
        return _signs(self.project(x), *shift.chunk(2, -1), out=out)

    def query_powers(self, x: Tensor, out: Halves) -> Tensor | float:
        """2 to the logarithms of queries, to ``out``, less an offset (..., 1) of rows that are out
        of range, which is returned. No row depends on another."""
        u = self.project(x)
        if self._powers(u, out):
            return 0.0
        offset = u.abs().amax(-1, keepdim=True)
        offset.masked_fill_(offset <= self.most, 0.0)
        torch.exp2(u - offset, out=out.plus)
        inverse = torch.where(offset == 0, out.plus.reciprocal(), (-u - offset).exp2_())
        out.minus.copy_(inverse)
        return offset

    def key_powers(self, x: Tensor, out: Halves) -> bool:
        """2 to the logarithms of keys, to ``out``, if they are in range."""
        offset = self._offset(x)
        found = float(offset.amin()) >= -self.most and self._powers(self.project(x), out)
        if found:
            out.both.mul_(offset.exp2_())
        return found

    def _powers(self, u: Tensor, out: Halves) -> bool:
        """[2^u, 2^-u], if they are in range; half of the time of logarithms, and of 2 to them."""
        low, high = u.aminmax()
        found = float(low) >= -self.most and float(high) <= self.most
        if found:
            torch.reciprocal(torch.exp2(u, out=out.plus), out=out.minus)
        return found

    def keys(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        offset = self._offset(x)
        return _signs(self.project(x), offset, offset, out)

    def both(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        of_queries, of_keys = super().both(q, k)
        return of_queries, of_keys + self._offset(k)

    def function(self, u: Tensor, out: Tensor | None) -> Tensor:
        return torch.cat([u, -u], -1, out=out)

    def _offset(self, x: Tensor) -> Tensor:
        """What keys have in common in all their features."""
        norm = x.square().sum(-1, keepdim=True)
        return torch.rsub(norm, -self.constant, alpha=self.temp * LOG2E / 2)

    def queries_back(self, gradient: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        plus, minus = gradient.chunk(2, -1)
        return self.project_back(plus.sub_(minus))

    def keys_back(self, gradient: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        total = gradient.sum(-1, keepdim=True)
        return self.queries_back(gradient, phi, x).addcmul_(x, total, value=-self.temp)


def _signs(u: Tensor, plus: Tensor, minus: Tensor, out: Tensor | None) -> Tensor:
    """[plus + u, minus - u]; with memory for it in one pass, which pays for many rows."""
    if out is None:
        return torch.cat([plus + u, minus - u], -1)
    width = u.shape[-1]
    torch.add(plus, u, out=out[..., :width])
    torch.sub(minus, u, out=out[..., width:])
    return out
