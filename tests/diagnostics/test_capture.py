"""What a running model's attentions are given, in models of this library and of transformers."""

from __future__ import annotations

import copy

import pytest
import torch

from fast_transformers.builders import TransformerDecoderBuilder, TransformerEncoderBuilder
from fast_transformers.diagnostics import (
    attention_map,
    attention_report,
    capture,
    kernel_report,
)
from fast_transformers.diagnostics.huggingface import attending, softmax_attention
from fast_transformers.diagnostics.weights import softmax_weights, uniform_weights
from fast_transformers.feature_maps import Centered, DenseExponentialFeatures, Favor
from fast_transformers.masking import LengthMask, TriangularCausalMask


def encoder(**options):
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "n_heads": 2, "query_dimensions": 8, "value_dimensions": 8}
    return TransformerEncoderBuilder.from_kwargs(**sizes, **options).get()


def test_queries_keys_and_masks_of_an_encoder() -> None:
    model = encoder(attention_type="full", softmax_temp=0.2)
    x = torch.randn(2, 9, 16)
    lengths = LengthMask(torch.tensor([9, 4]))
    call = {"attn_mask": TriangularCausalMask(9), "length_mask": lengths}
    found = capture(model, x, **call)
    assert list(found.layers) == ["layers.0.attention", "layers.1.attention"]
    sample = found.layers["layers.0.attention"]
    layer = model.layers[0].attention
    torch.testing.assert_close(sample.q, layer.query_projection(x).view(2, 9, 2, 8).detach())
    torch.testing.assert_close(sample.k, layer.key_projection(x).view(2, 9, 2, 8).detach())
    keep = torch.ones(9, 9, dtype=torch.bool).tril() & lengths.bool_matrix[:, None, None]
    assert torch.equal(sample.shown(), keep)
    assert sample.temperature == 0.2
    assert model.training
    assert found.own == {}
    with pytest.raises(ValueError, match="is softmax attention; pass feature_maps"):
        found.attention()


def test_the_reports_of_a_capture_are_those_of_its_layers() -> None:
    model = encoder(attention_type="causal-linear", feature_map=Favor.factory(n_dims=16))
    x = torch.randn(1, 12, 16)
    found = capture(model, x, attn_mask=TriangularCausalMask(12))
    own = found.attention()["layers.1.attention"]
    sample = found.layers["layers.1.attention"]
    feature_map = model.layers[1].attention.inner_attention.feature_map
    mask = TriangularCausalMask(12)
    expected = attention_report({"Favor": feature_map}, *sample[:3], attn_mask=mask, draws=1)
    torch.testing.assert_close(own["Favor"], expected["Favor"])
    weights = attention_map(feature_map, *sample[:2], attn_mask=mask)
    assert weights.triu(1).abs().max() == 0
    tried = found.overall(["elu", "favor"], draws=2)
    assert [row.name for row in tried.rows] == ["exact softmax", "uniform", "elu", "favor"]
    assert tried.heads == 4
    assert tried["elu"].kl.shape == (4,)
    assert set(found.scale()) == set(found.layers)
    suggested = found.suggest(0.5, draws=1)["layers.1.attention"]
    of_layer = tried["uniform"].frobenius[2:]
    assert suggested.uniform == pytest.approx(float(of_layer.mean()))  # the median of two heads
    on_itself = found.suggest(0.5, calibration=found, draws=1)["layers.1.attention"]
    assert str(on_itself) == str(suggested)  # of a single sequence
    kernels = found.kernel("favor", pairs=10, draws=3)["layers.1.attention"]
    assert kernels == kernel_report("favor", *sample[:2], pairs=10, draws=3)
    one = found.only("layers.1.attention")
    assert list(one.layers) == list(one.own) == ["layers.1.attention"]


def test_maps_of_a_model_calibrated_on_what_they_are_given() -> None:
    aligned = DenseExponentialFeatures.factory(n_dims=16, heads=2)
    options = {"attention_type": "causal-linear", "feature_map": Centered.factory(aligned, 2)}
    model, x = encoder(**options).eval(), torch.randn(3, 12, 16)
    mask = TriangularCausalMask(12)
    before, found = model(x, mask), capture(model, x, attn_mask=mask)
    names = ["layers.0.attention", "layers.1.attention"]
    assert found.calibrate() == names
    for layer, name in zip(model.layers, names, strict=True):
        feature_map, sample = layer.attention.inner_attention.feature_map, found.layers[name]
        torch.testing.assert_close(feature_map.of_keys, sample.k.mean((0, 1)))
        twin = options["feature_map"](8)
        twin.calibrate(sample.q, sample.k)
        assert torch.equal(twin.inner.log_rho, feature_map.inner.log_rho)
    assert not torch.equal(model(x, mask), before)
    plain = encoder(attention_type="causal-linear")
    assert capture(plain, x, attn_mask=mask).calibrate() == []


def test_nothing_stays_behind() -> None:
    model = encoder(attention_type="linear").eval()
    x = torch.randn(1, 5, 16)
    before = model(x)
    dispatcher = model.layers[0].attention.event_dispatcher
    listeners = len(dispatcher._listeners)
    capture(model, x)
    assert torch.equal(before, model(x))
    assert len(dispatcher._listeners) == listeners
    assert not model.layers[0].attention._forward_pre_hooks
    assert not model.training


def test_cross_attention() -> None:
    model = TransformerDecoderBuilder.from_kwargs(
        n_layers=1, n_heads=2, query_dimensions=8, value_dimensions=8,
        self_attention_type="causal-linear", cross_attention_type="full",
    ).get()  # fmt: skip
    found = capture(
        model, torch.randn(1, 5, 16), memory=torch.randn(1, 7, 16), x_mask=TriangularCausalMask(5)
    )
    shapes = {name: (s.q.shape[1], s.k.shape[1]) for name, s in found.layers.items()}
    assert shapes == {"layers.0.self_attention": (5, 5), "layers.0.cross_attention": (5, 7)}
    assert list(found.own) == ["layers.0.self_attention"]


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be made of this library's AttentionLayer"):
        capture(torch.nn.Linear(3, 3), torch.zeros(1, 3))


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, initializer_range=0.5,
    )  # fmt: skip
    return transformers.BertModel(config)


@pytest.fixture(scope="module")
def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2Model(
        transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.5
        )
    )


TOKENS = {
    "input_ids": torch.arange(14).view(2, 7),
    "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_models_of_transformers(name, request) -> None:
    model = request.getfixturevalue(name).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**TOKENS, output_attentions=True)
    found = capture(model, TOKENS)
    assert model.config._attn_implementation == "eager"
    assert len(found.layers) == 2
    for sample, weights in zip(found.layers.values(), expected.attentions, strict=True):
        real = TOKENS["attention_mask"].bool()[:, None, :, None]  # what padding sees is nobody's
        difference = (softmax_weights(sample) - weights).masked_fill(~real, 0)
        assert difference.abs().max() < 1e-5
    with torch.no_grad():
        again = model(**TOKENS).last_hidden_state
    assert torch.equal(again, expected.last_hidden_state)
    assert found.overall("elu").heads == 8


def test_maps_inside_transformers_are_calibrated(gpt2) -> None:
    """On what softmax attention is given, at the temperature of the model."""
    hf = pytest.importorskip("fast_transformers.hf")
    model = copy.deepcopy(gpt2).eval()
    tokens = torch.arange(40).view(4, 10)
    exact = capture(model, tokens)
    model.set_attn_implementation(hf.attention_implementation("centered:inner=taylor"))
    found = capture(model, tokens)
    assert found.calibrate() == list(exact.layers) == list(found.layers)
    for name, feature_map in found.own.items():
        torch.testing.assert_close(found.layers[name].q, exact.layers[name].q)
        center = exact.layers[name].k.mean((0, 1, 2))
        torch.testing.assert_close(feature_map.of_keys, center)
        assert center.abs().max() > 0.01


def test_the_temperature_of_a_transformer_is_that_of_the_maps(gpt2) -> None:
    model = copy.deepcopy(gpt2).eval()
    before = capture(model, TOKENS["input_ids"]).overall("taylor")["taylor"].kl
    for block in model.h:  # larger queries and a smaller temperature are the same attention
        block.attn.scaling /= 4
        queries = block.attn.c_attn.weight, block.attn.c_attn.bias
        for tensor in queries:
            tensor.data[..., :32] *= 4
    after = capture(model, TOKENS["input_ids"]).overall("taylor")["taylor"].kl
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def uniform_attention(name, sample):
    values = sample.v.transpose(1, 2)
    return (uniform_weights(sample).float() @ values).transpose(1, 2)


def test_attentions_of_a_transformer_replaced(bert) -> None:
    """By softmax attention nothing changes; by uniform attention something does."""
    model = bert.eval()
    with torch.no_grad():
        expected = model(**TOKENS).last_hidden_state
        with attending(model, softmax_attention):
            same = model(**TOKENS).last_hidden_state
        with attending(model, uniform_attention):
            other = model(**TOKENS).last_hidden_state
    torch.testing.assert_close(same[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same[1, :4], expected[1, :4], rtol=1e-4, atol=1e-5)
    assert (other[0] - expected[0]).abs().max() > 1e-3
