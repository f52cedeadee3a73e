"""Products of many rows with a matrix, by the faster of a CPU's two libraries.

PyTorch multiplies float32 matrices on x86 with MKL, which keeps to AVX2 on AMD's CPUs: a core of
one with AVX-512 does 116 GFLOP/s by MKL and 250 by oneDNN (2,048 rows, 64 x 128 weights). There
is no such choice for batches of small products, for which a call of oneDNN takes too long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .processor import onednn_is_faster

ROWS = 256  # fewest that are worth the call


def product(x: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """x (..., E) times weights (E, K), of which the transpose is best contiguous.

    The result is contiguous: what comes next is slow where every row is a page from the next. It
    may be in ``out`` (..., K), if that is given; oneDNN takes memory of its own.
    """
    rows, across = x.reshape(-1, x.shape[-1]), weights.mT
    if (
        len(rows) >= ROWS
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and across.is_contiguous()
        and not torch.compiler.is_compiling()
        and onednn_is_faster()
    ):
        found = torch.ops.mkldnn._linear_pointwise(rows, across, None, "none", [], "")
    else:
        found = torch.mm(rows, weights, out=None if out is None else out.view(-1, out.shape[-1]))
    return found.view(*x.shape[:-1], weights.shape[1])
