"""Random maps: mean and variance, samplers, and when they are drawn."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fast_transformers.feature_maps import (
    PROJECTIONS,
    Favor,
    GeneralizedRandomFeatures,
    RandomFourierFeatures,
    SmoothedRandomFourierFeatures,
    draw,
    orthogonal_random_matrix_,
    projections,
)

MAPS = [Favor, RandomFourierFeatures, SmoothedRandomFourierFeatures, GeneralizedRandomFeatures]


def estimates(feature_map, x, y, draws: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        feature_map.resample(generator)
        found.append((feature_map.forward_queries(x) * feature_map.forward_keys(y)).sum(-1))
    return torch.stack(found)


def pair(kind: str, dims: int, norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two vectors whose norms are ``norm`` after the temperature."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, dims, generator=generator, dtype=torch.float64)
    if kind == "positive":
        x, y = x.abs(), y.abs()
    elif kind == "negative":
        x, y = -x.abs(), -y.abs()
    elif kind == "equal":
        y = x.clone()
    elif kind == "opposite":
        y = -x
    return tuple(v / v.norm() * norm * dims**0.25 for v in (x, y))  # type: ignore[return-value]


PAIRS = ["random", "positive", "negative", "equal", "opposite"]


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("cls", MAPS, ids=lambda c: c.__name__)
def test_unbiased(cls, kind, orthogonal) -> None:
    x, y = pair(kind, 16, norm=0.7)
    feature_map = cls(16, n_dims=32, softmax_temp=0.25, orthogonal=orthogonal).double()
    found = estimates(feature_map, x, y, 2000)
    error = (found.mean(0) - feature_map.kernel(x, y)).abs()
    assert error <= 5 * found.std(0) / 2000**0.5 + 1e-6


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("norm", [0.5, 1.0])
def test_favor_has_the_variance_of_the_paper(kind, norm) -> None:
    """(cosh|x+y|^2 - 1) SM^2 per pair of features, for independent directions."""
    x, y = pair(kind, 16, norm)
    sum_norm = float((x + y).square().sum() / 4)
    found = Favor(16, n_dims=64, orthogonal=False).double().relative_variance(x, y)
    assert float(found) == pytest.approx((math.cosh(sum_norm) - 1) / 32, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("cls", [RandomFourierFeatures, SmoothedRandomFourierFeatures])
def test_fourier_features_have_the_variance_of_the_formula(cls, kind) -> None:
    """(1 - exp(-d))^2 / 2 per direction, d = |x - y|^2; a constant feature adds none."""
    x, y = pair(kind, 16, norm=0.8)
    feature_map = cls(16, n_dims=64 + (cls is SmoothedRandomFourierFeatures)).double()
    distance = float((x - y).square().sum() / 4)
    expected = (1 - math.exp(-distance)) ** 2 / 2 / 32
    found = feature_map.relative_variance(x, y) * feature_map.kernel(x, y).square()
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", PAIRS)
def test_generalized_features_have_the_variance_of_independent_terms(kind) -> None:
    """n_dims times that of relu(w.x) relu(w.y), estimated from many w of the test's own."""
    x, y = pair(kind, 16, norm=0.8)
    feature_map = GeneralizedRandomFeatures(16, n_dims=64, orthogonal=False).double()
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(400_000, 16, generator=generator, dtype=torch.float64)
    terms = (w @ x).relu() * (w @ y).relu()
    kernel = feature_map.kernel(x, y) / 64
    if kind == "opposite":  # never both positive
        assert not terms.any()
        assert float(kernel) == pytest.approx(0, abs=1e-12)
        return
    found = feature_map.relative_variance(x, y) * kernel.square() * 64
    assert float(found) == pytest.approx(float(terms.var()), rel=0.05)


def test_orthogonal_draws_are_haar() -> None:
    """Entries have mean 0 and the columns the law of N(0, I): QR alone has a mean of -0.1."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [orthogonal_random_matrix_(torch.empty(16, 16), generator) for _ in range(4000)]
    )
    standard_error = 1 / 4000**0.5
    assert draws.mean(0).abs().max() < 5 * standard_error
    assert draws.diagonal(dim1=1, dim2=2).mean().abs() < 5 * standard_error / 4
    torch.testing.assert_close(draws.var(0).mean(), torch.tensor(1.0), rtol=0.01, atol=0)
    squared_norms = draws.square().sum(1)
    assert float(squared_norms.mean()) == pytest.approx(16, rel=0.01)
    assert float(squared_norms.var()) == pytest.approx(32, rel=0.05)


@pytest.mark.parametrize("shape", [(8, 8), (8, 3), (8, 20)])
def test_orthogonal_within_groups(shape) -> None:
    w = orthogonal_random_matrix_(torch.empty(shape, dtype=torch.float64))
    for group in w.split(shape[0], 1):
        gram = group.T @ group
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-4
    if shape[1] > shape[0]:
        assert (w[:, :8].T @ w[:, 8:16]).abs().max() > 0.1


def test_norms_are_independent_of_directions() -> None:
    """And of each other, though one matrix of normal numbers makes them all."""
    draws = torch.stack([orthogonal_random_matrix_(torch.empty(4, 4)) for _ in range(4000)])
    norms = draws.norm(dim=1)
    unit = draws / norms[:, None]
    directions = torch.cat([unit.flatten(1), unit.abs().flatten(1)], 1)
    correlations = torch.corrcoef(torch.cat([norms, directions], 1).T)[:4]
    assert correlations[:, 4:].abs().max() < 5 / 4000**0.5
    assert correlations[:, :4].fill_diagonal_(0.0).abs().max() < 5 / 4000**0.5


def test_normal_numbers_that_are_0(monkeypatch) -> None:
    """As one in 2^24 is: a direction must not become NaN, or vanish."""
    normal = torch.randn

    def randn(*args, **options):
        return normal(*args, **options).tril(-1)

    monkeypatch.setattr(torch, "randn", randn)
    for size in (1, 5):
        rotations, _ = projections._haar(size, 2 * size, None)
        torch.testing.assert_close(rotations.mT @ rotations, torch.eye(size).expand(2, -1, -1))


def redraws(feature_map, calls: int) -> list[bool]:
    changes = []
    for _ in range(calls):
        before = feature_map.omega.clone()
        draw(feature_map, torch.device("cpu"))
        changes.append(not torch.equal(before, feature_map.omega))
    return changes


@pytest.mark.parametrize("cls", MAPS, ids=lambda c: c.__name__)
def test_when_a_map_is_redrawn(cls) -> None:
    """In training at every redraw-th call, the first of which uses the draw that is there."""
    assert redraws(cls(8), 3) == [False, True, True]
    assert redraws(cls(8, redraw=3), 7) == [False, False, False, True, False, False, True]
    assert redraws(cls(8).eval(), 3) == [False] * 3
    assert redraws(cls(8, deterministic_eval=False).eval(), 3) == [False, True, True]


def test_redrawing_writes_into_the_buffer_and_spares_the_global_generator() -> None:
    feature_map = Favor(8)
    omega, state = feature_map.omega, torch.get_rng_state()
    assert redraws(feature_map, 2) == [False, True]
    assert feature_map.omega is omega
    assert torch.equal(state, torch.get_rng_state())


def test_draws_depend_on_the_seed_alone() -> None:
    a, b, c = (Favor(8, generator=g) for g in (3, torch.Generator().manual_seed(3), 4))
    for _ in range(3):
        assert torch.equal(a.omega, b.omega)
        assert not torch.equal(a.omega, c.omega)
        for feature_map in (a, b, c):
            draw(feature_map, torch.device("cpu"))
    torch.manual_seed(1)
    first = Favor(8).omega
    torch.manual_seed(1)
    assert torch.equal(first, Favor(8).omega)
    assert not torch.equal(first, Favor(8).omega)


def test_gradients_of_samples_draw_what_a_training_step_draws() -> None:
    """Inside torch.func, which allows no random numbers and no writing to what it did not give."""
    feature_map, x = Favor(8, generator=0), torch.randn(3, 5, 8)
    other = copy.deepcopy(feature_map)

    def value(x: torch.Tensor) -> torch.Tensor:
        feature_map.new_feature_map()
        return feature_map.forward_keys(x).sum()

    for _ in range(3):
        gradients = torch.func.vmap(torch.func.grad(value))(x)
        other.new_feature_map()
        assert torch.equal(feature_map.omega, other.omega)
        given = x.clone().requires_grad_()
        other.forward_keys(given).sum().backward()
        torch.testing.assert_close(gradients, given.grad)
    assert int(feature_map.calls) == 3


def test_copies_redraw_alike() -> None:
    a = Favor(8)
    b = copy.deepcopy(a)
    for feature_map in (a, b):
        redraws(feature_map, 4)
    assert torch.equal(a.omega, b.omega)
    assert int(a.calls) == 4


def test_only_omega_is_saved() -> None:
    shapes = {
        Favor(8, 12): (8, 6),
        RandomFourierFeatures(8, 12): (8, 6),
        SmoothedRandomFourierFeatures(8, 12): (8, 5),
        GeneralizedRandomFeatures(8, 12): (8, 12),
    }
    for feature_map, shape in shapes.items():
        state = feature_map.state_dict()
        assert {name: tuple(t.shape) for name, t in state.items()} == {"omega": shape}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", MAPS, ids=lambda c: c.__name__)
def test_any_dtype(cls, dtype) -> None:
    """The features of a half-precision map are those of its own weights and inputs, rounded."""
    x = torch.randn(5, 16).to(dtype)
    feature_map = cls(16).to(dtype)
    exact = copy.deepcopy(feature_map).double()
    found = feature_map(x)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), exact(x.double()), rtol=4 * torch.finfo(dtype).eps, atol=1e-4
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomFourierFeatures(8, 5), "must be even and at least 2.*got 5; pass n_dims=4"),
        (lambda: Favor(8, 0), "must be even and at least 2.*got 0; pass n_dims=2"),
        (lambda: Favor(7), r"got 7 \(from query_dimensions\); pass n_dims=6"),
        (lambda: SmoothedRandomFourierFeatures(8, 2), "at least 3, a pair and the constant"),
        (lambda: SmoothedRandomFourierFeatures(8, smoothing=-1.0), "smoothing.*>= 0, got -1"),
        (lambda: GeneralizedRandomFeatures(8, -2), "at least 1, got -2"),
        (lambda: Favor(8, redraw=0), "redraw must be at least 1"),
        (lambda: Favor(8, softmax_temp=-1.0), "softmax_temp must not be negative"),
        (lambda: Favor(8)(torch.randn(3, 9)), "made for 8 query dimensions, got inputs of 9"),
    ],
)
def test_impossible_sizes(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_smoothing_is_added_exactly() -> None:
    x = torch.randn(3, 8)
    for n_dims in (8, 9):
        feature_map = SmoothedRandomFourierFeatures(8, n_dims, smoothing=0.3)
        assert feature_map.feature_dims == feature_map(x).shape[-1] == 2 * ((n_dims - 1) // 2) + 1
        torch.testing.assert_close(feature_map(x).square().sum(-1), torch.full((3,), 1.3))


def test_a_subclass_with_other_features_is_not_taken_for_an_exponential() -> None:
    class Clipped(Favor):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return super().forward(x).clamp(max=2.0)

    assert Favor.exponential
    assert not Clipped.exponential


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_bfloat16_holds_what_is_drawn(projection) -> None:
    """So that kernels, which multiply in the dtype of the inputs, use the same map in each."""
    feature_map = Favor(64, n_dims=128, projection=projection, generator=1).train()
    drawn = []
    for again in (lambda: None, feature_map._redraw, feature_map._redraw, feature_map.resample):
        again()
        drawn.append(feature_map.omega.clone())
        assert torch.equal(drawn[-1].bfloat16().float(), drawn[-1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[2], drawn[3])


def test_rounded_directions_stay_nearly_orthogonal() -> None:
    """Each entry is rounded by 2^-9 of it at most, at random; two meet in every product."""
    directions = Favor(64, n_dims=128, generator=1).omega.double()
    directions = directions / directions.norm(dim=0)
    cosines = directions.mT @ directions - torch.eye(64)
    assert cosines.abs().max() < 2**-9
    assert cosines.square().mean().sqrt() < 2 * 2**-9 / 64**0.5
