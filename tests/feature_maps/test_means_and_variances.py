"""The mean and variance of every random map, for every projection, against closed forms."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fast_transformers.feature_maps import (
    PROJECTIONS,
    Centered,
    DenseExponentialFeatures,
    Favor,
    FeatureMap,
    GeneralizedRandomFeatures,
    OptimalPositiveFeatures,
    PolySketch,
    RandomFourierFeatures,
    SmoothedRandomFourierFeatures,
)

E = 16


def centered(dims: int, **options) -> Centered:
    return Centered(dims, DenseExponentialFeatures.factory(**options))


MAPS: dict[str, Callable[..., FeatureMap]] = {
    "favor": Favor,
    "rff": RandomFourierFeatures,
    "smoothed": SmoothedRandomFourierFeatures,
    "generalized": GeneralizedRandomFeatures,
    "favor+": functools.partial(OptimalPositiveFeatures, sum_norm=0.0),
    "oprf": OptimalPositiveFeatures,
    "sderf": functools.partial(DenseExponentialFeatures, mode="sderf"),
    "saderf": functools.partial(DenseExponentialFeatures, mode="saderf"),
    "aderf": functools.partial(DenseExponentialFeatures, mode="aderf"),
    "aligned": DenseExponentialFeatures,
    "centered": centered,
}


def make(name: str, **options) -> FeatureMap:
    """A map in float64, calibrated to inputs that are neither centred nor isotropic."""
    feature_map = MAPS[name](E, softmax_temp=0.25, **options).double().eval()
    if name == "favor+":  # which calibration would turn into "oprf"
        return feature_map
    generator = torch.Generator().manual_seed(5)
    scale = torch.linspace(0.3, 1.2, E)
    q, k = torch.randn(2, 500, 1, E, generator=generator) * scale
    feature_map.calibrate(q + 0.3, 1.5 * k.flip(-1) - 0.2)
    return feature_map


def pairs(norm: float) -> tuple[Tensor, Tensor]:
    """Random, positive, negative, axis-aligned, parallel and opposite pairs, (6, E); ``norm`` is
    that after the temperature."""
    x, y = torch.randn(2, 6, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[1], y[1] = x[1].abs(), y[1].abs()
    x[2], y[2] = -x[2].abs(), -y[2].abs()
    x[3], y[3] = torch.eye(E)[3], torch.eye(E)[3] * 0.5 + torch.eye(E)[7]
    y[4], y[5] = x[4], -x[5]
    return tuple(2 * norm * v / v.norm(dim=-1, keepdim=True) for v in (x, y))


def products(feature_map: FeatureMap, x: Tensor, y: Tensor) -> Tensor:
    """phi_i(x) phi_i(y), (6, F)."""
    return feature_map.forward_queries(x) * feature_map.forward_keys(y)


def variance_and_error(found: Tensor) -> tuple[Tensor, Tensor]:
    """Of estimates (draws, pairs): the variance, summed over the pairs, and its standard error."""
    squares = (found - found.mean(0)).square().sum(-1)
    return squares.mean(), squares.std() / len(squares) ** 0.5


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("name", MAPS)
def test_the_mean_is_the_kernel(name: str, projection: str) -> None:
    """Within 4 standard errors, from many draws of few features."""
    x, y = pairs(norm=0.7)
    feature_map = make(name, n_dims=33 if name == "smoothed" else 32, projection=projection)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(600):
        feature_map.resample(generator)
        found.append(products(feature_map, x, y).sum(-1))
    estimates, kernel = torch.stack(found), feature_map.kernel(x, y)
    allowed = 4 * estimates.std(0) / len(found) ** 0.5 + 1e-6 * kernel.abs().max()
    assert ((estimates.mean(0) - kernel).abs() <= allowed).all()


@pytest.mark.parametrize("name", MAPS)
def test_the_variance_is_the_closed_form(name: str) -> None:
    """Within 10 %, from the terms of one draw of a million independent directions."""
    x, y = pairs(norm=0.6)
    directions = 1_000_000
    per_direction = 2 if name in ("favor", "rff", "smoothed") else 1
    feature_map = make(
        name, n_dims=per_direction * directions + (name == "smoothed"), projection="iid"
    )
    variances = []
    for a, b in zip(x, y, strict=True):
        terms = products(feature_map, a, b)[: per_direction * directions]
        variances.append(terms.view(per_direction, directions).sum(0).var() * directions)
    kernel = feature_map.kernel(x, y)
    closed = feature_map.relative_variance(x, y)
    known = kernel > 1e-9  # the kernel of relu is 0 for opposite pairs
    assert known.sum() >= 5
    found = torch.stack(variances) / kernel.square()
    # parallel Fourier features, and hyperbolic ones of opposite vectors, have none
    torch.testing.assert_close(found[known], closed[known], rtol=0.1, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "projection"),
    [
        *((name, "orthogonal") for name in MAPS),
        *((n, p) for n in ("favor", "generalized", "oprf") for p in ("sorf", "simplex", "qmc")),
    ],
)
def test_dependent_directions_do_not_raise_the_variance(name: str, projection: str) -> None:
    """On average over the pairs it is below that of independent ones by 2 standard errors."""
    x, y = pairs(norm=0.5)
    feature_map = make(name, n_dims=33 if name == "smoothed" else 32, projection=projection)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        feature_map.resample(generator)
        found.append(products(feature_map, x, y).sum(-1))
    kernel = feature_map.kernel(x, y)
    known = kernel > 1e-9
    relative = torch.stack(found)[:, known] / kernel[known]
    variance, error = variance_and_error(relative)
    assert variance + 2 * error <= feature_map.relative_variance(x, y)[known].sum()


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("degree", [4, 8])
def test_a_sketch_is_unbiased(degree: int, projection: str) -> None:
    """S(x).S(y) is (x'.y')^(degree/2) on average, with every projection."""
    x, y = pairs(norm=1.0)
    feature_map = PolySketch(
        E, 16, degree, softmax_temp=0.25, normalize=False, projection=projection
    ).double()
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(500):
        feature_map.resample(generator)
        found.append((feature_map.sketch(x) * feature_map.sketch(y)).sum(-1))
    estimates = torch.stack(found)
    expected = (0.25 * (x * y).sum(-1)) ** (degree // 2)
    allowed = 4 * estimates.std(0) / len(found) ** 0.5
    assert ((estimates.mean(0) - expected).abs() <= allowed).all()


@pytest.mark.parametrize(("degree", "sketch"), [(4, 16), (4, 64), (8, 256)])
def test_the_mean_of_a_squared_sketch(degree: int, sketch: int) -> None:
    """The bias is in the kernel: upwards, and the smaller the larger the sketch."""
    x, y = pairs(norm=1.0)
    feature_map = PolySketch(
        E, sketch, degree, softmax_temp=0.25, normalize=False, generator=0
    ).double()
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(800):
        feature_map.resample(generator)
        found.append((feature_map.sketch(x) * feature_map.sketch(y)).sum(-1).square())
    estimates, kernel = torch.stack(found), feature_map.kernel(x, y)
    allowed = 4 * estimates.std(0) / len(found) ** 0.5
    assert ((estimates.mean(0) - kernel).abs() <= allowed).all()
    assert (kernel > (0.25 * (x * y).sum(-1)) ** degree).all()
    phi = (feature_map.forward_queries(x) * feature_map.forward_keys(y)).sum(-1)
    torch.testing.assert_close(phi, (feature_map.sketch(x) * feature_map.sketch(y)).sum(-1) ** 2)


def squared_sketches(feature_map, x, y, draws: int = 4000):
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(draws):
        feature_map.resample(generator)
        found.append((feature_map.sketch(x) * feature_map.sketch(y)).sum(-1).square())
    return torch.stack(found)


@pytest.mark.parametrize("projection", ["orthogonal", "simplex", "antithetic"])
@pytest.mark.parametrize(("degree", "sketch"), [(4, 2 * E + 3), (8, 8 * E + 3)])
def test_the_mean_of_a_squared_sketch_of_dependent_columns(projection, degree, sketch) -> None:
    """Groups of E columns, the last of them in part, and what is built on top of them."""
    x, y = pairs(norm=1.0)
    options = {"softmax_temp": 0.25, "normalize": False}
    feature_map = PolySketch(E, sketch, degree, projection=projection, **options).double()
    found = squared_sketches(feature_map, x, y, draws=4000 if degree == 4 else 800)
    allowed = 4 * found.std(0) / len(found) ** 0.5
    kernel = feature_map.kernel(x, y)
    assert ((found.mean(0) - kernel).abs() <= allowed).all()
    if degree == 4:  # enough draws to tell it from that of independent columns
        independent = PolySketch(E, sketch, degree, **options).double().kernel(x, y)
        assert ((found.mean(0) - independent).abs() > allowed).any()


@pytest.mark.parametrize("projection", ["sorf", "qmc"])
def test_the_mean_of_a_squared_sketch_that_is_not_known(projection) -> None:
    x, y = pairs(norm=1.0)
    with pytest.raises(NotImplementedError, match=f"projection='{projection}' is not known"):
        PolySketch(E, 8, projection=projection).kernel(x, y)


def test_the_variance_of_a_squared_sketch() -> None:
    """Within 10 % of the closed form, and in the mean over the pairs within 3 standard errors."""
    x, y = pairs(norm=1.0)
    feature_map = PolySketch(E, 64, softmax_temp=0.25, normalize=False).double()
    closed = feature_map.relative_variance(x, y)
    found = squared_sketches(feature_map, x, y, draws=60_000) / feature_map.kernel(x, y)
    torch.testing.assert_close(found.var(0), closed, rtol=0.1, atol=0)
    variance, error = variance_and_error(found)
    assert error < closed.sum() / 30  # so the 10 % are no accident
    assert (variance - closed.sum()).abs() < 3 * error
    with pytest.raises(NotImplementedError, match="known for degree=4 and projection='iid'"):
        PolySketch(E, 8, degree=8).relative_variance(x, y)


@pytest.mark.parametrize("projection", ["orthogonal", "simplex"])
def test_dependent_columns_do_not_raise_the_variance_of_a_squared_sketch(projection) -> None:
    x, y = pairs(norm=1.0)
    options = {"softmax_temp": 0.25, "normalize": False}
    independent = PolySketch(E, 2 * E, **options).double()
    dependent = PolySketch(E, 2 * E, projection=projection, **options).double()
    kernel = independent.kernel(x, y)
    variance, error = variance_and_error(squared_sketches(dependent, x, y) / kernel)
    assert variance + 2 * error <= independent.relative_variance(x, y).sum()


def test_the_variance_of_many_features_is_that_of_one_by_their_number() -> None:
    x, y = pairs(norm=0.5)
    few, many = (OptimalPositiveFeatures(E, n).double() for n in (10, 1000))
    torch.testing.assert_close(few.relative_variance(x, y), 100 * many.relative_variance(x, y))
