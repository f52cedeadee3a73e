"""Builders of attentions, from the registries."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..attention_registry import (
    AttentionRegistry,
    RecurrentAttentionRegistry,
    RecurrentCrossAttentionRegistry,
    Registry,
)
from .base import BaseBuilder, show, unknown_option


class BaseAttentionBuilder(BaseBuilder):
    """Builds any attention of a registry; its options are the parameters in that registry.

    Options that the chosen attention does not have are kept and not used, so that one set of
    options can build several kinds.
    """

    _registry: Registry
    _parameters: dict[str, Any]

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._parameters = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        elif not self._registry.contains_parameter(name):
            raise unknown_option(self, name, self._registry.parameters)
        else:
            self._parameters[name] = self._registry.validate_parameter(name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._parameters:
            raise AttributeError(f"{type(self).__name__} has no value set for {name!r}")
        return self._parameters[name]

    def __repr__(self) -> str:
        return show(self, self._parameters)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the parameters and use the registry of their process."""
        return type(self), (), {"_parameters": dict(self._parameters)}

    @property
    def available_attentions(self) -> list[str]:
        """Names of the attentions that can be built."""
        return self._registry.keys

    def validate_attention_type(self, attention_type: str) -> bool:
        """Whether every name in ``attention_type`` is available."""
        return all(name in self._registry for name in _names(attention_type))

    def explain(self, attention_type: str) -> str:
        """A sentence on the first name in ``attention_type`` that is not available."""
        unknown = [n for n in _names(attention_type) if n not in self._registry]
        return self._registry.explain(unknown[0] if unknown else attention_type)

    def get(self, attention_type: str) -> nn.Module:
        """Build ``attention_type``: a name, or a composition of names.

        In "outer:inner" the inner attention is handed to the outer one, as in
        "conditional-full:causal-linear"; "outer:a,b" hands over two.

        Raises:
            ValueError: for a name that is not available, a composition that leaves more than
                one attention, or a parameter that is required and missing.
            TypeError: for an attention that does not take what it is composed with.
        """
        inner: list[nn.Module] = []
        for level in reversed(attention_type.split(":")):
            inner = [self._construct(name, inner) for name in level.split(",")]
        if len(inner) != 1:
            raise ValueError(
                f"Invalid attention_type argument {attention_type!r}: it must end in one "
                f"attention, got {len(inner)}"
            )
        return inner[0]

    def _construct(self, name: str, inner: list[nn.Module]) -> nn.Module:
        if name not in self._registry:
            raise ValueError(f"Unknown attention type: {self._registry.explain(name)}")
        cls, parameters = self._registry[name]
        arguments = {}
        for parameter in parameters:
            value = self._parameters.get(parameter)
            try:
                arguments[parameter] = self._registry.validate_parameter(parameter, value)
            except ValueError as error:
                if value is None:
                    raise ValueError(
                        f"Invalid value None for parameter {parameter!r}: attention {name!r} "
                        f"needs it; pass {parameter}=... to the builder"
                    ) from error
                raise
        return cls(*inner, **arguments)


class AttentionBuilder(BaseAttentionBuilder):
    """Builds attentions over whole sequences."""

    def __init__(self) -> None:
        super().__init__(AttentionRegistry)


class RecurrentAttentionBuilder(BaseAttentionBuilder):
    """Builds recurrent self attentions."""

    def __init__(self) -> None:
        super().__init__(RecurrentAttentionRegistry)


class RecurrentCrossAttentionBuilder(BaseAttentionBuilder):
    """Builds recurrent attentions to a memory."""

    def __init__(self) -> None:
        super().__init__(RecurrentCrossAttentionRegistry)


def _names(attention_type: str) -> list[str]:
    return [name for level in attention_type.split(":") for name in level.split(",")]
