"""Every option of the transformer builders: its default, its values, its purpose, as one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..blocks import NORMS


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    def convert(value: Any) -> str | None:
        if value is not None and value not in choices:
            raise ValueError(f"expected {' or '.join(map(repr, choices))}, got {value!r}")
        return value

    return convert


def _count(value: Any) -> int | None:
    """A whole number; None leaves the default in place."""
    if value is not None and (int(value) != value or value < 0):
        raise ValueError(f"expected a whole number, got {value!r}")
    return None if value is None else int(value)


def _size(value: Any) -> int | None:
    """A whole number of at least 1; 0 and None leave the default in place."""
    return _count(value) or None


def _share(value: Any) -> float | None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"expected a number from 0 to 1, got {value!r}")
    return None if value is None else float(value)


class Option:
    """One option of a builder, as an attribute of its class.

    Args:
        default: its value when unset, or a function of the builder that derives it.
        convert: turns what is assigned into what is kept, or raises ValueError.
        doc: one line on what it is.
    """

    def __init__(self, default: Any, convert: Callable[[Any], Any], doc: str) -> None:
        self.default, self.convert, self.__doc__ = default, convert, doc
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, builder: Any, owner: type) -> Any:
        if builder is None:
            return self
        value = builder._values.get(self.name)
        if value is not None:
            return value
        return self.default(builder) if callable(self.default) else self.default

    def __set__(self, builder: Any, value: Any) -> None:
        try:
            builder._values[self.name] = self.convert(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Invalid value for parameter {self.name!r}: {error}") from None


class CommonOptions:
    """Options of encoders and of decoders."""

    n_layers = Option(4, _count, "number of layers")
    n_heads = Option(4, _size, "number of heads H")
    query_dimensions = Option(64, _size, "dimensions E of a query or key in one head")
    value_dimensions = Option(64, _size, "dimensions M of a value in one head")
    model_dimensions = Option(
        lambda b: b.value_dimensions * b.n_heads,
        _size,
        "dimensions of the tokens, default value_dimensions * n_heads",
    )
    feed_forward_dimensions = Option(
        lambda b: None if "feed_forward_dimensions" in b._values else 1024,
        _size,
        "dimensions inside the feed-forward network, default 1024; "
        "None is four times model_dimensions",
    )
    dropout = Option(0.1, _share, "share of activations that training drops")
    activation = Option("relu", _one_of("relu", "gelu"), "of the feed-forward network")
    final_normalization = Option(True, bool, "normalise what the last layer returns")
    event_dispatcher = Option("", lambda value: value, "an EventDispatcher or its name")
    norm_first = Option(False, bool, "normalise the inputs of sublayers, not their outputs")
    norm_type = Option("layernorm", _one_of(*NORMS), "kind of normalisation")
    projection_bias = Option(True, bool, "biases in the projections around the attentions")
    rotary = Option(False, bool, "turn queries and keys of self attention by their positions")


class CrossOptions:
    """Options of the attention from a decoder to its memory."""

    cross_n_heads = Option(lambda b: b.n_heads, _size, "number of heads, default n_heads")
    cross_query_dimensions = Option(
        lambda b: b.query_dimensions, _size, "query dimensions, default query_dimensions"
    )
    cross_value_dimensions = Option(
        lambda b: b.value_dimensions, _size, "value dimensions, default value_dimensions"
    )
    cross_model_dimensions = Option(
        lambda b: b.cross_n_heads * b.cross_value_dimensions,
        _size,
        "dimensions of the memory, default cross_n_heads * cross_value_dimensions",
    )


class AttentionType(Option):
    """The option that names an attention, checked against the builder that will make it."""

    def __init__(self, builder: str, doc: str) -> None:
        super().__init__("full", str, doc)
        self._builder = builder

    def __set__(self, builder: Any, value: Any) -> None:
        attention = getattr(builder, self._builder)
        if value is not None and not attention.validate_attention_type(str(value)):
            raise ValueError(
                f"{self.name}={value!r} is not an available attention type: "
                f"{attention.explain(str(value))}"
            )
        builder._values[self.name] = value
