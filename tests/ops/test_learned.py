"""Trained projections in the kernels, and trained linear maps before them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.library import opcheck

from fast_transformers import ops
from fast_transformers.feature_maps import (
    T2R,
    Favor,
    FeatureMap,
    Normalized,
    Projected,
    RandomFourierFeatures,
    TaylorFeatureMap,
    elu_feature_map,
    features_of,
)
from fast_transformers.ops import Features
from fast_transformers.ops.call import Settings
from tests.ops.kernels import (
    DEVICE,
    FUNCTIONS,
    MARKS,
    OPERATORS,
    E,
    check,
    make,
    short_segments,  # noqa: F401  for all tests here
)
from tests.ops.test_operators import MAPS
from tests.support import assert_as_accurate, differentiate
from tests.test_compile import compiled

PROJECTED = ["projected_relu", "fourier", "smoothed_fourier", "hyperbolic"]
pytestmark = MARKS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Trained:
    """A named map as a function of its projection."""

    def __init__(self, feature_map: FeatureMap) -> None:
        self.map = feature_map

    def projection(self, dtype: torch.dtype) -> Tensor:
        return self.map.omega.to(DEVICE, dtype)

    def features(self, projection: Tensor) -> Features:
        formula = self.map.formula()
        assert formula is not None
        names = ("log_queries", "log_keys") if self.map.exponential else ("forward", "forward")
        return Features(
            *(partial(self._call, name, projection) for name in names),
            exponential=self.map.exponential,
            any_heads=True,
            formula=formula._replace(projection=projection),
        )

    def _call(self, name: str, projection: Tensor, x: Tensor) -> Tensor:
        self.map.omega = projection
        return getattr(self.map, name)(x)


def attend(
    function: Any, trained: Trained, q: Tensor, k: Tensor, v: Tensor, projection: Tensor,
    **options: Any,
) -> ops.Attended:  # fmt: skip
    return function(q, k, v, trained.features(projection), **options)


@pytest.mark.parametrize("kind", PROJECTED)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradient_of_a_projection(function, kind) -> None:
    """With masked keys that hold anything, and queries that share them."""
    trained = Trained(MAPS[kind](E))
    std = 0.3 if kind == "fourier" else 1.0  # denominators that do not cancel
    q, k, v = make(70, N=2, strided=True, std=std)
    k, v = k[:, :, :1], v[:, :, :1]
    mask = torch.rand(2, 70, device=DEVICE) > 0.3
    k[~mask] = v[~mask] = torch.nan
    call = partial(attend, FUNCTIONS[function], trained, key_mask=mask)
    check(call, [q, k, v, trained.projection(torch.float32)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["smoothed_fourier", "hyperbolic"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes(function, kind, dtype) -> None:
    trained = Trained(MAPS[kind](E))
    inputs = [*make(70, dtype=dtype), trained.projection(dtype)]
    check(partial(attend, FUNCTIONS[function], trained), inputs)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_several_blocks_and_keys_that_differ_much(function) -> None:
    trained = Trained(Favor(E, n_dims=140, generator=3))
    inputs = [*make(70, 66, H=1, std=10.0), trained.projection(torch.float32)]
    logs = float(trained.map.log_keys(inputs[1].cpu()).abs().max())
    check(partial(attend, FUNCTIONS[function], trained), inputs, log_size=logs)


@pytest.mark.parametrize("kind", ["projected_relu", "hyperbolic"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_packed_sequences(function, kind) -> None:
    trained = Trained(MAPS[kind](E))
    starts = torch.tensor([0, 66, 66, 69, 80], device=DEVICE)
    call = partial(attend, FUNCTIONS[function], trained, cu_seqlens=starts)
    check(call, [*make(80, H=1), trained.projection(torch.float32)])


@pytest.mark.parametrize("kind", PROJECTED)
@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
def test_other_forms(impl, kind) -> None:
    """Autograd differentiates them by the functions of the map."""
    trained = Trained(MAPS[kind](E))
    inputs = [*make(9, std=0.3), trained.projection(torch.float32)]
    call = partial(attend, ops.causal_linear_attention, trained)
    reference = partial(call, impl="reference")
    exact = differentiate(reference, [x.double() for x in inputs])
    plain = differentiate(reference, inputs)
    actual = differentiate(partial(call, impl=impl), inputs)
    largest = max(float(x.abs().max()) for x in exact[2:])
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert_as_accurate(a, p, e, size=largest if i >= 2 else None)


def test_a_step_does_not_hide_the_projection() -> None:
    trained = Trained(MAPS["hyperbolic"](E))
    projection = trained.projection(torch.float32).requires_grad_()
    q, k, v = (x[:, 0] for x in make(1))
    values, _ = ops.linear_attention_step(q, k, v, trained.features(projection))
    (gradient,) = torch.autograd.grad(values.square().sum(), projection)
    assert gradient.shape == projection.shape


@pytest.mark.parametrize(
    ("kind", "causal", "options"),
    [
        ("hyperbolic", True, {"mask": True}),
        ("projected_relu", False, {"groups": 2}),
        ("smoothed_fourier", True, {"dtype": torch.bfloat16}),
    ],
)
def test_operators_pass_opcheck(kind, causal, options) -> None:
    formula = MAPS[kind](E).to(DEVICE).formula()
    q, k, v = make(20, dtype=options.get("dtype", torch.float32))
    k, v = (x[:, :, :: options.get("groups", 1)] for x in (k, v))
    mask = torch.rand(1, 20, device=DEVICE) > 0.3 if options.get("mask") else None
    constants = (*Settings(kind, formula.numbers, 0, 0.1, True, True), formula.projection)
    tensors = (mask, q, k, v, *[None] * 5)
    out, *rest = OPERATORS.fused(*constants, *tensors, causal)
    given = (torch.randn_like(out), None, None)
    arguments = (*constants, *tensors, out, *rest, *given, causal, True)
    opcheck(OPERATORS.fused_backward.default, arguments)
    found = OPERATORS.fused_backward(*arguments)[5]
    assert found.shape == formula.projection.shape
    assert found.dtype == formula.projection.dtype


LINEAR = {
    "t2r": (T2R.factory(n_dims=12, bias=False), "projected_relu"),
    "t2r, bias": (T2R.factory(n_dims=12), "relu"),
    "t2r, heads": (T2R.factory(heads=2, tied=False), "relu"),
    "elu": (Projected.factory(elu_feature_map, 5), "elu_plus_one"),
    "fourier": (Projected.factory(RandomFourierFeatures, 6, tied=True), "fourier"),
    "favor": (Projected.factory(Favor.factory(n_dims=16), 5, heads=2), "hyperbolic"),
    "normalized": (Normalized.factory(Favor, of="inputs"), "hyperbolic"),
}


class Attention(nn.Module):
    """``attention(q, k, v, *weights, impl=...)``, for weights in place of those of the map."""

    def __init__(self, function: Any, feature_map: FeatureMap, **options: Any) -> None:
        super().__init__()
        self.map, self.function, self.options = feature_map, function, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, impl: str) -> ops.Attended:
        return self.function(q, k, v, features_of(self.map), **self.options, impl=impl)

    def call(self, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor, impl: str) -> ops.Attended:
        names = (name for name, _ in self.named_parameters())
        given = dict(zip(names, weights, strict=True))
        return functional_call(self, given, (q, k, v, impl))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_linear_maps_before_others(function, name, dtype, monkeypatch) -> None:
    """Kernels compute the map, whatever comes before it, and gradients reach its weights."""
    make_map, kind = LINEAR[name]
    feature_map = make_map(E)
    inputs = make(70, dtype=dtype, std=0.3 if name == "fourier" else 1.0)
    mask = torch.rand(1, 70, device=DEVICE) > 0.3
    inputs[1][~mask] = torch.nan
    attention = Attention(FUNCTIONS[function], feature_map.to(DEVICE), key_mask=mask)
    ran, run = [], ops.fused.run
    monkeypatch.setattr(ops.fused, "run", lambda *a: (ran.append(a[2].kind), run(*a))[1])
    weights = [p.detach().to(dtype) for p in feature_map.parameters()]
    check(attention.call, [*inputs, *weights])
    assert set(ran) == {kind}


@pytest.mark.parametrize("name", LINEAR)
def test_redrawn_and_differentiated_later(name) -> None:
    """The backward pass is that of the features of the forward pass."""
    feature_map = LINEAR[name][0](E).to(DEVICE).train()
    feature_map.new_feature_map()
    leaves = [*(x.requires_grad_() for x in make(9)), *feature_map.parameters()]
    results = []
    for impl in ("chunked", "triton"):
        values, _ = ops.linear_attention(*leaves[:3], features_of(feature_map), impl=impl)
        results.append((values.square().sum(), torch.zeros(())))
    feature_map.new_feature_map()
    feature_map.new_feature_map()
    (a, _), (b, _) = results
    for x, y in zip(torch.autograd.grad(a, leaves), torch.autograd.grad(b, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["t2r", "t2r, bias", "favor"])
def test_in_one_graph(name) -> None:
    torch._dynamo.reset()
    feature_map = LINEAR[name][0](E).to(DEVICE)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        features = features_of(feature_map)
        return ops.causal_linear_attention(q, k, v, features, impl="triton").values.square().sum()

    in_one_graph, counter = compiled(loss)
    for length in (3, 9, 5):
        leaves = [*(x.requires_grad_() for x in make(length)), *feature_map.parameters()]
        results = []
        for function in (in_one_graph, loss):
            value = function(*leaves[:3])
            results.append([value, *torch.autograd.grad(value, leaves)])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 2  # one for the first length, one for any


def test_torch_func() -> None:
    trained = Trained(MAPS["hyperbolic"](E))
    inputs = [*make(9), trained.projection(torch.float32)]

    def loss(*given: Tensor, impl: str = "triton") -> Tensor:
        values, _ = attend(ops.causal_linear_attention, trained, *given, impl=impl)
        return values.square().sum()

    found = torch.func.grad(loss, 3)(*inputs)
    expected = torch.func.grad(partial(loss, impl="reference"), 3)(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    many = [x.expand(2, *x.shape) for x in inputs[:3]]
    with pytest.raises(NotImplementedError, match=r"gradient of a projection.*impl='reference'"):
        torch.func.vmap(torch.func.grad(loss, 3), (0, 0, 0, None))(*many, inputs[3])


def test_what_is_explained() -> None:
    call = {"causal": True, "length": 9, "keys": 9, "device": DEVICE}
    answers = [
        ops.explain(**call, features=features_of(make_map(E)))["triton"]
        for make_map in (Projected.factory(Favor), T2R.factory(bias=False), TaylorFeatureMap)
    ]
    assert "kernels that compute hyperbolic on chip, of rows computed by torch" in answers[0]
    assert "compute the feature map on chip" in answers[1]
    assert "features computed by torch" in answers[2]
    assert features_of(Projected(E, TaylorFeatureMap)).composition is None
