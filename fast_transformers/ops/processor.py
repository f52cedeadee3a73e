"""Which CPU this is: some operations have two implementations, and each CPU a faster one.

Asked once a process, so that one machine always adds in one order.
"""

from __future__ import annotations

import math
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def mkl_is_slow() -> bool:
    """Whether PyTorch computes by MKL on a CPU of AMD, where MKL keeps to AVX2 in products and
    to one number at a time in functions."""
    return torch.backends.mkl.is_available() and "AuthenticAMD" in _cpu()


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL does."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and mkl_is_slow() and torch.backends.mkldnn.is_available()


def _cpu() -> str:
    """What says whose the processor is."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor()


def exp_(x: Tensor) -> Tensor:
    """e^x in place; many elements as powers of 2, where those take a third of the time."""
    if torch.compiler.is_compiling() or x.numel() <= 4096 or not mkl_is_slow():
        return x.exp_()
    return x.mul_(math.log2(math.e)).exp2_()
