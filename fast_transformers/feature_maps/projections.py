"""Random directions: six ways to draw a matrix whose columns are N(0, I), each by itself.

The columns may depend on each other, which lowers the variance of the features that use them and
leaves their mean as it is. Everything is drawn on the CPU: a seed means the same on any device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

Sampler = Callable[[int, int, Generator | None], Tensor]  # rows, columns, source of randomness


def iid(rows: int, columns: int, generator: Generator | None) -> Tensor:
    """Independent columns, as Rahimi and Recht 2007, algorithm 1, draw them."""
    return torch.randn(rows, columns, generator=generator, device="cpu")


def orthogonal(rows: int, columns: int, generator: Generator | None) -> Tensor:
    """Orthogonal within groups of ``rows`` columns.

    Yu et al. 2016, "Orthogonal Random Features" (arXiv:1610.09072), theorem 1 for the Gaussian
    kernel; Choromanski et al. 2021, "Rethinking Attention with Performers", theorem 2 and
    equation 10 for positive features of the softmax kernel: no larger variance in any dimension.
    Each group is a Haar-distributed rotation, whose columns are given independent norms of the
    chi distribution.
    """
    rotations, norms = _haar(rows, columns, generator)
    return _side_by_side(rotations * norms, columns)


def sorf(rows: int, columns: int, generator: Generator | None) -> Tensor:
    """Structured orthogonal features, (HD)^3; Yu et al. 2016 (arXiv:1610.09072), theorem 3.

    H is the Hadamard matrix, applied by the fast Walsh-Hadamard transform, and D are random
    signs, so a group of columns is drawn in O(rows^2 log rows). Inputs count as padded with zeros
    to a power of 2. Moments up to the third are those of N(0, I), and the fourth are up to a
    share of 1/rows^2; the theorem bounds the bias for the Gaussian kernel of distance d by
    6 d / sqrt(rows). The result is an ordinary matrix: at the dimensions of attention heads a
    product with it takes less time than the transform of every token.
    """
    padded = 1 << max(rows - 1, 0).bit_length()

    def group() -> Tensor:
        block = torch.eye(padded, device="cpu")
        for _ in range(3):
            block = hadamard(_signs(padded, generator)[:, None] * block)
        norms = torch.randn(padded, padded, generator=generator, device="cpu").norm(dim=0)
        return (block * norms)[:rows]

    return torch.cat([group() for _ in range(0, columns, padded)], 1)[:, :columns]


def simplex(rows: int, columns: int, generator: Generator | None) -> Tensor:
    """Directions as far apart as can be: cosines of -1/(rows - 1) within groups of ``rows``.

    Reid et al. 2023, "Simplex Random Features" (arXiv:2301.13856), section 3: of all couplings
    of the directions alone the one with the smallest error for positive features. The corners
    of a regular simplex, turned by a Haar rotation, with independent norms.
    """
    if rows < 2:
        raise ValueError(f"projection='simplex' needs at least 2 query dimensions, got {rows}")
    corners = torch.eye(rows, device="cpu") - 1 / rows
    corners = corners / corners.norm(dim=0)
    rotations, norms = _haar(rows, columns, generator)
    return _side_by_side(rotations @ corners * norms, columns)


def qmc(rows: int, columns: int, generator: Generator | None) -> Tensor:
    """A scrambled Sobol sequence, through the inverse of the normal distribution function.

    The quasi-Monte-Carlo features of Yang et al. 2014 (arXiv:1412.8293), scrambled, so that every
    column is normal and the mean of any features right.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    engine = torch.quasirandom.SobolEngine(rows, scramble=True, seed=seed)
    points = engine.draw(columns, dtype=torch.float64) + 2.0**-31  # the middle of a cell, not 0
    return torch.special.ndtri(points.clamp(max=1 - 2.0**-31)).mT.to(torch.get_default_dtype())


def antithetic(rows: int, columns: int, generator: Generator | None) -> Tensor:
    """Independent columns and their negatives.

    For features of one sign of the projection, which become the hyperbolic ones of Choromanski
    et al. 2021, "Rethinking Attention with Performers", equation 7. Even ones
    (:class:`~.favor.Favor`, Fourier) see every direction twice, which doubles their variance.
    """
    half = iid(rows, (columns + 1) // 2, generator)
    return torch.cat([half, -half], 1)[:, :columns]


PROJECTIONS: dict[str, Sampler] = {
    sampler.__name__: sampler for sampler in (iid, orthogonal, sorf, simplex, qmc, antithetic)
}


def check_projection(name: str) -> str:
    """A key of :data:`PROJECTIONS`, or ValueError."""
    if name not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {name!r}")
    return name


@torch.no_grad()
def fill_(
    omega: Tensor, projection: str, generator: Generator | None = None, parts: int = 1
) -> Tensor:
    """Draw a projection (E, columns) in place, each of ``parts`` equal parts by itself."""
    return _put(omega, _draw(omega, projection, generator, parts))


@torch.no_grad()
def draw_(
    omega: Tensor, projection: str, generator: Generator | None = None, parts: int = 1
) -> Tensor:
    """As :func:`fill_`, rounded to numbers that bfloat16 holds.

    Kernels multiply in the dtype of the inputs. Rounded when it is drawn, the same map is used in
    every dtype; rounded later, features would be those of another one. What is rounded is random
    anyway: the variance of an entry changes by 2^-18 of itself at most, and cosines of orthogonal
    directions by about 2^-9 / sqrt(rows).
    """
    return _put(omega, _draw(omega, projection, generator, parts).bfloat16())


def orthogonal_random_matrix_(w: Tensor, generator: Generator | None = None) -> Tensor:
    """Fill ``w`` (rows, columns) with :func:`orthogonal` columns; the older library's name."""
    return fill_(w, "orthogonal", generator)


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the first dimension, a power of 2."""
    length = x.shape[0]
    y, half = x.flatten(1), 1
    while half < length:
        first, second = y.view(length // (2 * half), 2, half, -1).unbind(1)
        y = torch.stack([first + second, first - second], 1).view(length, -1)
        half *= 2
    return (y * length**-0.5).view(x.shape)


def _draw(omega: Tensor, projection: str, generator: Generator | None, parts: int) -> Tensor:
    sampler = PROJECTIONS[projection]
    width = omega.shape[1] // parts
    return torch.cat([sampler(omega.shape[0], width, generator) for _ in range(parts)], 1)


def _put(omega: Tensor, drawn: Tensor) -> Tensor:
    """Copy to omega; the host does not wait for a GPU that is busy with earlier layers."""
    drawn = drawn.to(omega.dtype)
    if omega.is_cuda:
        return omega.copy_(drawn.pin_memory(), non_blocking=True)
    return omega.copy_(drawn)


def _haar(size: int, columns: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Haar-distributed rotations (G, size, size) for at least so many columns, and norms
    (G, 1, size) of as many vectors of N(0, I), independent of the rotations and of each other.

    Stewart 1980, "The Efficient Generation of Random Orthogonal Matrices with an Application to
    Condition Estimators" (SIAM J. Numer. Anal. 17), section 3: the reflections of a QR
    decomposition of a Gaussian matrix, and the signs of R, drawn without decomposing one.
    Reflection k = 0, 1, ... is the direction of a Gaussian vector of size - k dimensions; its
    norm, and k more numbers, are left to make the norm of column k. Without the signs columns
    would have a mean, which biases features that are not even functions of the projection.
    """
    groups = -(-columns // size)
    normal = torch.randn(groups, size, size, generator=generator, device="cpu")
    vectors = normal.tril()
    first = vectors.diagonal(dim1=-2, dim2=-1)
    first += 1e-18  # one in 2^24 is 0, and the last vector has no other entry
    length = vectors.square().sum(1).sqrt_().copysign_(first)
    first += length
    rotations = torch.linalg.householder_product(vectors / first[:, None], first / length)
    norms = normal.square().sum(1, keepdim=True).sqrt_()
    return rotations.mul_(-length.sign()[:, None]), norms


def _side_by_side(x: Tensor, columns: int) -> Tensor:
    """The first columns of (G, rows, size), group after group."""
    return x.transpose(0, 1).flatten(1)[:, :columns]


def _signs(size: int, generator: Generator | None) -> Tensor:
    bits = torch.randint(2, (size,), generator=generator, device="cpu")
    return 2.0 * bits - 1
