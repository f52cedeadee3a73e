"""What a parameter of an attention may be: a spec turns a value into its canonical form."""

from __future__ import annotations

import collections.abc
from typing import Any

from ..events import EventDispatcher


class Spec:
    """The values that `predicate` accepts.

    Two specs made by `Spec` are equal only if they are the same object, while `Choice` and
    `Optional` compare by content.

    Args:
        predicate: returns the canonical form of a value, or raises.
        name: how the spec is printed.
    """

    def __init__(
        self, predicate: collections.abc.Callable[[Any], Any], name: str = "CustomSpec"
    ) -> None:
        self._predicate = predicate
        self._name = name

    def get(self, x: Any) -> Any:
        """The canonical form of `x`; raises, most often ValueError, if there is none."""
        return self._predicate(x)

    def check(self, x: Any) -> bool:
        """Whether `get` accepts `x`."""
        try:
            self.get(x)
        except Exception:  # a predicate refuses with whatever it likes
            return False
        return True

    def __repr__(self) -> str:
        return self._name


class Choice(Spec):
    """One of `choices`."""

    def __init__(self, choices: collections.abc.Iterable[Any]) -> None:
        self._choices = tuple(choices)
        super().__init__(self._one_of_choices, f"Choice({list(self._choices)})")

    def _one_of_choices(self, x: Any) -> Any:
        if x not in self._choices:
            raise ValueError(f"{x!r} is not one of {list(self._choices)}")
        return x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and self._choices == other._choices

    __hash__ = None  # type: ignore[assignment]  # choices need not be hashable


class Optional(Spec):
    """What `spec` accepts, or None, which stands for `default` (None unless given)."""

    def __init__(self, spec: Spec, default: Any = None) -> None:
        self._spec = spec
        self._default = default
        super().__init__(self._value_or_default, f"Optional({spec!r}, {default!r})")

    def _value_or_default(self, x: Any) -> Any:
        return self._default if x is None else self._spec.get(x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Optional) and (self._spec, self._default) == (
            other._spec,
            other._default,
        )

    __hash__ = None  # type: ignore[assignment]  # a default need not be hashable


def _bool(x: Any) -> bool:
    if not isinstance(x, str):
        return bool(x)
    values = {"true": True, "1": True, "false": False, "0": False}
    if x.lower() not in values:
        raise ValueError(f"{x!r} is neither true nor false; use 'True' or 'False'")
    return values[x.lower()]


def _callable(x: Any) -> Any:
    if not callable(x):
        raise ValueError(f"{x!r} cannot be called; pass a function")
    return x


def _event_dispatcher(x: Any) -> str | EventDispatcher:
    if not isinstance(x, (str, EventDispatcher)):
        raise ValueError(f"{x!r} is neither an EventDispatcher nor the key (a str) of one")
    return x


Int = Spec(int, "Int")
Float = Spec(float, "Float")
Bool = Spec(_bool, "Bool")
Callable = Spec(_callable, "Callable")
EventDispatcherInstance = Spec(_event_dispatcher, "EventDispatcherInstance")
