"""Recurrent models equal their whole-sequence twins, and hand on their states."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from fast_transformers.builders import (
    RecurrentDecoderBuilder,
    RecurrentEncoderBuilder,
    TransformerDecoderBuilder,
    TransformerEncoderBuilder,
)
from fast_transformers.masking import LengthMask, TriangularCausalMask
from fast_transformers.utils import make_mirror
from tests.maps import ALL

N, L, S = 2, 6, 7
LIMIT = 4
SELF = ["causal-linear", "full", "conditional-full:causal-linear"]
CROSS = ["linear", "full", "conditional-full:linear"]
SIZES = {
    "n_layers": 2, "n_heads": 2, "query_dimensions": 8, "value_dimensions": 6,
    "feed_forward_dimensions": 16, "dropout": 0.0, "attention_dropout": 0.0,
    "length_limit": LIMIT,
}  # fmt: skip


def twins(batch_builder, recurrent_builder, training, **options):
    """A batch model and its recurrent mirror, in float64.

    Where conditional attention crosses its limit the batch form sees every token through the
    other attention, the recurrent one sees the early ones through softmax: one layer can agree.
    """
    depth = 1 if any("conditional" in str(value) for value in options.values()) else 2
    models = [
        builder.from_kwargs(**{**SIZES, "n_layers": depth}, **options)
        .get()
        .double()
        .train(training)
        for builder in (batch_builder, recurrent_builder)
    ]
    make_mirror(*models)
    return models


def step_through(model, x, *args, state=None):
    outputs = []
    for i in range(x.shape[1]):
        y, state = model(x[:, i], *args, state=state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


@pytest.fixture
def x():
    return torch.randn(N, L, 12, dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", SELF)
def test_encoder(kind, name, training, x):
    batch, recurrent = twins(
        TransformerEncoderBuilder, RecurrentEncoderBuilder, training,
        attention_type=kind, feature_map=ALL[name],
    )  # fmt: skip
    for _ in range(2):  # in training the batch model redraws its maps, for the mirror too
        whole = [batch(x[:, :t], TriangularCausalMask(t)) for t in (L, LIMIT)]
        if name in ("elu", "asymmetric") or not training or kind == "full":
            stepped, state = step_through(recurrent, x)
            assert_close(stepped[:, :LIMIT], whole[1])
            assert_close(stepped[:, LIMIT:], whole[0][:, LIMIT:])
        else:  # compare with the draw of the batch forward that came last
            whole[0] = batch(x, TriangularCausalMask(L))
            stepped, state = step_through(recurrent, x)
            first = LIMIT if kind.startswith("conditional") else 0
            assert_close(stepped[:, first:], whole[0][:, first:])
        assert len(state) == len(batch.layers)
        x = -x


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("cross", CROSS)
def test_decoder(cross, name, training, x):
    batch, recurrent = twins(
        TransformerDecoderBuilder, RecurrentDecoderBuilder, training,
        self_attention_type="causal-linear", cross_attention_type=cross, feature_map=ALL[name],
        cross_n_heads=3, cross_query_dimensions=10, cross_value_dimensions=4,
        cross_model_dimensions=9,
    )  # fmt: skip
    for size in (LIMIT, S):
        memory = torch.randn(N, size, 9, dtype=torch.float64)
        lengths = LengthMask(torch.tensor([size, 2]), max_len=size)
        whole = batch(x, memory, TriangularCausalMask(L), memory_length_mask=lengths)
        stepped, _ = step_through(recurrent, x, memory, lengths)
        seen = slice(LIMIT, L) if cross.startswith("conditional") else slice(L)
        assert_close(stepped[:, seen], whole[:, seen])
        if cross.startswith("conditional") and not training:
            short = batch(
                x[:, :LIMIT], memory, TriangularCausalMask(LIMIT), memory_length_mask=lengths
            )
            assert_close(stepped[:, :LIMIT], short)


@pytest.mark.parametrize("kind", SELF)
def test_layers_below_the_limit(kind, x):
    options = {**SIZES, "length_limit": L, "attention_type": kind}
    batch = TransformerEncoderBuilder.from_kwargs(**options).get().double()
    recurrent = RecurrentEncoderBuilder.from_kwargs(**options).get().double()
    recurrent.load_state_dict(batch.state_dict())
    assert_close(step_through(recurrent, x)[0], batch(x, TriangularCausalMask(L)))


@pytest.mark.parametrize("kind", SELF)
def test_modern_options(kind, x):
    batch, recurrent = twins(
        TransformerEncoderBuilder, RecurrentEncoderBuilder, True, attention_type=kind,
        norm_first=True, norm_type="rmsnorm", projection_bias=False, rotary=True,
    )  # fmt: skip
    stepped, _ = step_through(recurrent, x)
    assert_close(stepped[:, LIMIT:], batch(x, TriangularCausalMask(L))[:, LIMIT:])


@pytest.mark.parametrize("kind", SELF)
def test_state_of_an_encoder(kind, x):
    encoder = RecurrentEncoderBuilder.from_kwargs(attention_type=kind, **SIZES).get().double()
    _, state = encoder(x[:, 0])
    assert isinstance(state, list)
    assert len(state) == 2
    kept = list(state)
    y, after = encoder(x[:, 1], state)
    assert after is not state
    assert all(a is b for a, b in zip(state, kept, strict=True))
    assert torch.equal(encoder(x[:, 1], tuple(state))[0], y)
    assert torch.equal(encoder(x[:, 1], state)[0], y)


def test_state_of_a_decoder(x):
    decoder = RecurrentDecoderBuilder.from_kwargs(**SIZES).get().double().requires_grad_(False)
    memory = torch.randn(N, S, 12, dtype=torch.float64)
    _, state = decoder(x[:, 0], memory)
    assert [len(layer) for layer in state] == [2, 2]
    kept = copy.deepcopy(state)
    y, after = decoder(x[:, 1], torch.full_like(memory, torch.nan), None, state)
    assert after is not state
    assert_close(state, kept)
    old = [[list(own), list(cross)] for own, cross in state]
    assert torch.equal(decoder(x[:, 1], memory, state=old)[0], y)
