"""A table of attentions: name, class, parameters."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .spec import Spec


class Registry:
    """Attentions by name, and the parameters that they share by name."""

    def __init__(self) -> None:
        self._attentions: dict[str, tuple[Callable[..., Any], dict[str, Spec]]] = {}
        self._reserved: dict[str, str] = {}

    def register(
        self,
        key: str,
        class_object: Callable[..., Any],
        parameter_tuples: Iterable[tuple[str, Spec]],
    ) -> None:
        """Make `class_object` available as `key`; on error the registry stays as it was.

        Registering the same class again replaces it, so that a notebook cell can be re-run.

        Args:
            key: the `attention_type` of the attention in the builders.
            class_object: called with the parameters as keyword arguments.
            parameter_tuples: (name, spec) of each parameter.

        Raises:
            ValueError: another class has this key, or a parameter of this name is known with a
                different spec.
        """
        if key in self._attentions and not _same(class_object, self._attentions[key][0]):
            raise ValueError(
                f"{key!r} is already registered, for {self._attentions[key][0]!r}; choose another "
                f"name for {class_object!r}"
            )
        parameters = dict(parameter_tuples)
        others = self._parameters_without(key)
        for name, spec in parameters.items():
            if name in others and others[name] != spec:
                raise ValueError(
                    f"parameter {name!r} of {key!r} must have the spec {others[name]!r}, which it "
                    f"has in other attentions, got {spec!r}; use that one, or another name"
                )
        self._attentions[key] = (class_object, parameters)

    def reserve(self, names: Mapping[str, str]) -> None:
        """Note names that are not available and, for each, what to use ("use 'full' and ...").

        `explain` gives the advice. A reserved name may still be registered, and then counts.
        """
        self._reserved.update(names)

    def explain(self, key: str) -> str:
        """A sentence on whether `key` is available and if not, what is."""
        if key in self:
            return f"attention {key!r} is available"
        if key in self._reserved:
            return f"attention {key!r} is not in this version; {self._reserved[key]}"
        near = difflib.get_close_matches(key, self._attentions, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown attention {key!r}; {hint}available: {', '.join(self.keys)}"

    @property
    def keys(self) -> list[str]:
        """The names of the attentions, in the order of registration."""
        return list(self._attentions)

    @property
    def parameters(self) -> dict[str, Spec]:
        """The spec of every parameter of every attention, by name."""
        return self._parameters_without(None)

    def contains_parameter(self, name: str) -> bool:
        """Whether some attention has a parameter of this name."""
        return name in self.parameters

    def validate_parameter(self, name: str, value: Any) -> Any:
        """The canonical form of `value`.

        Raises:
            ValueError: the spec of the parameter refuses `value`, or no attention has it.
        """
        refused = f"Invalid value {value!r} for parameter {name!r}"
        spec = self.parameters.get(name)
        if spec is None:
            raise ValueError(f"{refused}: no attention has a parameter of this name")
        try:
            return spec.get(value)
        except Exception as error:  # a spec refuses with whatever it likes
            raise ValueError(f"{refused}: {error}") from error

    def __contains__(self, key: object) -> bool:
        return key in self._attentions

    def __getitem__(self, key: str) -> tuple[Callable[..., Any], list[str]]:
        """(class, names of its parameters); KeyError with the text of `explain` if unknown."""
        if key not in self._attentions:
            raise KeyError(self.explain(key))
        class_object, parameters = self._attentions[key]
        return class_object, list(parameters)

    def _parameters_without(self, key: str | None) -> dict[str, Spec]:
        parameters: dict[str, Spec] = {}
        for other, (_, specs) in self._attentions.items():
            if other != key:
                parameters.update(specs)
        return parameters


def _same(one: object, other: object) -> bool:
    """Whether these are one class, possibly defined twice as a re-run notebook cell does."""
    if one is other:
        return True
    name = getattr(one, "__qualname__", None)
    return name is not None and (one.__module__, name) == (
        other.__module__,
        getattr(other, "__qualname__", None),
    )


AttentionRegistry = Registry()
RecurrentAttentionRegistry = Registry()
RecurrentCrossAttentionRegistry = Registry()
