"""What the builders of encoders and of decoders share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..blocks import NORMS
from ..rotary import RotaryEmbedding
from .attention_builders import BaseAttentionBuilder
from .base import BaseBuilder, show, unknown_option
from .options import CommonOptions, Option


class BaseTransformerBuilder(BaseBuilder, CommonOptions):
    """A builder whose options are those of :mod:`.options` and of its attention builders."""

    _values: dict[str, Any]
    _attention_builders: dict[str, BaseAttentionBuilder]

    def __init__(self) -> None:
        self._values = {}
        self._attention_builders = {}

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The options of this builder itself, by name."""
        names = [name for base in reversed(cls.__mro__) for name in vars(base)]
        found = {name: getattr(cls, name, None) for name in names}
        return {name: value for name, value in found.items() if isinstance(value, Option)}

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            return super().__setattr__(name, value)
        own = hasattr(type(self), name) and not callable(getattr(type(self), name))
        builders = self._attention_builders.values()
        takers = [b for b in builders if b._registry.contains_parameter(name)]
        if not own and not takers:
            known = {name for b in builders for name in b._registry.parameters}
            raise unknown_option(self, name, known | set(self.options()))
        if own:
            super().__setattr__(name, value)
            if self._values.get(name, value) is None:
                return  # the default stays
        for builder in takers:
            setattr(builder, name, value)

    def __repr__(self) -> str:
        options = dict(self._values)
        for builder in self._attention_builders.values():
            own = self.options()
            options.update((n, v) for n, v in builder._parameters.items() if n not in own)
        return show(self, options)

    def _layer_options(self) -> dict[str, Any]:
        """Options of layers beyond those of the older library; empty unless they are asked for,
        so that layer classes which do not know them keep working."""
        names = ("norm_first", "norm_type")
        return {
            n: getattr(self, n) for n in names if getattr(self, n) != self.options()[n].default
        }

    def _projection_options(self, rotary_dimensions: int | None) -> dict[str, Any]:
        extra: dict[str, Any] = {} if self.projection_bias else {"bias": False}
        if self.rotary and rotary_dimensions:
            extra["rotary"] = RotaryEmbedding(rotary_dimensions)
        return extra

    def _self_attention_layer(self, layer_class: Any, attention: nn.Module) -> nn.Module:
        return layer_class(
            attention,
            self.model_dimensions,
            self.n_heads,
            d_keys=self.query_dimensions,
            d_values=self.value_dimensions,
            event_dispatcher=self.event_dispatcher,
            **self._projection_options(self.query_dimensions),
        )

    def _stack(self, stack_class: Any, layer_class: Any, attentions: Callable[[], Any]) -> Any:
        """A model of layers that hold, each, what a call of ``attentions`` returns."""
        layers = [
            layer_class(
                *attentions(),
                self.model_dimensions,
                self.feed_forward_dimensions,
                self.dropout,
                self.activation,
                event_dispatcher=self.event_dispatcher,
                **self._layer_options(),
            )
            for _ in range(self.n_layers)
        ]
        norm = NORMS[self.norm_type](self.model_dimensions) if self.final_normalization else None
        return stack_class(layers, norm, event_dispatcher=self.event_dispatcher)
