"""Gradients of gradients: right with the reference forms, an error with the others, never 0."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fast_transformers import ops
from fast_transformers.attention import AttentionLayer, CausalLinearAttention, LinearAttention
from fast_transformers.builders import TransformerDecoderBuilder, TransformerEncoderBuilder
from fast_transformers.causal_product import causal_dot_product
from fast_transformers.feature_maps import (
    ActivationFunctionFeatureMap,
    build_feature_map,
    features_of,
)
from fast_transformers.masking import FullMask, TriangularCausalMask
from fast_transformers.recurrent.attention import (
    RecurrentCrossLinearAttention,
    RecurrentLinearAttention,
)
from tests.maps import ALL
from tests.models import SMALL
from tests.support import make_qkv

L, E, M = 5, 8, 3
EPS = 0.1  # with relu a query and all keys may have nothing in common
MAPS = {**ALL, "relu": ActivationFunctionFeatureMap.factory(torch.relu)}
FUNCTIONS = {"full": ops.linear_attention, "causal": ops.causal_linear_attention}
MESSAGE = r"no second derivatives.*impl='reference'"


def leaves(length: int = L) -> list[Tensor]:
    inputs = make_qkv(length, N=1, H=2, E=E, M=M, std=0.5, dtype=torch.float64)
    return [x.requires_grad_() for x in inputs]


def make_features(name: str) -> ops.Features:
    return features_of(build_feature_map(MAPS[name], E).double().eval())


def make_state(name: str) -> ops.LinearState:
    """One that requires gradients."""
    inputs = make_qkv(2, N=1, H=2, E=E, M=M, seed=7, dtype=torch.float64)
    state = ops.linear_attention(*inputs, make_features(name)).state.map(Tensor.detach)
    state.kv.requires_grad_(), state.z.requires_grad_()
    return state


def penalise(out: Tensor, x: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients of a gradient penalty; a gradient cut off from the graph counts as a constant."""
    known = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True, **known)
    if not gradient.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(gradient.square().sum(), inputs, **known)


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_refuse_or_are_right(kind, name, continued) -> None:
    """Values and both sums, by inputs, by a state, and by weights of the map."""
    inputs, features = leaves(), make_features(name)
    state = make_state(name) if continued else None
    sources = [*inputs, *([state.kv, state.z] if state else []), *features.parameters]
    forms = [
        FUNCTIONS[kind](*inputs, features, state=state, eps=EPS, impl=impl)
        for impl in ("auto", "reference")
    ]
    refused = 0
    for output in ("values", "S", "z"):
        found, expected = (
            form.values if output == "values" else form.state[output == "z"] for form in forms
        )
        for x in sources:
            right = penalise(expected, x, sources)
            try:
                second = penalise(found, x, sources)
            except RuntimeError as error:
                assert re.search(MESSAGE, str(error)), error  # noqa: PT017
                refused += 1
            else:
                assert_close(second, right)
    assert refused >= len(inputs)


def test_the_product_refuses() -> None:
    q, k, v = leaves()
    out = causal_dot_product(*(x.transpose(1, 2) for x in (q, k, v)))
    for x in (q, k, v):
        with pytest.raises(RuntimeError, match=MESSAGE):
            penalise(out, x, (q, k, v))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", ["linear", "causal", "layer", "cross"])
def test_attentions_refuse(kind, name) -> None:
    q, k, v = leaves()
    if kind == "cross":  # the memory's sums; the query is looked up by autograd's own operations
        attention = RecurrentCrossLinearAttention(E, MAPS[name]).double()
        out, _ = attention(q[:, 0], k, v, None)
        sources = [k, v]
    else:
        cls = LinearAttention if kind == "linear" else CausalLinearAttention
        attention, inputs = cls(E, MAPS[name]), (q, k, v)
        if kind == "layer":
            attention = AttentionLayer(attention, 2 * E, 2)
            inputs = tuple(x.detach().flatten(2).requires_grad_() for x in (q, k, k))
        mask = FullMask(L) if kind == "linear" else TriangularCausalMask(L)
        out = attention.double()(*inputs, mask, None, None)
        weights = [p for n, p in attention.named_parameters() if "feature_map" in n]
        sources = [*inputs, *weights]
    for x in sources:
        with pytest.raises(RuntimeError, match=MESSAGE):
            penalise(out, x, sources)


@pytest.mark.parametrize("make", [TransformerEncoderBuilder, TransformerDecoderBuilder])
def test_models_refuse(make) -> None:
    """A gradient penalty on a whole model."""
    types = {name: "linear" for name in make.options() if name.endswith("attention_type")}
    model = make.from_kwargs(**types, **SMALL).get()
    x = torch.randn(1, L, 10, requires_grad=True)
    out = model(x, *((x,) if make is TransformerDecoderBuilder else ()))
    with pytest.raises(RuntimeError, match=MESSAGE):
        penalise(out, x, [x])


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_reference_is_right(kind, name, continued) -> None:
    """Values and true sums; the gradient of the gradient against finite differences."""
    features, state = make_features(name), make_state(name) if continued else None
    given = () if state is None else (state.kv, state.z)

    def function(q: Tensor, k: Tensor, v: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        start = ops.LinearState(*sums, state.shift) if state else None
        out = FUNCTIONS[kind](q, k, v, features, state=start, impl="reference", eps=EPS)
        return out.values, *out.state

    torch.autograd.gradgradcheck(function, (*leaves(2), *given), fast_mode=True)


@pytest.mark.parametrize("name", MAPS)
def test_steps_are_right(name) -> None:
    """One token is differentiated by autograd itself, in functions and in modules."""
    attention = RecurrentLinearAttention(E, MAPS[name], EPS).double().eval()
    state = make_state(name)
    inputs = [x[:, 0].detach().requires_grad_() for x in leaves(1)]

    def function(q: Tensor, k: Tensor, v: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        out, after = attention(q, k, v, ops.LinearState(*sums, state.shift))
        return out, *after

    torch.autograd.gradgradcheck(function, (*inputs, state.kv, state.z), fast_mode=True)
