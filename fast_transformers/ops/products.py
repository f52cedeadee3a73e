"""Products of many rows with a matrix, by the faster of a CPU's two libraries.

PyTorch multiplies float32 matrices on x86 with MKL, which keeps to AVX2 on AMD's CPUs: a core of
one with AVX-512 does 116 GFLOP/s by MKL and 250 by oneDNN (2,048 rows, 64 x 128 weights). There
is no such choice for batches of small products, for which a call of oneDNN takes too long.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROWS = 256  # fewest that are worth the call


def product(x: Tensor, weights: Tensor) -> Tensor:
    """x (..., E) times weights (E, K), of which the transpose is best contiguous."""
    if x.ndim == 4 and not x.is_contiguous():  # a slice of a sequence: tokens before heads
        return product(x.transpose(1, 2).contiguous(), weights).transpose(1, 2)
    across = weights.mT
    rows = x.numel() // max(x.shape[-1], 1)
    if (
        rows < ROWS
        or x.dtype != torch.float32
        or x.device.type != "cpu"
        or not across.is_contiguous()
        or torch.compiler.is_compiling()
        or not _onednn_is_faster()
    ):
        return x @ weights
    return torch.ops.mkldnn._linear_pointwise(x, across, None, "none", [], "")


@cache
def _onednn_is_faster() -> bool:
    """Asked once a process, so that one machine always adds in one order."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _cpu()


def _cpu() -> str:
    """What says whose the processor is."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor()
