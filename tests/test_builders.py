"""Builders: options and defaults, composition, users' attentions, and what goes wrong."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import nn

from fast_transformers import builders
from fast_transformers.builders import (
    AttentionBuilder,
    RecurrentDecoderBuilder,
    RecurrentEncoderBuilder,
    TransformerDecoderBuilder,
    TransformerEncoderBuilder,
)
from fast_transformers.builders.attention_builders import BaseAttentionBuilder
from fast_transformers.builders.base import BaseBuilder
from fast_transformers.builders.transformer_builders import (
    BaseTransformerBuilder,
    BaseTransformerDecoderBuilder,
    BaseTransformerEncoderBuilder,
)
from fast_transformers.events import EventDispatcher
from fast_transformers.feature_maps import Favor
from tests.models import ATTENTION, DECODERS, ENCODERS, MODELS, SMALL

DEFAULTS = {
    "n_layers": 4, "n_heads": 4, "query_dimensions": 64, "value_dimensions": 64,
    "model_dimensions": 256, "feed_forward_dimensions": 1024, "dropout": 0.1,
    "activation": "relu", "final_normalization": True, "event_dispatcher": "",
    "norm_first": False, "norm_type": "layernorm", "projection_bias": True, "rotary": False,
}  # fmt: skip
CROSS = {
    "cross_n_heads": 4, "cross_query_dimensions": 64, "cross_value_dimensions": 64,
    "cross_model_dimensions": 256,
}  # fmt: skip


def test_names():
    exported = {name for name in vars(builders) if name.endswith("Builder")}
    assert set(builders.__all__) == {*(b.__name__ for b in ATTENTION + MODELS)} == exported
    for cls, base in (
        (AttentionBuilder, BaseAttentionBuilder),
        (TransformerEncoderBuilder, BaseTransformerEncoderBuilder),
        (RecurrentEncoderBuilder, BaseTransformerEncoderBuilder),
        (TransformerDecoderBuilder, BaseTransformerDecoderBuilder),
        (RecurrentDecoderBuilder, BaseTransformerDecoderBuilder),
        (BaseTransformerDecoderBuilder, BaseTransformerBuilder),
        (BaseTransformerBuilder, BaseBuilder),
    ):
        assert issubclass(cls, base)


@pytest.mark.parametrize("make", MODELS)
def test_defaults(make):
    builder = make()
    expected = DEFAULTS if make in ENCODERS else {**DEFAULTS, **CROSS}
    assert {name: getattr(builder, name) for name in expected} == expected
    types = [name for name in make.options() if name.endswith("attention_type")]
    assert types == (
        ["attention_type"] if make in ENCODERS else ["self_attention_type", "cross_attention_type"]
    )
    assert [getattr(builder, name) for name in types] == ["full"] * len(types)
    assert set(make.options()) == {*expected, *types}
    assert all(option.__doc__ for option in make.options().values())


@pytest.mark.parametrize("make", MODELS)
def test_derived_defaults(make):
    builder = make.from_kwargs(n_heads=3, value_dimensions=5)
    assert builder.model_dimensions == 15
    builder.model_dimensions = 20
    assert builder.model_dimensions == 20
    if make in DECODERS:
        assert builder.cross_n_heads == 3
        assert builder.cross_value_dimensions == 5
        assert builder.cross_model_dimensions == 15  # does not follow model_dimensions
        builder.cross_n_heads, builder.cross_value_dimensions = 2, 4
        assert builder.cross_model_dimensions == 8
    builder.model_dimensions = None
    assert builder.model_dimensions == 15
    builder.feed_forward_dimensions = None  # the layer's default, not the builder's
    builder.n_layers = 1
    assert builder.get().layers[0].linear1.out_features == 60


def test_options_reach_the_encoder():
    encoder = TransformerEncoderBuilder.from_kwargs(
        **SMALL, model_dimensions=9, dropout=0.3, activation="gelu", event_dispatcher="here",
        attention_dropout=0.4, softmax_temp=0.7,
    ).get()  # fmt: skip
    layer = encoder.layers[1]
    assert len(encoder.layers) == 2
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters() if "weight" in n}
    assert shapes == {
        "attention.query_projection.weight": (12, 9),
        "attention.key_projection.weight": (12, 9),
        "attention.value_projection.weight": (10, 9),
        "attention.out_projection.weight": (9, 10),
        "linear1.weight": (7, 9),
        "linear2.weight": (9, 7),
        "norm1.weight": (9,),
        "norm2.weight": (9,),
    }
    assert layer.dropout.p == 0.3
    assert layer.activation is nn.functional.gelu
    assert layer.attention.n_heads == 2
    inner = layer.attention.inner_attention
    assert (inner.softmax_temp, inner.dropout.p) == (0.7, 0.4)
    for module in (encoder, layer, layer.attention, inner):
        assert module.event_dispatcher is EventDispatcher.get("here")
    assert isinstance(encoder.norm, nn.LayerNorm)
    assert encoder.norm.normalized_shape == (9,)


def test_options_reach_the_decoder():
    decoder = TransformerDecoderBuilder.from_kwargs(
        **SMALL, cross_attention_type="linear", cross_n_heads=3, cross_query_dimensions=4,
        cross_value_dimensions=8, cross_model_dimensions=11, feature_map=Favor,
        event_dispatcher=(events := EventDispatcher()),
    ).get()  # fmt: skip
    layer = decoder.layers[0]
    own, cross = layer.self_attention, layer.cross_attention
    assert own.query_projection.weight.shape == (12, 10)
    assert cross.query_projection.weight.shape == (12, 10)
    assert cross.key_projection.weight.shape == (12, 11)
    assert cross.value_projection.weight.shape == (24, 11)
    assert cross.out_projection.weight.shape == (10, 24)
    assert (own.n_heads, cross.n_heads) == (2, 3)
    assert cross.inner_attention.feature_map.omega.shape == (4, 2)
    modules = [decoder, layer, own, cross, own.inner_attention, cross.inner_attention]
    assert all(m.event_dispatcher is events for m in modules)
    x, memory = torch.randn(2, 3, 10), torch.randn(2, 4, 11)
    assert decoder(x, memory).shape == x.shape


@pytest.mark.parametrize("make", MODELS)
def test_options_of_this_library(make):
    builder = make.from_kwargs(
        **SMALL, norm_first=True, norm_type="rmsnorm", projection_bias=False, rotary=True
    )
    model = builder.get()
    layer = model.layers[0]
    assert layer.norm_first
    assert isinstance(model.norm, nn.RMSNorm)
    assert isinstance(layer.norm2, nn.RMSNorm)
    assert not [n for n, _ in model.named_parameters() if n.endswith("projection.bias")]
    attention = layer.attention if make in ENCODERS else layer.self_attention
    assert attention.rotary.query_dimensions == 6
    if make in DECODERS:
        assert layer.cross_attention.rotary is None
    builder.final_normalization = False
    assert builder.get().norm is None


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("activation", "tanh", "'relu' or 'gelu', got 'tanh'"),
        ("norm_type", "batchnorm", "'layernorm' or 'rmsnorm', got 'batchnorm'"),
        ("dropout", 1.5, "from 0 to 1, got 1.5"),
        ("n_heads", -1, "whole number, got -1"),
        ("n_heads", 2.5, "whole number, got 2.5"),
        ("n_layers", "four", "Invalid value for parameter 'n_layers'"),
        ("softmax_temp", "hot", "Invalid value 'hot' for parameter 'softmax_temp'"),
        ("feature_map", 3, "Invalid value 3 for parameter 'feature_map': 3 cannot be called"),
        ("event_dispatcher", 3, "for parameter 'event_dispatcher'"),
    ],
)
@pytest.mark.parametrize("make", MODELS)
def test_invalid_values(make, option, value, message):
    for strict in (True, False):  # invalid values are never skipped
        with pytest.raises(ValueError, match=message):
            make.from_kwargs(strict=strict, **{option: value})
    with pytest.raises(ValueError, match=message):
        setattr(make(), option, value)


def test_no_layers_are_no_layers():
    encoder = TransformerEncoderBuilder.from_kwargs(**{**SMALL, "n_layers": 0}).get()
    assert len(encoder.layers) == 0


@pytest.mark.parametrize("make", [*ATTENTION, *MODELS])
def test_unknown_options(make):
    with pytest.raises(ValueError, match=r"no parameter 'sofmax_temp'.*mean 'softmax_temp'\?"):
        make.from_kwargs(sofmax_temp=1.0)
    with pytest.raises(ValueError, match="no parameter 'strict'"):
        make.from_dictionary({"strict": False})
    with pytest.raises(AttributeError, match="no option 'zzz'; its options are "):
        make().zzz = 1
    assert make.from_kwargs(zzz=1, softmax_temp=0.5, strict=False) is not None
    assert make.from_namespace(argparse.Namespace(zzz=1, softmax_temp=0.5)) is not None
    with pytest.raises(ValueError, match="no parameter 'zzz'"):
        make.from_namespace(argparse.Namespace(zzz=1), strict=True)


@pytest.mark.parametrize("make", MODELS)
def test_from_namespace(make):
    args = argparse.Namespace(
        n_layers=2, n_heads=None, query_dimensions=6, activation=None, softmax_temp=None, lr=1.0
    )
    builder = make.from_namespace(args)
    assert (builder.n_layers, builder.n_heads, builder.activation) == (2, 4, "relu")
    types = [name for name in make.options() if name.endswith("attention_type")]
    setattr(args, types[0], None)
    assert getattr(make.from_namespace(args, strict=False), types[0]) == "full"


@pytest.mark.parametrize("make", MODELS)
def test_attention_builders_cannot_be_replaced_nor_methods(make):
    names = ["attention"] if make in ENCODERS else ["self_attention", "cross_attention"]
    for name in [*names, "get"]:
        with pytest.raises(AttributeError):
            setattr(make(), name, AttentionBuilder())
    assert callable(make().get)
    with pytest.raises(ValueError, match="no parameter"):
        make.from_kwargs(**{names[0]: AttentionBuilder()})


def test_parameters_of_attentions_can_be_set_in_two_places():
    builder = TransformerDecoderBuilder.from_kwargs(softmax_temp=0.5, **SMALL)
    assert builder.self_attention.softmax_temp == builder.cross_attention.softmax_temp == 0.5
    with pytest.raises(AttributeError):
        builder.softmax_temp  # noqa: B018
    builder.cross_attention.softmax_temp = 0.25
    layer = builder.get().layers[0]
    assert layer.self_attention.inner_attention.softmax_temp == 0.5
    assert layer.cross_attention.inner_attention.softmax_temp == 0.25


@pytest.mark.parametrize("make", MODELS)
def test_linear_attention_needs_query_dimensions(make):
    names = [name for name in make.options() if name.endswith("attention_type")]
    with pytest.raises(ValueError, match=r"'query_dimensions'.*pass query_dimensions=\.\.\."):
        make.from_kwargs(**{names[-1]: "linear"}).get()


@pytest.mark.parametrize("name", ["local", "reformer", "aft-simple", "improved-clustered"])
@pytest.mark.parametrize("make", MODELS)
def test_attentions_that_come_later(make, name):
    option = [n for n in make.options() if n.endswith("attention_type")][-1]
    with pytest.raises(ValueError, match=f"{option}='{name}' is not .* not in this version; use"):
        make.from_kwargs(**{option: name})
    with pytest.raises(ValueError, match="not in this version"):
        AttentionBuilder().get(f"conditional-full:{name}")
    with pytest.raises(ValueError, match=r"'linaer'; did you mean 'linear'\?"):
        make.from_kwargs(**{option: "linaer"})
    with pytest.raises(ValueError, match="is not an available attention type"):
        make.from_kwargs(**{option: 3})
