"""Factories, what goes wrong with them, and what an attention sees of a map."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
from torch import nn

from fast_transformers import ops
from fast_transformers.attention import LinearAttention
from fast_transformers.feature_maps import (
    ActivationFunctionFeatureMap,
    Favor,
    FeatureMap,
    build_feature_map,
    elu_feature_map,
    features_of,
)
from fast_transformers.ops.elementwise import elu_plus_one
from tests.support import make_qkv


@pytest.mark.parametrize(
    "factory",
    [
        Favor,
        Favor.factory(n_dims=16),
        functools.partial(Favor, n_dims=16),
        lambda dims: Favor(dims, n_dims=16),
        elu_feature_map,
        None,
    ],
)
def test_factories(factory) -> None:
    first, second = (build_feature_map(factory, 8) for _ in range(2))
    assert first is not second
    assert first.query_dimensions == first.query_dims == 8


def test_a_factory_can_be_pickled_and_printed() -> None:
    factory = pickle.loads(pickle.dumps(Favor.factory(64, redraw=5)))
    assert factory(8).n_dims == 64
    assert repr(factory) == "Favor.factory(64, redraw=5)"
    assert factory(query_dims=8).redraw == 5


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Favor(8), r"got a ready Favor; pass Favor.factory\(...\)"),
        (torch.relu, r"cannot be called with 8.*ActivationFunctionFeatureMap.factory\(function\)"),
        (
            lambda x: nn.functional.elu(x) + 1,
            r"cannot be called with 8.*FeatureMap.factory\(function\)",
        ),
        (lambda d: nn.Linear(d, d), "returned Linear without new_feature_map, forward_queries"),
        (lambda d: torch.relu, "returned builtin_function_or_method without new_feature_map"),
        (3, "must be a factory.*got 3"),
    ],
)
def test_what_is_no_factory(factory, message) -> None:
    with pytest.raises(TypeError, match=message):
        LinearAttention(8, factory)


def test_errors_of_a_factory_itself_pass_through() -> None:
    with pytest.raises(ValueError, match="must be even"):
        LinearAttention(8, Favor.factory(n_dims=5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_elu_plus_one_keeps_small_values(dtype) -> None:
    x = torch.linspace(-9, 9, 400).to(dtype)
    found, exact = elu_plus_one(x), torch.where(x > 0, x.double() + 1, x.double().exp())
    assert (found > 0).all()
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    assert float(elu_plus_one(torch.tensor(-8.0, dtype=torch.bfloat16))) == pytest.approx(
        3.35e-4, rel=0.01
    )
    assert elu_plus_one(torch.tensor([-1.0, 0.0, 1.0])).tolist() == pytest.approx(
        [0.36788, 1, 2], rel=1e-5
    )
    torch.autograd.gradcheck(
        elu_plus_one, torch.tensor([-50.0, -1, 0.5, 60], dtype=torch.float64, requires_grad=True)
    )


def test_a_map_without_forward_says_so() -> None:
    with pytest.raises(NotImplementedError, match="FeatureMap must define forward"):
        FeatureMap(4)(torch.randn(4))


def test_a_redraw_before_the_backward_pass_does_not_change_its_features() -> None:
    """Two forward passes, each with its own draw, and one backward pass for both."""
    q, k, v = (x.requires_grad_() for x in make_qkv(70, dtype=torch.float64))
    feature_map = Favor(8).double()
    losses, expected = 0, 0
    for draw_seed in range(2):
        feature_map.resample(torch.Generator().manual_seed(draw_seed))
        losses = losses + ops.causal_linear_attention(q, k, v, features_of(feature_map)).values
        own = Favor(8).double()
        own.omega.copy_(feature_map.omega)
        reference = ops.causal_linear_attention(q, k, v, features_of(own), impl="reference")
        expected = expected + reference.values
    for a, b in zip(
        *(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (losses, expected)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Forgetful(FeatureMap):
    def __init__(self, query_dimensions: int) -> None:
        super().__init__(query_dimensions)
        self.weights = [torch.randn(query_dimensions, 8, requires_grad=True)]

    def forward(self, x):  # type: ignore[no-untyped-def]
        return (x @ self.weights[0]).sigmoid()


class Dropping(FeatureMap):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return nn.functional.dropout(x.sigmoid(), 0.5, self.training)


@pytest.mark.parametrize("function", [ops.linear_attention, ops.causal_linear_attention])
def test_weights_that_are_not_registered_are_not_lost_in_silence(function) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(5))
    out = function(q, k, v, features_of(Forgetful(8))).values
    with pytest.raises(RuntimeError, match=r"shape \(8, 8\) that requires a gradient.*Parameter"):
        out.sum().backward()


@pytest.mark.parametrize("function", [ops.linear_attention, ops.causal_linear_attention])
def test_dropout_inside_a_map_is_refused(function) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(5))
    with pytest.raises(RuntimeError, match=r"draws random numbers.*new_feature_map"):
        function(q, k, v, features_of(Dropping(8)))
    function(q, k, v, features_of(Dropping(8).eval()))


def test_activation_map() -> None:
    feature_map = ActivationFunctionFeatureMap(4, torch.relu)
    x, y = torch.randn(2, 3, 4)
    torch.testing.assert_close(feature_map.kernel(x, y), (x.relu() * y.relu()).sum(-1))
    assert feature_map.feature_dims == 4
    assert list(feature_map.state_dict()) == []


class NoModule:
    """The methods of a map are enough; here with exponential features."""

    exponential = True

    def new_feature_map(self):  # type: ignore[no-untyped-def]
        pass

    def log_keys(self, x):  # type: ignore[no-untyped-def]
        return x

    log_queries = log_keys

    def forward_keys(self, x):  # type: ignore[no-untyped-def]
        return x.exp()

    forward_queries = forward_keys


def test_a_map_need_not_be_a_module() -> None:
    inputs = make_qkv(5, dtype=torch.float64)
    attention = LinearAttention(8, lambda dims: NoModule())
    expected = ops.linear_attention(inputs[0].exp(), inputs[1].exp(), inputs[2], eps=0.0).values
    torch.testing.assert_close(attention(*inputs, None, None, None), expected)
