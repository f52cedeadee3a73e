"""Values and gradients of the kernels, beside the reference."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fast_transformers import ops
from fast_transformers.feature_maps import (
    ActivationFunctionFeatureMap,
    Favor,
    GeneralizedRandomFeatures,
    elu_feature_map,
    features_of,
)
from fast_transformers.ops import Features
from fast_transformers.ops.kinds import KINDS
from tests.maps import Asymmetric
from tests.ops.kernels import (
    DEVICE,
    FUNCTIONS,
    MARKS,
    TWO,
    E,
    check,
    features,
    make,
    short_segments,  # noqa: F401  for all tests here
)
from tests.support import LENGTHS, differentiate

pytestmark = MARKS
DTYPES = [("full", torch.float32), ("causal", torch.float32)]
DTYPES += [("causal", torch.bfloat16), ("full", torch.float16)]
if DEVICE.type == "cuda":  # the interpreter is slow
    DTYPES += [("full", torch.bfloat16), ("causal", torch.float16)]


@pytest.fixture(scope="module")
def squared_relu() -> Callable[[Tensor], Tensor]:
    return runpy.run_path("examples/squared_relu.py")["squared_relu"]


@pytest.mark.parametrize(("function", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(function, kind, dtype) -> None:
    inputs = make(70, H=1, strided=True, dtype=dtype, positive=kind == "identity")
    check(partial(FUNCTIONS[function], features=features(kind)), inputs)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_lengths(function, kind, length) -> None:
    check(partial(FUNCTIONS[function], features=features(kind)), make(length, H=1, M=20))


@pytest.mark.parametrize(("queries", "keys"), [(7, 70), (70, 7), (0, 3), (3, 0)])
@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_cross_lengths(function, kind, queries, keys) -> None:
    check(partial(FUNCTIONS[function], features=features(kind)), make(queries, keys))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wide(function) -> None:
    """Several tiles of values and of query dimensions."""
    favor = features_of(Favor(72, n_dims=140, generator=3).to(DEVICE))
    check(partial(FUNCTIONS[function], features=favor), make(20, H=1, E=72, M=72), log_size=50.0)


@pytest.mark.parametrize(("e", "m"), [(256, 130), (40, 256), (160, 24)])
@pytest.mark.parametrize("kind", ["elu_plus_one", "hyperbolic"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_heads_of_many_dimensions(function, kind, e, m) -> None:
    feature_map = elu_feature_map(e) if kind == "elu_plus_one" else Favor(e, 70, generator=3)
    attend = partial(FUNCTIONS[function], features=features_of(feature_map.to(DEVICE)))
    check(attend, make(70, H=1, E=e, M=m, dtype=torch.bfloat16), log_size=50.0)


@pytest.mark.parametrize("std", [1, 3, 10])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_favor_is_exact_at_any_norm(function, std) -> None:
    favor = features_of(Favor(64, n_dims=32, generator=3).to(DEVICE))
    inputs = make(131, H=1, E=64, std=std)
    logs = float(favor.keys(inputs[1]).abs().max())
    check(partial(FUNCTIONS[function], features=favor), inputs, log_size=logs)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_queries_far_from_the_first_directions(function) -> None:
    """Their largest factors are 2^200 times those of the block that kernels look at first."""
    favor = Favor(64, n_dims=140, generator=3).to(DEVICE)
    q, k, v = make(70, H=1, E=64)
    first, last = favor.omega[:, :32], favor.omega[:, 69]
    last = last - first @ torch.linalg.lstsq(first, last).solution
    q[:, 5] = 100 * last / last.norm()
    logs = favor.log_queries(q[:, 5])[0, 0].unflatten(0, (2, 70))
    assert logs.max() - logs[:, :32].max() > 200 * math.log(2)
    logs = float(logs.abs().max())
    attend = partial(FUNCTIONS[function], features=features_of(favor))
    check(attend, [q, k, v], log_size=logs)


@pytest.mark.parametrize("times", [1.0, 1.3, 1.7])
def test_a_key_far_from_the_others(times) -> None:
    """Its |x|^2/2 is up to 2^130 from theirs, and yet its largest feature is among the largest."""
    favor = Favor(64, n_dims=32, generator=3).to(DEVICE)
    q, k, v = make(131, H=1, E=64)
    k[:, [5, 100]] = times * favor.omega[:, 7] * 64**0.25
    q[:, 20] = k[:, 5] / 8
    logs = float(favor.log_keys(k).abs().max())
    attend = partial(FUNCTIONS["causal"], features=features_of(favor))
    check(attend, [q, k, v], log_size=logs)


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_maps_without_a_formula(function, exponential) -> None:
    """Torch computes the features; weights inside receive gradients."""
    inner = Asymmetric(E).to(DEVICE)
    q, k, v = make(70)
    mask = torch.rand(1, 70, device=DEVICE) > 0.3

    def attend(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor, impl: str) -> ops.Attended:
        def phi(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, weight, bias).sigmoid() + 0.1

        halves = partial(zip, ("weight", "bias"), strict=True)
        of_queries, of_keys = dict(halves(weights[:2])), dict(halves(weights[2:]))
        maps = partial(phi, **of_queries), partial(phi, **of_keys)
        phi_of = Features(*maps, exponential=exponential, parameters=weights)
        return FUNCTIONS[function](q, k, v, phi_of, key_mask=mask, impl=impl)

    k[~mask] = v[~mask] = torch.nan
    check(attend, [q, k, v, *(x.detach() for x in inner.parameters())])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_two_runs_are_the_same_to_the_bit(function) -> None:
    run = partial(FUNCTIONS[function], features=features("hyperbolic"), impl="triton")
    inputs = make(70)
    for a, b in zip(differentiate(run, inputs), differentiate(run, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [36, 45, 48])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_of_features_that_begin_anywhere(function, width) -> None:
    """Rows of 45 numbers of 2 bytes are aligned to nothing; the first launch is as any other."""
    inputs = make(12, N=3, E=width, M=8, dtype=torch.bfloat16, positive=True)
    attend = partial(FUNCTIONS[function], features=features("identity"))
    run = partial(attend, impl="triton")
    first, *others = (differentiate(run, inputs) for _ in range(4))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)
    check(attend, inputs)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_common_factors_cancel(function) -> None:
    """What multiplies all features of a query, or of all keys, does not change the values."""
    leaves = [x.requires_grad_() for x in make(131, std=2.0)]
    phi = features("logarithm")
    values = FUNCTIONS[function](*leaves, phi, impl="triton").values
    dq, dk, _ = torch.autograd.grad((values * torch.randn_like(values)).sum(), leaves)
    assert (dq.sum(-1).abs() <= 1e-5 * dq.abs().sum(-1) + 1e-6).all()
    assert (dk.sum((1, 3)).abs() <= 1e-5 * dk.abs().sum((1, 3))).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("projected", [False, True])
def test_registered_function(function, projected, squared_relu) -> None:
    """On chip, in both directions, in kernels and in the chunked form."""
    if projected:
        feature_map = GeneralizedRandomFeatures(E, 12, kernel_fn=squared_relu, generator=1)
    else:
        feature_map = ActivationFunctionFeatureMap(E, squared_relu)
    attend = partial(FUNCTIONS[function], features=features_of(feature_map.to(DEVICE)))
    inputs = make(70, H=1)
    assert attend.keywords["features"].formula is not None
    check(attend, inputs)
    exact = differentiate(partial(attend, impl="reference"), [x.double() for x in inputs])
    for a, e in zip(differentiate(partial(attend, impl="chunked"), inputs), exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)
