"""Element-wise functions that the passes and kernels know by name, and how to add one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .formula import Formula, Kind
from .kinds import KINDS
from .projected import Projected

Function = Callable[[Tensor], Tensor]


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, written so that small values survive: exp(x) below 0, 1 + x above.

    Adding 1 to elu(x) = exp(x) - 1 would round to 0 in bfloat16 from x = -6 down.
    """
    positive = x.relu()
    return (x - positive).exp() + positive


NAMES: dict[Function, str] = {
    torch.relu: "relu",
    torch.nn.functional.relu: "relu",
    elu_plus_one: "elu_plus_one",
}
KERNELS: dict[str, tuple[Any, Any]] = {}  # of the registered ones


def formula_of(
    function: Function, projection: Tensor | None = None, numbers: tuple[float, ...] = ()
) -> Formula | None:
    """f(x), or f(sqrt(softmax_temp) x omega) with a projection; None if f has no name."""
    name = NAMES.get(function)
    kind = name if name is None or projection is None else f"projected_{name}"
    return None if kind not in KINDS else Formula(kind, projection, numbers)


def register_elementwise(
    name: str,
    function: Function,
    derivative: Function,
    *,
    kernels: tuple[Any, Any],
    positive: bool = False,
) -> None:
    """Let kernels compute phi(x) = f(x), and f of random projections, inside the attention.

    From then on ``ActivationFunctionFeatureMap(E, function)`` and
    ``GeneralizedRandomFeatures(E, kernel_fn=function)`` have a formula, so that no feature is
    ever written to the memory of a GPU. ``CONTRIBUTING.md`` has an example.

    Args:
        name: an identifier that no other map has.
        function: f in torch, (..., E) to (..., E), element by element and without weights.
        derivative: f' in torch, likewise.
        kernels: f and f' of one float32 tile, functions decorated with ``triton.jit``.
        positive: f is above 0 everywhere. Kernels multiply other features in float32, which
            takes longer, since small denominators make errors larger.

    Raises:
        ValueError: for a name that is taken or no identifier.
        TypeError: for kernels that are no functions of Triton.
    """
    kinds = name, f"projected_{name}"
    if not name.isidentifier() or any(kind in KINDS for kind in kinds):
        raise ValueError(f"name must be an identifier that no other map has, got {name!r}")
    for kernel in kernels:
        if not hasattr(kernel, "arg_names"):
            raise TypeError(
                "kernels must be two functions decorated with triton.jit, got "
                f"{type(kernel).__name__}"
            )

    class Elementwise(Kind):
        def value(self, x: Tensor, out: Tensor | None = None) -> Tensor:
            phi = function(x)
            return phi if out is None else out.copy_(phi)

        def queries_back(self, gradient: Tensor, phi: Tensor, x: Tensor) -> Tensor:
            return gradient * derivative(x)

        keys_back = queries_back

    class ProjectedElementwise(Projected):
        def function(self, u: Tensor, out: Tensor | None) -> Tensor:
            phi = function(u)
            return phi if out is None else out.copy_(phi)

        def queries_back(self, gradient: Tensor, phi: Tensor, x: Tensor) -> Tensor:
            return self.project_back(gradient * derivative(self.project(x)))

        keys_back = queries_back

    for kind in (Elementwise, ProjectedElementwise):
        kind.positive = kind.never_zero = positive
    NAMES[function], KERNELS[name] = name, kernels
    KINDS.update(zip(kinds, (Elementwise, ProjectedElementwise), strict=True))
