"""What builders return at each call, and copies of builders."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fast_transformers.builders import TransformerEncoderBuilder
from fast_transformers.feature_maps import Favor, elu_feature_map
from tests.models import ATTENTION, DECODERS, ENCODERS, MODELS, SMALL


@pytest.mark.parametrize("make", MODELS)
def test_weights_are_new_each_time(make):
    builder = make.from_kwargs(**SMALL)
    one, other = builder.get(), builder.get()
    first = [p for n, p in one.named_parameters() if "query_projection.weight" in n]
    assert not torch.equal(first[0], first[1])
    second = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert parameter is not second[name]
        if "projection.weight" in name:
            assert not torch.equal(parameter, second[name])


def test_order_of_random_numbers():
    """Inner attention, projections, then the feed-forward network, layer by layer."""
    builder = TransformerEncoderBuilder.from_kwargs(
        attention_type="linear", feature_map=Favor, **SMALL
    )
    torch.manual_seed(3)
    encoder = builder.get()
    torch.manual_seed(3)
    for layer in encoder.layers:
        assert torch.equal(Favor(6).omega, layer.attention.inner_attention.feature_map.omega)
        shapes = {"query": (10, 12), "key": (10, 12), "value": (10, 10), "out": (10, 10)}
        for name, shape in shapes.items():
            weight = layer.get_parameter(f"attention.{name}_projection.weight")
            assert torch.equal(nn.Linear(*shape).weight, weight)
        assert torch.equal(nn.Linear(10, 7).weight, layer.linear1.weight)
        assert torch.equal(nn.Linear(7, 10).weight, layer.linear2.weight)


@pytest.mark.parametrize("make", MODELS)
def test_a_feature_map_for_each_attention(make):
    calls = []

    def factory(dimensions):
        calls.append(dimensions)
        return elu_feature_map(dimensions)

    types = {n: "linear" for n in make.options() if n.endswith("attention_type")}
    more = {} if make in ENCODERS else {"cross_query_dimensions": 9}
    make.from_kwargs(feature_map=factory, **types, **SMALL, **more).get()
    assert calls == [6, 6] if make in ENCODERS else [6, 9, 6, 9]


@pytest.mark.parametrize("make", [*ATTENTION, *MODELS])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies(make, duplicate):
    builder = make.from_kwargs(query_dimensions=6, softmax_temp=0.5, event_dispatcher="here")
    copied = duplicate(builder)
    assert type(copied) is make
    assert repr(copied) == repr(builder)
    copied.query_dimensions = 8
    assert builder.query_dimensions == 6
    if make in ATTENTION:
        assert copied.available_attentions is not None
        assert copied._registry is builder._registry
        assert type(copied.get("linear")) is type(builder.get("linear"))
    else:
        assert copied.n_layers == 4
        copied.n_heads = copied.n_layers = 1
        copied.get()


@pytest.mark.parametrize("make", [*ATTENTION, *MODELS])
def test_repr_rebuilds(make):
    builder = make.from_kwargs(query_dimensions=6, softmax_temp=0.5, feature_map=None)
    text = repr(builder)
    assert text.startswith(f"{make.__name__}.from_kwargs(\n    ")
    again = eval(text, {make.__name__: make})
    assert repr(again) == text
    if make in MODELS:
        builder.n_layers, builder.n_heads = 1, 2
        if make in DECODERS:
            builder.cross_query_dimensions = 9
        text = repr(builder)
        builder.get()
        assert repr(builder) == text
        assert "query_dimensions=6" in text
