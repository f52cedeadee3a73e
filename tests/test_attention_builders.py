"""Builders of attentions: what they make of names and parameters."""

from __future__ import annotations

import pytest

from fast_transformers.attention import (
    CausalLinearAttention,
    ConditionalFullAttention,
    FullAttention,
    LinearAttention,
)
from fast_transformers.attention_registry import (
    AttentionRegistry,
    Float,
    Int,
    Optional,
    RecurrentAttentionRegistry,
    RecurrentCrossAttentionRegistry,
)
from fast_transformers.builders import (
    AttentionBuilder,
    RecurrentAttentionBuilder,
    RecurrentCrossAttentionBuilder,
)
from fast_transformers.recurrent.attention import (
    RecurrentConditionalFullAttention,
    RecurrentCrossConditionalFullAttention,
    RecurrentCrossFullAttention,
    RecurrentCrossLinearAttention,
    RecurrentFullAttention,
    RecurrentLinearAttention,
)

ATTENTION = [AttentionBuilder, RecurrentAttentionBuilder, RecurrentCrossAttentionBuilder]


@pytest.mark.parametrize("make", ATTENTION)
def test_reading_attention_builders(make):
    builder = make()
    with pytest.raises(AttributeError):
        builder.softmax_temp  # noqa: B018
    builder.softmax_temp = "0.5"
    assert builder.softmax_temp == 0.5
    builder.softmax_temp = None
    assert builder.softmax_temp is None
    builder.attention_dropout = None
    assert builder.attention_dropout == 0.1


@pytest.mark.parametrize(
    ("make", "registry", "expected"),
    [
        (
            AttentionBuilder,
            AttentionRegistry,
            {
                "full": FullAttention, "linear": LinearAttention,
                "causal-linear": CausalLinearAttention,
                "conditional-full": ConditionalFullAttention,
            },
        ),
        (
            RecurrentAttentionBuilder,
            RecurrentAttentionRegistry,
            {
                "full": RecurrentFullAttention, "linear": RecurrentLinearAttention,
                "causal-linear": RecurrentLinearAttention,
                "conditional-full": RecurrentConditionalFullAttention,
            },
        ),
        (
            RecurrentCrossAttentionBuilder,
            RecurrentCrossAttentionRegistry,
            {
                "full": RecurrentCrossFullAttention, "linear": RecurrentCrossLinearAttention,
                "conditional-full": RecurrentCrossConditionalFullAttention,
            },
        ),
    ],
)  # fmt: skip
def test_attentions(make, registry, expected):
    builder = make.from_kwargs(query_dimensions=8, length_limit=3)
    assert builder.available_attentions == registry.keys == list(expected)
    for name, cls in expected.items():
        assert registry[name][0] is cls
        if name != "conditional-full":
            assert type(builder.get(name)) is cls
    built = builder.get("conditional-full:conditional-full:linear")
    assert type(built) is type(built.other_attention) is expected["conditional-full"]
    assert type(built.other_attention.other_attention) is expected["linear"]
    assert built.length_limit == built.other_attention.length_limit == 3
    with pytest.raises(TypeError, match="other_attention"):
        builder.get("conditional-full")
    for name in ("full:linear", "conditional-full:full,linear"):
        with pytest.raises(TypeError):
            builder.get(name)
    with pytest.raises(ValueError, match="Invalid attention_type argument 'full,linear'"):
        builder.get("full,linear")
    for name in ("Full", " full", "", "full:", "conditional-full:nope"):
        assert not builder.validate_attention_type(name)
        with pytest.raises(ValueError, match="Unknown attention type"):
            builder.get(name)
    for name in ("full,linear", "conditional-full", "conditional-full:linear"):
        assert builder.validate_attention_type(name)
    with pytest.raises(ValueError, match=r"None for parameter 'query_dimensions'.*'linear' needs"):
        make().get("linear")


def test_parameters_and_their_specs():
    """Equal to what users import, as `register` with a shared parameter needs it."""
    expected = {
        "softmax_temp": Optional(Float), "attention_dropout": Optional(Float, 0.1),
        "query_dimensions": Int, "length_limit": Optional(Int, 512),
    }  # fmt: skip
    for registry in (
        AttentionRegistry, RecurrentAttentionRegistry, RecurrentCrossAttentionRegistry
    ):  # fmt: skip
        assert {n: registry.parameters[n] for n in expected} == expected
        assert set(registry.parameters) == {*expected, "feature_map", "event_dispatcher"}
        assert "eps" not in registry.parameters
