"""Activation checkpointing: a forward pass that is computed again sees the same features."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fast_transformers import ops
from fast_transformers.attention import CausalLinearAttention
from fast_transformers.builders import TransformerDecoderBuilder, TransformerEncoderBuilder
from fast_transformers.feature_maps import (
    ActivationFunctionFeatureMap,
    Favor,
    RandomFeatureMap,
    build_feature_map,
    features_of,
)
from fast_transformers.masking import TriangularCausalMask
from tests.maps import ALL
from tests.support import make_qkv

N, L, D = 2, 9, 12
MAPS = {**ALL, "relu": ActivationFunctionFeatureMap.factory(torch.relu)}
SIZES = {
    "n_layers": 2, "n_heads": 2, "query_dimensions": 8, "value_dimensions": 6,
    "feed_forward_dimensions": 16,
}  # fmt: skip
KINDS = {
    "linear": (TransformerEncoderBuilder, {"attention_type": "linear"}),
    "causal": (TransformerEncoderBuilder, {"attention_type": "causal-linear"}),
    "decoder": (
        TransformerDecoderBuilder,
        {"self_attention_type": "causal-linear", "cross_attention_type": "linear"},
    ),
}
close = partial(assert_close, rtol=1e-12, atol=1e-12)  # float64, the same operations
reentrant = pytest.mark.parametrize("reentrant", [False, True])


def gradients(model: nn.Module, x: Tensor, mode: bool | None, kind: str) -> list[Tensor]:
    """Of the input and the weights; ``mode`` is that of the checkpoints, None for none."""
    model.zero_grad()
    x, memory = x.clone().requires_grad_(), x.flip(1)
    mask = (TriangularCausalMask(L),) if kind != "linear" else ()
    torch.manual_seed(5)  # dropout
    y = x
    for layer in model.layers:
        inputs = (y, memory, *mask) if kind == "decoder" else (y, *mask)
        y = layer(*inputs) if mode is None else checkpoint(layer, *inputs, use_reentrant=mode)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weight).sum().backward()
    return [x.grad, *(p.grad for p in model.layers.parameters())]


def draws(model: nn.Module) -> list[Tensor]:
    return [m.omega.clone() for m in model.modules() if isinstance(m, RandomFeatureMap)]


@reentrant
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_draws_are_those_without(kind, name, reentrant) -> None:
    """Over steps that redraw, with dropout."""
    builder, types = KINDS[kind]
    plain = builder.from_kwargs(feature_map=MAPS[name], **types, **SIZES).get().double()
    model = copy.deepcopy(plain)
    seen = []
    for _ in range(3):
        x = torch.randn(N, L, D, dtype=torch.float64)
        close(gradients(model, x, reentrant, kind), gradients(plain, x, None, kind))
        for found, expected in zip(draws(model), draws(plain), strict=True):
            assert torch.equal(found, expected)
        seen += draws(model)[:1]
    assert len({float(omega.sum()) for omega in seen}) == len(seen)
    assert bool(seen) == (name not in ("elu", "relu", "asymmetric"))


@reentrant
def test_a_users_map_is_not_drawn_again(reentrant) -> None:
    class Drawn(ALL["asymmetric"]):  # type: ignore[misc]
        def new_feature_map(self) -> None:
            calls.append(self.training)
            self.scale = torch.rand(())  # from the global generator, not a buffer

        def forward_queries(self, x: Tensor) -> Tensor:
            return super().forward_queries(x) + self.scale

    calls: list[bool] = []
    attention = CausalLinearAttention(8, Drawn)
    results = []
    for mode in (None, reentrant):
        torch.manual_seed(3)
        q, k, v = (x.requires_grad_() for x in make_qkv(L))
        inputs = (q, k, v, TriangularCausalMask(L), None, None)
        if mode is None:
            out = attention(*inputs)
        else:
            out = checkpoint(attention, *inputs, use_reentrant=mode)
        out.square().sum().backward()
        results.append([x.grad for x in (q, k, v)])
    assert calls == [True, True]
    assert_close(*results)


@reentrant
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("function", [ops.linear_attention, ops.causal_linear_attention])
def test_the_functions(function, name, reentrant) -> None:
    """Values and state, of a map that stays, in several chunks and from a state."""
    feature_map = build_feature_map(MAPS[name], 8).double().eval()
    inputs = make_qkv(70, dtype=torch.float64)
    start = function(*inputs, features_of(feature_map)).state.map(Tensor.detach)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, state = function(q, k, v, features_of(feature_map), state=start, chunk_size=16)
        return out, state.kv / state.z[..., None]

    results = []
    for mode in (None, reentrant):
        feature_map.zero_grad()
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, means = run(*leaves) if mode is None else checkpoint(run, *leaves, use_reentrant=mode)
        (out.square().sum() + means.square().sum()).backward()
        results.append([t.grad for t in (*leaves, *feature_map.parameters())])
    close(*results)


def test_saved_tensors_are_unpacked_once() -> None:
    """As hooks that move them, or compute them again, expect."""
    packed, unpacked = [], []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x

    def unpack(x: Tensor) -> Tensor:
        unpacked.append(x)
        return x

    inputs = [x.requires_grad_() for x in make_qkv(70)]
    for function in (ops.linear_attention, ops.causal_linear_attention):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out, state = function(*inputs, features_of(Favor(8)))
            loss = out.square().sum() + state.kv.sum()
        loss.backward()
    assert len(unpacked) <= len(packed)
