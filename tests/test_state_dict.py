"""Checkpoints: names, order and shapes of what they hold, and older ones."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.testing import assert_close

from fast_transformers.builders import (
    RecurrentDecoderBuilder,
    RecurrentEncoderBuilder,
    TransformerDecoderBuilder,
    TransformerEncoderBuilder,
)
from fast_transformers.events import Event, EventDispatcher
from fast_transformers.feature_maps import (
    Favor,
    GeneralizedRandomFeatures,
    RandomFourierFeatures,
    SmoothedRandomFourierFeatures,
)
from fast_transformers.masking import TriangularCausalMask

SIZES = {
    "n_layers": 2, "n_heads": 2, "query_dimensions": 8, "value_dimensions": 8,
    "feed_forward_dimensions": 32,
}  # fmt: skip
ENCODERS = [TransformerEncoderBuilder, RecurrentEncoderBuilder]
DECODERS = [TransformerDecoderBuilder, RecurrentDecoderBuilder]
RANDOM = {
    RandomFourierFeatures: (8, 4),
    Favor: (8, 4),
    SmoothedRandomFourierFeatures: (8, 3),
    GeneralizedRandomFeatures: (8, 8),
}
OMEGA = "inner_attention.feature_map.omega"


def shapes(model):
    return [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]


def attention(prefix, queries=16, keys=16, d_keys=16, d_values=16):
    sizes = {
        "query": (d_keys, queries), "key": (d_keys, keys), "value": (d_values, keys),
        "out": (queries, d_values),
    }  # fmt: skip
    for name, (rows, columns) in sizes.items():
        yield f"{prefix}.{name}_projection.weight", (rows, columns)
        yield f"{prefix}.{name}_projection.bias", (rows,)


def rest(prefix, norms):
    yield f"{prefix}.linear1.weight", (32, 16)
    yield f"{prefix}.linear1.bias", (32,)
    yield f"{prefix}.linear2.weight", (16, 32)
    yield f"{prefix}.linear2.bias", (16,)
    for i in range(1, norms + 1):
        yield from norm(f"{prefix}.norm{i}")


def norm(prefix):
    yield f"{prefix}.weight", (16,)
    yield f"{prefix}.bias", (16,)


def encoder_keys(*extra):
    """Section 15.1 of the older library's layout; ``extra`` entries come before a layer's own."""
    for i in range(2):
        yield from ((f"layers.{i}.attention.{name}", shape) for name, shape in extra)
        yield from attention(f"layers.{i}.attention")
        yield from rest(f"layers.{i}", 2)
    yield from norm("norm")


def decoder_keys(own=(), cross=(), **cross_sizes):
    for i in range(2):
        yield from ((f"layers.{i}.self_attention.{name}", shape) for name, shape in own)
        yield from attention(f"layers.{i}.self_attention")
        yield from ((f"layers.{i}.cross_attention.{name}", shape) for name, shape in cross)
        yield from attention(f"layers.{i}.cross_attention", **cross_sizes)
        yield from rest(f"layers.{i}", 3)
    yield from norm("norm")


@pytest.mark.parametrize("kind", ["linear", "full", "causal-linear", "conditional-full:linear"])
@pytest.mark.parametrize("make", ENCODERS)
def test_encoder(make, kind):
    builder = make.from_kwargs(attention_type=kind, **SIZES)
    expected = list(encoder_keys())
    assert len(expected) == 34
    assert shapes(builder.get()) == expected
    builder.final_normalization = False
    assert shapes(builder.get()) == expected[:-2]


def test_some_keys_spelled_out():
    keys = list(TransformerEncoderBuilder.from_kwargs(**SIZES).get().state_dict())
    assert keys[:8] == [
        "layers.0.attention.query_projection.weight",
        "layers.0.attention.query_projection.bias",
        "layers.0.attention.key_projection.weight",
        "layers.0.attention.key_projection.bias",
        "layers.0.attention.value_projection.weight",
        "layers.0.attention.value_projection.bias",
        "layers.0.attention.out_projection.weight",
        "layers.0.attention.out_projection.bias",
    ]
    assert keys[-4:] == [
        "layers.1.norm2.weight", "layers.1.norm2.bias", "norm.weight", "norm.bias"
    ]  # fmt: skip


@pytest.mark.parametrize("make", DECODERS)
def test_decoder(make):
    assert shapes(make.from_kwargs(**SIZES).get()) == list(decoder_keys())
    builder = make.from_kwargs(
        self_attention_type="linear", cross_attention_type="linear", feature_map=Favor,
        cross_n_heads=3, cross_query_dimensions=4, cross_value_dimensions=5,
        cross_model_dimensions=11, **SIZES,
    )  # fmt: skip
    assert shapes(builder.get()) == list(
        decoder_keys(
            [(OMEGA, (8, 4))], [(OMEGA, (4, 2))], queries=16, keys=11, d_keys=12, d_values=15
        )
    )


@pytest.mark.parametrize("feature_map", RANDOM)
@pytest.mark.parametrize("make", ENCODERS)
def test_random_maps(make, feature_map):
    builder = make.from_kwargs(attention_type="linear", feature_map=feature_map, **SIZES)
    assert shapes(builder.get()) == list(encoder_keys((OMEGA, RANDOM[feature_map])))
    assert builder.get().layers[0].get_buffer(f"attention.{OMEGA}").dtype == torch.float32
    builder.attention_type = "conditional-full:causal-linear"
    other = "inner_attention.other_attention.feature_map.omega"
    assert shapes(builder.get()) == list(encoder_keys((other, RANDOM[feature_map])))


@pytest.mark.parametrize(
    ("map_", "shape"),
    [
        (Favor.factory(n_dims=6), (8, 3)),
        (SmoothedRandomFourierFeatures.factory(n_dims=6), (8, 2)),
        (SmoothedRandomFourierFeatures.factory(n_dims=7), (8, 3)),
        (GeneralizedRandomFeatures.factory(n_dims=6), (8, 6)),
    ],
)
def test_numbers_of_features(map_, shape):
    assert map_(8).omega.shape == shape
    assert list(map_(8).state_dict()) == ["omega"]


@pytest.mark.parametrize("feature_map", [None, *RANDOM])
@pytest.mark.parametrize(("one", "other"), [ENCODERS, DECODERS], ids=["encoder", "decoder"])
def test_batch_and_recurrent_exchange_checkpoints(one, other, feature_map):
    types = {name: "linear" for name in one.options() if name.endswith("attention_type")}
    batch, recurrent = (
        make.from_kwargs(feature_map=feature_map, **types, **SIZES).get().eval()
        for make in (one, other)
    )
    assert shapes(batch) == shapes(recurrent)
    recurrent.load_state_dict(batch.state_dict())
    assert_close(recurrent.state_dict(), batch.state_dict(), rtol=0, atol=0)
    batch.load_state_dict(recurrent.state_dict())


def test_names_of_modules():
    names = {
        kind: [n for n, _ in make.from_kwargs(attention_type=kind, **SIZES).get().named_modules()]
        for kind, make in (
            ("linear", TransformerEncoderBuilder),
            ("full", RecurrentEncoderBuilder),
            ("conditional-full:linear", TransformerEncoderBuilder),
        )
    }
    inner = "layers.1.attention.inner_attention"
    assert {"", "norm", "layers.1.dropout", inner, f"{inner}.feature_map"} <= {*names["linear"]}
    assert f"{inner}.dropout" in names["full"]
    conditional = {"full_attention", "full_attention.dropout", "other_attention"}
    assert {f"{inner}.{name}" for name in conditional} <= {*names["conditional-full:linear"]}


@pytest.mark.parametrize("feature_map", RANDOM)
def test_an_older_checkpoint(feature_map):
    """It has `omega` and no counters; its `omega` is used, in evaluation and in training."""
    builder = TransformerEncoderBuilder.from_kwargs(
        attention_type="causal-linear", feature_map=feature_map, dropout=0.0, **SIZES
    )
    old = {name: torch.randn(shape) for name, shape in encoder_keys((OMEGA, RANDOM[feature_map]))}
    x, mask = torch.randn(2, 5, 16), TriangularCausalMask(5)
    outputs = []
    for training in (False, True):
        model = builder.get().train(training)
        model.load_state_dict(old)  # strictly
        outputs += [model(x, mask)]
        for i, layer in enumerate(model.layers):
            omega = layer.get_buffer(f"attention.{OMEGA}")
            assert torch.equal(omega, old[f"layers.{i}.attention.{OMEGA}"])
    assert torch.equal(*outputs)
    model(x, mask)  # a second one in training draws again
    assert not torch.equal(omega, old[f"layers.1.attention.{OMEGA}"])
    recurrent = RecurrentEncoderBuilder.from_kwargs(
        attention_type="linear", feature_map=feature_map, **SIZES
    ).get()
    recurrent.load_state_dict(old)
    recurrent(x[:, 0])
    assert torch.equal(recurrent.state_dict()[f"layers.0.attention.{OMEGA}"],
                       old[f"layers.0.attention.{OMEGA}"])  # fmt: skip


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved]
)
@pytest.mark.parametrize("feature_map", [None, Favor.factory(n_dims=6)])
@pytest.mark.parametrize("make", [*ENCODERS, *DECODERS])
def test_whole_models_can_be_copied_and_saved(make, feature_map, duplicate):
    types = {name: "linear" for name in make.options() if name.endswith("attention_type")}
    model = make.from_kwargs(
        feature_map=feature_map, rotary=True, activation="gelu", **types, **SIZES
    )
    model = model.get().eval()
    batch = make in (TransformerEncoderBuilder, TransformerDecoderBuilder)
    x = torch.randn(2, 5, 16) if batch else torch.randn(2, 16)
    inputs = (x,) if make in ENCODERS else (x, torch.randn(2, 3, 16))
    events = []
    EventDispatcher.get().listen(Event, events.append)
    copied = duplicate(model)
    one, other = model(*inputs), copied(*inputs)
    one, other = (one, other) if batch else (one[0], other[0])
    assert torch.equal(one, other)
    assert copied.event_dispatcher is model.event_dispatcher
    half = len(events) // 2
    assert [type(e) for e in events[:half]] == [type(e) for e in events[half:]]
    assert half
    assert next(copied.parameters()) is not next(model.parameters())
