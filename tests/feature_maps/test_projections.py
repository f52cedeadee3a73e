"""The six ways to draw directions: their law, their use by every random map, their names."""

from __future__ import annotations

import math

import pytest
import torch

from fast_transformers.feature_maps import (
    PROJECTIONS,
    Favor,
    GeneralizedRandomFeatures,
    RandomFourierFeatures,
)
from fast_transformers.feature_maps.projections import fill_, hadamard


def many(projection: str, rows: int, columns: int, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    empty = torch.empty(rows, columns)
    return torch.stack([fill_(empty, projection, generator).clone() for _ in range(draws)])


@pytest.mark.parametrize(("rows", "columns"), [(8, 11), (6, 7)])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_column_is_normal(projection, rows, columns) -> None:
    """Mean 0 and covariance 1 in every column; the marginals have the moments of N(0, 1)."""
    draws = many(projection, rows, columns)
    error = 1 / len(draws) ** 0.5
    assert draws.mean(0).abs().max() < 5 * error
    covariance = torch.einsum("nec,nfc->cef", draws, draws) / len(draws)
    assert (covariance - torch.eye(rows)).abs().max() < 5 * 2**0.5 * error
    for power, moment in ((3, 0), (4, 3), (6, 15)):
        found = (draws**power).mean(0)
        spread = (draws ** (2 * power)).mean().sqrt() * error
        assert (found - moment).abs().max() < 5 * spread
    assert draws.square().sum(1).mean() == pytest.approx(rows, rel=0.01)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_seed_is_a_draw(projection) -> None:
    a, b, c = (Favor(8, 24, projection=projection, generator=s) for s in (1, 1, 2))
    state = torch.get_rng_state()
    for _ in range(3):
        assert torch.equal(a.omega, b.omega)
        assert not torch.equal(a.omega, c.omega)
        for feature_map in (a, b, c):
            feature_map.new_feature_map()
    assert torch.equal(state, torch.get_rng_state())
    assert f"projection={projection}" in repr(a)


def test_the_transform_is_that_of_hadamard() -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(3):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    torch.testing.assert_close(hadamard(x), matrix @ x / 8**0.5)
    torch.testing.assert_close(hadamard(hadamard(x)), x)


@pytest.mark.parametrize(("projection", "cosine"), [("sorf", 0.0), ("simplex", -1 / 7)])
def test_angles_within_a_group(projection, cosine) -> None:
    w = many(projection, 8, 16, draws=1)[0]
    unit = w / w.norm(dim=0)
    for group in unit.split(8, 1):
        gram = group.T @ group
        expected = torch.full((8, 8), cosine).fill_diagonal_(1.0)
        torch.testing.assert_close(gram, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("projection", "cosine"), [("orthogonal", 0.0), ("sorf", 0.0), ("simplex", -1 / 7)]
)
def test_training_draws_as_evaluation_does(projection, cosine) -> None:
    """Every redraw has the angles of the draw that a map is made with."""
    feature_map = GeneralizedRandomFeatures(8, 16, projection=projection).train()
    for _ in range(3):
        feature_map.new_feature_map()
        unit = feature_map.omega / feature_map.omega.norm(dim=0)
        expected = torch.full((8, 8), cosine).fill_diagonal_(1.0)
        for group in unit.split(8, 1):  # entries are rounded to those of bfloat16
            torch.testing.assert_close(group.T @ group, expected, atol=2**-7, rtol=0)


def test_antithetic_directions_come_with_their_negatives() -> None:
    w = many("antithetic", 8, 7, draws=1)[0]
    assert torch.equal(w[:, 4:], -w[:, :3])
    x, y = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    trigonometric = RandomFourierFeatures(8, 64, projection="antithetic")
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(8000):  # cosines are even, so a direction's negative tells nothing new
        trigonometric.resample(generator)
        found.append((trigonometric(x) * trigonometric(y)).sum())
    relative = torch.stack(found).var() / trigonometric.kernel(x, y).square()
    torch.testing.assert_close(
        relative, 2 * trigonometric.relative_variance(x, y), rtol=0.1, atol=0
    )


def test_qmc_points_fill_the_space_evenly() -> None:
    """Every 1/16th of the distribution of each coordinate holds one of 16 points."""
    w = many("qmc", 5, 16, draws=1)[0]
    cells = (torch.special.ndtr(w.double()) * 16).floor().long()
    assert all(sorted(row.tolist()) == list(range(16)) for row in cells)


def test_the_older_argument_is_a_projection() -> None:
    assert Favor(8).projection == Favor(8, orthogonal=True).projection == "orthogonal"
    assert Favor(8, orthogonal=False).projection == "iid"
    assert GeneralizedRandomFeatures(8, projection="qmc").projection == "qmc"
    assert RandomFourierFeatures(8).projection == "iid"
    assert not Favor(8, projection="simplex").orthogonal
    torch.manual_seed(0)
    first = RandomFourierFeatures(8, orthogonal=True).omega
    torch.manual_seed(0)
    assert torch.equal(first, RandomFourierFeatures(8, projection="orthogonal").omega)


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"projection must be one of iid, .* got 'orf'"):
        Favor(8, projection="orf")
    with pytest.raises(ValueError, match=r"simplex.*at least 2 query dimensions, got 1"):
        Favor(1, 2, projection="simplex")


def test_unit_variance_of_a_simplex_in_favor_is_smaller() -> None:
    """At small norms positive features gain most: the published ratio at |x|^2 = 0.1 is 0.03,
    of orthogonal directions 0.94."""
    dims = 32
    x, y = torch.randn(2, dims, generator=torch.Generator().manual_seed(1))
    x, y = (v / v.norm() * math.sqrt(0.1) for v in (x, y))
    z = (x + y).double()
    variance, error = {}, {}
    for projection in ("orthogonal", "simplex"):
        w = many(projection, dims, dims, draws=6000).double()
        positive = torch.einsum("e,nec->nc", z, w).exp().mean(1)
        squares = (positive - positive.mean()).square()
        variance[projection] = float(squares.mean())
        error[projection] = float(squares.std()) / len(squares) ** 0.5
    square = float(z.square().sum())
    independent = (math.exp(2 * square) - math.exp(square)) / dims
    assert variance["simplex"] < 0.15 * variance["orthogonal"]
    assert variance["orthogonal"] + 2 * error["orthogonal"] < independent
