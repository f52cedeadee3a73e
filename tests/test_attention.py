"""Attentions over whole sequences, and the layer around them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fast_transformers import ops
from fast_transformers.attention import (
    AttentionLayer,
    CausalLinearAttention,
    ConditionalFullAttention,
    LinearAttention,
)
from fast_transformers.attention.causal_linear_attention import causal_linear
from fast_transformers.events import AttentionEvent, EventDispatcher, QKVEvent
from fast_transformers.feature_maps import Favor, elu_feature_map, features_of
from fast_transformers.masking import FullMask, LengthMask, TriangularCausalMask
from tests.maps import ALL, BUILT_IN
from tests.support import listen, make_full, make_qkv, plain_softmax

N, L, S, H, E, M = 2, 5, 7, 3, 8, 5
LINEAR = {"linear": LinearAttention, "causal-linear": CausalLinearAttention}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("keys", [L, S, 3])
def test_linear_attention(kind, name, keys):
    q, k, v = make_qkv(L, keys, dtype=torch.float64)
    attention = LINEAR[kind](E, ALL[name]).double()
    mask = TriangularCausalMask(L) if kind == "causal-linear" else FullMask(L, keys)
    lengths = LengthMask(torch.tensor([keys, 2]), max_len=keys)
    attended = attention(q, k, v, mask, None, lengths)
    reference = ops.linear_attention if kind == "linear" else ops.causal_linear_attention
    expected = reference(
        q, k, v, features_of(attention.feature_map),
        key_mask=lengths.bool_matrix, eps=1e-6, impl="reference",
    ).values  # fmt: skip
    assert_close(attended, expected)


def test_linear_attention_is_the_formula():
    q, k, v = make_qkv(L, L, dtype=torch.float64)
    scores = torch.einsum("nlhe,nshe->nlhs", *(nn.functional.elu(x) + 1 for x in (q, k)))
    visible = {"linear": scores, "causal-linear": scores.transpose(1, 2).tril().transpose(1, 2)}
    for kind, mask in (("linear", FullMask(L)), ("causal-linear", TriangularCausalMask(L))):
        weights = visible[kind] / (visible[kind].sum(-1, keepdim=True) + 0.5)
        attended = LINEAR[kind](E, eps=0.5)(q, k, v, mask, None, None)
        assert_close(attended, torch.einsum("nlhs,nshm->nlhm", weights, v))
    product = torch.einsum("nhls,nshm->nlhm", torch.einsum("nlhe,nshe->nhls", q, k).tril(), v)
    assert_close(causal_linear(q, k, v), product)


def test_masks_of_linear_attention():
    q, k, v = make_qkv(L, L)
    linear = LinearAttention(E)
    every = linear(q, k, v, FullMask(L), None, None)
    for mask in (None, FullMask(3), torch.ones(L, L, dtype=torch.bool), LengthMask.full(L, L)):
        assert torch.equal(linear(q, k, v, mask, None, None), every)
    for mask in (TriangularCausalMask(L), torch.rand(L, L) < 0.5):
        with pytest.raises(RuntimeError, match=r"does not support arbitrary.*'causal-linear'"):
            linear(q, k, v, mask, None, None)


def test_masks_of_causal_linear_attention():
    q, k, v = make_qkv(L, L)
    causal = CausalLinearAttention(E)
    expected = causal(q, k, v, TriangularCausalMask(L), None, None)
    tril = torch.ones(L, L, dtype=torch.bool).tril()
    for mask in (tril, TriangularCausalMask(100), TriangularCausalMask(L, device="meta")):
        assert torch.equal(causal(q, k, v, mask, None, None), expected)
    for mask in (None, FullMask(L), tril.T):
        with pytest.raises(RuntimeError, match=r"only supports full lower tri.*TriangularCausalM"):
            causal(q, k, v, mask, None, None)
    q, k, v = make_qkv(1)
    causal(q, k, v, FullMask(1), None, None)


def test_a_refused_mask_draws_nothing():
    q, k, v = make_qkv(L)
    attention = CausalLinearAttention(E, Favor)
    for _ in range(2):
        omega = attention.feature_map.omega.clone()
        with pytest.raises(RuntimeError):
            attention(q, k, v, FullMask(L), None, None)
    assert torch.equal(attention.feature_map.omega, omega)


@pytest.mark.parametrize("kind", ["full", *LINEAR])
def test_masks_that_are_no_masks(kind):
    q, k, v = make_qkv(L)
    attention = make_full() if kind == "full" else LINEAR[kind](E)
    causal = TriangularCausalMask(L)
    with pytest.raises(TypeError, match="attn_mask must be a mask or a bool tensor"):
        attention(q, k, v, torch.ones(L, L), None, None)
    mask = None if kind == "linear" else causal
    with pytest.raises(TypeError, match=r"key_lengths must be.*LengthMask\(lengths"):
        attention(q, k, v, mask, None, torch.tensor([L, 2]))
    with pytest.raises(ValueError, match="key_lengths must have shape"):
        attention(q, k, v, mask, None, LengthMask(torch.tensor([3, 2]), max_len=3))


@pytest.mark.parametrize("kind", ["full", *LINEAR])
def test_key_lengths(kind):
    q, k, v = make_qkv(L)
    attention = make_full() if kind == "full" else LINEAR[kind](E)
    mask = None if kind == "linear" else TriangularCausalMask(L)
    lengths = LengthMask(torch.tensor([3, 0]), max_len=L)
    expected = attention(q, k, v, mask, None, lengths)
    assert not expected[1].any()  # no key at all
    for same in (
        LengthMask(torch.tensor([3, 0])),
        lengths.bool_matrix,
        FullMask(lengths.bool_matrix),
    ):
        assert torch.equal(attention(q, k, v, mask, None, same), expected)
    every = attention(q, k, v, mask, None, None)
    assert_close(attention(q, k, v, mask, None, LengthMask(torch.tensor([L, L]))), every)


def test_conditional_full_attention():
    calls, events = [], listen()

    class Other(nn.Module):
        def forward(self, *args):
            calls.append(args)
            return args[2]

    own = EventDispatcher()
    heard = []
    own.listen(AttentionEvent, heard.append)
    attention = ConditionalFullAttention(Other(), 5, 0.3, 0.0, event_dispatcher=own)
    masks = (FullMask(5), LengthMask.full(N, 5), LengthMask.full(N, 5))
    q, k, v = make_qkv(5)
    assert_close(attention(q, k, v, *masks), plain_softmax(q, k, v, temp=0.3)[0])
    assert not calls
    assert [e.source for e in heard] == [attention.full_attention]
    assert not events  # the inner attention has the dispatcher of the outer one
    for lengths in ((6, 5), (5, 6)):
        q, k, v = make_qkv(*lengths)
        assert attention(q, k, v, *masks) is v
        assert calls.pop() == (q, k, v, *masks)
    assert ConditionalFullAttention(Other()).length_limit == 512


def test_conditional_full_attention_has_one_mask_for_both_sides():
    attention = ConditionalFullAttention(CausalLinearAttention(E), 5, attention_dropout=0.0)
    for length in (5, 6):
        q, k, v = make_qkv(length)
        mask = TriangularCausalMask(length)
        expected = (
            plain_softmax(q, k, v, mask.bool_matrix)[0]
            if length == 5
            else CausalLinearAttention(E)(q, k, v, mask, None, None)
        )
        assert_close(attention(q, k, v, mask, None, None), expected)


def test_attention_layer():
    inner_calls, events = [], listen()

    def inner(*args):  # a plain function, and six positional arguments
        inner_calls.append(args)
        return args[2][:, :L]

    layer = AttentionLayer(inner, 16, 4, 6, 5, 10)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if "weight" in name}
    assert shapes == {
        "query_projection.weight": (24, 16),
        "key_projection.weight": (24, 10),
        "value_projection.weight": (20, 10),
        "out_projection.weight": (16, 20),
    }
    x, memory = torch.randn(N, L, 16), torch.randn(N, S, 10)
    out = layer(x, memory, memory, "attn", "queries", "keys")
    q, k, v, *masks = inner_calls[0]
    assert masks == ["attn", "queries", "keys"]
    assert_close(q, layer.query_projection(x).view(N, L, 4, 6))
    assert_close(k, layer.key_projection(memory).view(N, S, 4, 6))
    values = layer.value_projection(memory)
    assert_close(v, values.view(N, S, 4, 5))
    assert_close(out, layer.out_projection(values[:, :L]))
    assert isinstance(events[0], QKVEvent)
    assert events[0].source is layer
    assert (events[0].queries, events[0].keys, events[0].values) == (q, k, v)


def test_attention_layer_defaults():
    layer = AttentionLayer(make_full(), 10, 3)  # 10 // 3, as the older library
    assert layer.key_projection.weight.shape == (9, 10)
    assert layer.value_projection.weight.shape == (9, 10)
    assert layer.n_heads == 3
    assert layer.event_dispatcher is EventDispatcher.get()
    positional = AttentionLayer(make_full(), 10, 3, None, None, None, "elsewhere")
    assert positional.event_dispatcher is EventDispatcher.get("elsewhere")
    without = AttentionLayer(make_full(), 12, 3, bias=False)
    assert [n for n, _ in without.named_parameters() if "bias" in n] == []


def test_an_inner_attention_may_join_the_heads():
    layer = AttentionLayer(lambda q, k, v, *masks: v.flatten(2), 12, 3)
    x = torch.randn(N, L, 12)
    assert_close(layer(x, x, x, None, None, None), layer.out_projection(layer.value_projection(x)))


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("kind", ["full", "conditional", *LINEAR])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "autocast"])
def test_dtypes(kind, name, dtype):
    inner = {
        "full": lambda: make_full(),
        "conditional": lambda: ConditionalFullAttention(
            CausalLinearAttention(E, BUILT_IN[name]), L
        ),
        **{kind: lambda kind=kind: LINEAR[kind](E, BUILT_IN[name]) for kind in LINEAR},
    }[kind]()
    layer = AttentionLayer(inner, H * E, H).eval()
    mask = FullMask(S) if kind == "linear" else TriangularCausalMask(S)
    x, lengths = torch.randn(N, S, H * E), LengthMask(torch.tensor([S, 3]))
    expected = layer(x, x, x, mask, lengths, lengths)
    context = contextlib.nullcontext()
    if dtype == "autocast":
        context, out_type = torch.autocast("cpu", torch.bfloat16), torch.bfloat16
    else:
        out_type = getattr(torch, dtype)
        layer, x = layer.to(out_type), x.to(out_type)
    x.requires_grad_()
    with context:
        out = layer(x, x, x, mask, lengths, lengths)
    assert out.dtype == out_type
    tolerance = 1e-5 if dtype == "float64" else 0.03
    assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    out.float().square().sum().backward()
    assert x.grad.isfinite().all()


def test_the_default_map_is_elu():
    q, k, v = make_qkv(L)
    attended = [LinearAttention(E, f)(q, k, v, None, None, None) for f in (None, elu_feature_map)]
    assert torch.equal(*attended)
    with pytest.raises(TypeError, match="must be a factory"):
        LinearAttention(E, torch.relu)
