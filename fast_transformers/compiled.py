"""Steps of generation in kernels that torch.compile makes.

A step of one sequence multiplies each weight matrix with a single row: it is bound by how fast
the weights come from memory. BLAS libraries have rarely been tuned for that on a CPU. A product
and a sum, fused by the compiler, read each matrix once from its first to its last element.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BACKEND = "inductor"
COMPILERS = {"win32": "cl", "darwin": "clang++"}  # of C++, which torch.compile looks for


def why_not_compile(device: torch.device | str) -> str | None:
    """The reason why nothing can be compiled for a device on this machine; None if it can."""
    kind = torch.device(device).type
    if kind == "cuda":
        return None if find_spec("triton") else "there is no Triton"
    if kind != "cpu":
        return f"the tensors are on a device of type {kind}, compiled steps need cuda or cpu"
    compiler = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler}"


def compile_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that is compiled at its first call, and once more if a shape changes."""
    return torch.compile(step, backend=_compile)


def _compile(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The backend, with products of a single row on a CPU as it can fuse them."""
    for node in graph.graph.nodes:
        if node.target is functional.linear and node.args:
            x = node.args[0].meta["example_value"]
            one = x.device.type == "cpu" and all(size == 1 for size in x.shape[:-1])
            if one and not torch.is_autocast_enabled("cpu"):
                node.target = product
    graph.recompile()
    return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer for one row: (..., E) with leading sizes of 1, (D, E), (D,) to (..., D)."""
    y = (weight * x.reshape(-1)).sum(-1)
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)
