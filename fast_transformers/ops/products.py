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


def laid_out(weights: Tensor) -> Tensor:
    """Weights (E, K) in the order in memory that :func:`product` is fastest with."""
    if torch.compiler.is_compiling() or not onednn_is_faster():
        return weights.contiguous()
    return weights.mT.contiguous().mT


def product(rows: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows (R, E) times weights (E, K); the result is contiguous.

    It may be in ``out`` (R, K), if that is given; oneDNN takes memory of its own.
    """
    across = weights.mT
    if (
        len(rows) >= ROWS
        and rows.dtype == torch.float32
        and rows.device.type == "cpu"
        and across.is_contiguous()
        and not torch.compiler.is_compiling()
        and onednn_is_faster()
    ):
        return torch.ops.mkldnn._linear_pointwise(rows, across, None, "none", [], "")
    return torch.mm(rows, weights, out=out)
