"""Linear maps G of queries and G^-T of keys, which keep dot products, from moments of both.

FAVOR# is Likhosherstov et al. 2023 (arXiv:2302.00787).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .moments import Moments, of_sum

FLOOR = 1e-3  # of the mean eigenvalue: smaller ones are raised to it before they are inverted


def rotation(queries: Moments, keys: Moments) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the second moment of the sum, for both sides; theorem 4.3 of FAVOR#."""
    vectors = torch.linalg.eigh(of_sum(queries, keys)).eigenvectors
    return _turned(vectors, vectors)


def scaling(queries: Moments, keys: Moments) -> tuple[Tensor, Tensor]:
    """A factor for each dimension that makes the second moments of both sides equal: SADERF."""
    of_queries, of_keys = (_floored(m.second.diagonal(dim1=-2, dim2=-1)) for m in (queries, keys))
    factor = (of_keys / of_queries) ** 0.25
    return factor.diag_embed(), (1 / factor).diag_embed()


def alignment(queries: Moments, keys: Moments) -> tuple[Tensor, Tensor]:
    """G = Q1 L1^(-1/2) U S^(1/2) and G^-T = Q2 L2^(-1/2) V S^(1/2), for second moments Q L Q^T
    and the singular values U S V^T of L1^(1/2) Q1^T Q2 L2^(1/2); theorem 4.2 of FAVOR#."""
    (roots1, q1), (roots2, q2) = (_eigen(m.second) for m in (queries, keys))
    u, s, vh = torch.linalg.svd(roots1[..., None] * (q1.mT @ q2) * roots2[..., None, :])
    root = s.sqrt()[..., None, :]
    return _turned(
        (q1 / roots1[..., None, :]) @ u * root, (q2 / roots2[..., None, :]) @ vh.mT * root
    )


def _eigen(second: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(second)
    return _floored(values).sqrt(), vectors


def _turned(of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor]:
    """The same with columns turned round so that the largest entry of each is positive in G.

    Decompositions leave the signs open, and what comes out of LAPACK depends on the number of
    threads; one and the same draw of directions then gave other features.
    """
    largest = of_queries.abs().argmax(-2, keepdim=True)
    sign = of_queries.gather(-2, largest).sign()
    return of_queries * sign, of_keys * sign


def _floored(values: Tensor) -> Tensor:
    least = FLOOR * values.mean(-1, keepdim=True)
    return values.maximum(least.clamp(min=torch.finfo(values.dtype).tiny ** 0.25))


Transform = Callable[[Moments, Moments], tuple[Tensor, Tensor]]
TRANSFORMS: dict[str, tuple[Transform, bool]] = {  # and whether all dimensions share an A
    "sderf": (rotation, False),
    "saderf": (scaling, True),
    "aderf": (alignment, True),
    "aligned": (alignment, False),
}
