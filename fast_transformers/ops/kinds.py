"""The feature maps the operators know by name."""

from __future__ import annotations

import torch
from torch import Tensor

from .formula import LOG2E, Kind
from .processor import exp_
from .projected import Fourier, Hyperbolic, ProjectedRelu, SmoothedFourier


class Logarithm(Kind):
    """phi(x) = exp(x): what is given are the logarithms of features."""

    exponential = True

    def value(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mul(x, LOG2E, out=out)


class EluPlusOne(Kind):
    """elu(x) + 1 as exp(min(x, 0)) + relu(x); its derivative is min(phi, 1)."""

    positive = True

    def value(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        positive = x.relu()  # first: it reads x, from memory, in the order in which it lies there
        return exp_(torch.clamp_max(x, 0.0, out=out)).add_(positive)

    def back(self, gradient: Tensor, phi: Tensor) -> Tensor:
        return gradient.mul_(phi.clamp_max(1.0))


class Relu(Kind):
    """relu(x), with the derivative 0 at 0."""

    positive = True
    never_zero = False

    def value(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.clamp_min(x, 0.0, out=out)

    def back(self, gradient: Tensor, phi: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(gradient, phi, 0)


KINDS: dict[str, type[Kind]] = {
    "identity": Kind,
    "logarithm": Logarithm,
    "elu_plus_one": EluPlusOne,
    "relu": Relu,
    "projected_relu": ProjectedRelu,
    "fourier": Fourier,
    "smoothed_fourier": SmoothedFourier,
    "hyperbolic": Hyperbolic,
}
