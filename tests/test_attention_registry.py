from __future__ import annotations

import pytest

from fast_transformers.attention_registry import (
    AttentionRegistry,
    Bool,
    Callable,
    Choice,
    EventDispatcherInstance,
    Float,
    Int,
    Optional,
    RecurrentAttentionRegistry,
    RecurrentCrossAttentionRegistry,
    Registry,
    Spec,
)
from fast_transformers.events import EventDispatcher


class One:
    pass


class Two:
    pass


@pytest.fixture
def registry():
    registry = Registry()
    registry.register("linear", One, [("eps", Float), ("feature_map", Optional(Callable))])
    return registry


@pytest.mark.parametrize(
    ("spec", "value", "expected"),
    [
        (Int, "12", 12),
        (Int, 3.7, 3),
        (Float, "0.5", 0.5),
        (Bool, "False", False),
        (Bool, "false", False),
        (Bool, "0", False),
        (Bool, "True", True),
        (Bool, "true", True),
        (Bool, "1", True),
        (Bool, 0, False),
        (Bool, True, True),
        (Choice(["a", "b"]), "b", "b"),
        (Optional(Int), None, None),
        (Optional(Int, 5), None, 5),
        (Optional(Int, 5), "6", 6),
        (Callable, len, len),
        (EventDispatcherInstance, "key", "key"),
        (EventDispatcherInstance, EventDispatcher.get(), EventDispatcher.get()),
        (Spec(str.upper), "x", "X"),
    ],
)
def test_spec_accepts(spec, value, expected):
    assert spec.get(value) == expected
    assert type(spec.get(value)) is type(expected)
    assert spec.check(value) is True


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        (Int, "x"),
        (Int, None),
        (Float, []),
        (Bool, "maybe"),
        (Choice(["a", "b"]), "c"),
        (Optional(Int), "x"),
        (Callable, 3),
        (EventDispatcherInstance, 3),
        (Spec(str.upper), 3),
    ],
)
def test_spec_refuses(spec, value):
    assert spec.check(value) is False
    with pytest.raises((ValueError, TypeError)):
        spec.get(value)


def test_specs_compare():
    assert Choice(["a", "b"]) == Choice(("a", "b"))
    assert Choice(["a"]) != Choice(["b"])
    assert Optional(Float, 0.1) == Optional(Float, 0.1)
    assert Optional(Float, 0.1) != Optional(Float, 0.2)
    assert Optional(Float) != Optional(Int)
    assert Optional(Choice([1])) == Optional(Choice([1]))
    assert Spec(int) != Spec(int)
    assert Int == Int
    assert repr(Optional(Choice(["a"]), "a")) == "Optional(Choice(['a']), 'a')"
    assert repr(Spec(int)) == "CustomSpec"


def test_register(registry):
    registry.register("full", Two, [("eps", Float)])
    assert registry.keys == ["linear", "full"]
    assert "full" in registry
    assert "fool" not in registry
    assert registry["linear"] == (One, ["eps", "feature_map"])
    assert registry.contains_parameter("eps")
    assert not registry.contains_parameter("epsilon")
    assert registry.parameters == {"eps": Float, "feature_map": Optional(Callable)}


def test_a_failed_registration_changes_nothing(registry):
    with pytest.raises(ValueError, match="'linear' is already registered"):
        registry.register("linear", Two, [("other", Int)])
    with pytest.raises(ValueError, match=r"parameter 'eps' of 'full' must have the spec Float"):
        registry.register("full", Two, [("other", Int), ("eps", Int)])
    assert registry.keys == ["linear"]
    assert registry["linear"] == (One, ["eps", "feature_map"])
    assert not registry.contains_parameter("other")


def test_a_notebook_cell_may_run_again(registry):
    def cell():
        class Mine:
            pass

        registry.register("mine", Mine, [("eps", Float), ("own", Spec(int))])
        return Mine

    assert cell() is not cell()
    again = cell()
    assert registry["mine"] == (again, ["eps", "own"])
    registry.register("mine", again, [("eps", Float)])
    assert not registry.contains_parameter("own")
    with pytest.raises(ValueError, match="spec Float"):
        registry.register("mine", again, [("eps", Int)])


def test_validate_parameter(registry):
    assert registry.validate_parameter("eps", "0.5") == 0.5
    with pytest.raises(ValueError, match="Invalid value None for parameter 'eps'") as error:
        registry.validate_parameter("eps", None)
    assert isinstance(error.value.__cause__, TypeError)
    with pytest.raises(ValueError, match="Invalid value 1 for parameter 'nope': no attention has"):
        registry.validate_parameter("nope", 1)


def test_a_spec_that_raises_key_error_is_not_an_unknown_parameter(registry):
    registry.register("table", Two, [("entry", Spec({"a": 1}.__getitem__))])
    with pytest.raises(ValueError, match="for parameter 'entry': 'b'"):
        registry.validate_parameter("entry", "b")


def test_explain(registry):
    registry.reserve({"local": "use 'full' with a banded mask"})
    assert registry.explain("linaer") == (
        "unknown attention 'linaer'; did you mean 'linear'? available: linear"
    )
    assert registry.explain("xyz") == "unknown attention 'xyz'; available: linear"
    advice = "attention 'local' is not in this version; use 'full' with a banded mask"
    assert registry.explain("local") == advice
    assert "local" not in registry
    with pytest.raises(KeyError, match="not in this version"):
        registry["local"]
    registry.register("local", Two, [])
    assert registry["local"] == (Two, [])
    assert registry.explain("local") == "attention 'local' is available"


def test_the_three_registries_are_distinct():
    registries = [AttentionRegistry, RecurrentAttentionRegistry, RecurrentCrossAttentionRegistry]
    assert all(isinstance(r, Registry) for r in registries)
    assert len({id(r) for r in registries}) == 3
