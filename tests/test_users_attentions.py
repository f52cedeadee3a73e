"""Attentions and builders of users."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from fast_transformers.attention import (
    FullAttention,
)
from fast_transformers.attention_registry import (
    AttentionRegistry,
    Bool,
    Float,
    Optional,
    Registry,
)
from fast_transformers.builders import (
    AttentionBuilder,
    RecurrentEncoderBuilder,
    TransformerEncoderBuilder,
)
from fast_transformers.builders.attention_builders import BaseAttentionBuilder

SMALL = {
    "n_layers": 2, "n_heads": 2, "query_dimensions": 6, "value_dimensions": 5,
    "feed_forward_dimensions": 7,
}  # fmt: skip


class Mine(nn.Module):
    def __init__(self, gain, event_dispatcher="", flag=False):
        super().__init__()
        self.gain, self.flag = gain, flag

    def forward(self, queries, keys, values, attn_mask, query_lengths, key_lengths):
        return self.gain * values


class Wrapper(nn.Module):
    def __init__(self, one, other, gain):
        super().__init__()
        self.one, self.other = one, other


@pytest.fixture
def registry(monkeypatch):
    for name in ("_attentions", "_reserved"):
        monkeypatch.setattr(AttentionRegistry, name, dict(getattr(AttentionRegistry, name)))
    return AttentionRegistry


def test_an_attention_of_a_user(registry):
    registry.register("mine", Mine, [("gain", Float), ("flag", Optional(Bool, False))])
    registry.register("wrapper", Wrapper, [("gain", Float)])
    builder = TransformerEncoderBuilder.from_kwargs(
        attention_type="mine", gain="2", flag="True", **SMALL
    )
    inner = builder.get().layers[0].attention.inner_attention
    assert (inner.gain, inner.flag) == (2.0, True)
    assert builder.attention.gain == 2.0
    wrapper = builder.attention.get("wrapper:mine,full")
    assert isinstance(wrapper, Wrapper)
    assert isinstance(wrapper.one, Mine)
    assert isinstance(wrapper.other, FullAttention)
    builder.attention_type = "wrapper:mine,full"
    builder.get()
    with pytest.raises(ValueError, match=r"parameter 'gain'.*'mine' needs it"):
        TransformerEncoderBuilder.from_kwargs(attention_type="mine", **SMALL).get()
    with pytest.raises(ValueError, match="no parameter 'gain'"):
        RecurrentEncoderBuilder.from_kwargs(gain=2)
    copied = copy.deepcopy(builder)
    registry.register("later", Mine, [("gain", Float)])
    copied.attention_type = "later"


def test_clashes_of_names(registry):
    with pytest.raises(ValueError, match="'full' is already registered"):
        registry.register("full", Mine, [])
    with pytest.raises(ValueError, match=r"'attention_dropout'.* must have the spec"):
        registry.register("mine", Mine, [("attention_dropout", Float)])
    assert "mine" not in registry
    registry.register("mine", Mine, [("attention_dropout", Optional(Float, 0.1))])
    registry.register("local", Mine, [])  # a name that is reserved for later
    assert AttentionBuilder().validate_attention_type("local")


def test_a_parameter_with_the_name_of_an_option(registry):
    """Both get it, each in its own form."""
    registry.register("mine", Mine, [("gain", Float), ("n_heads", Optional(Float))])
    builder = TransformerEncoderBuilder.from_kwargs(n_heads=3)
    assert builder.n_heads == 3
    assert builder.attention.n_heads == 3.0


def test_a_builder_of_a_user():
    own = Registry()
    own.register("mine", Mine, [("gain", Float), ("event_dispatcher", Optional(Float, 0.0))])

    class OwnAttention(BaseAttentionBuilder):
        def __init__(self):
            super().__init__(own)

    class OwnBuilder(TransformerEncoderBuilder):
        extra = 3

        def _get_attention_builder(self):
            return OwnAttention()

        @property
        def doubled(self):
            return self._doubled

        @doubled.setter
        def doubled(self, value):
            self._doubled = 2 * value

    builder = OwnBuilder.from_kwargs(gain=2, doubled=4, extra=5)
    assert (builder.doubled, builder.extra, builder.attention.gain) == (8, 5, 2.0)
    assert copy.deepcopy(builder).doubled == 8
    with pytest.raises(ValueError, match=r"'full' is not an available attention.*available: mine"):
        builder.attention_type = "full"
    builder.attention_type = "mine"
