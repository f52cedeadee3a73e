"""Which events a listener receives; filters combine with `&`, `|` and `~`.

>>> from fast_transformers.events import AttentionEvent
>>> last = torch.nn.Linear(1, 1)
>>> attention_of_all_but_last = AttentionEvent & ~from_layer(last)

One side of `&` and `|` must be a filter; the other may be an `Event` subclass, a union of them,
or any callable from event to bool.
"""

from __future__ import annotations

import types
import typing
import weakref
from collections.abc import Callable

import torch

from .event import Event


class EventFilter:
    """A callable from event to bool that can be combined with others."""

    def __call__(self, event: Event) -> bool:
        """Whether `event` is accepted."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    def may_accept(self, event_type: type[Event], source: torch.nn.Module) -> bool:
        """False only if every event of exactly `event_type` from `source` is refused."""
        return True

    def __and__(self, other: object) -> EventFilter:
        return _combine(_And, self, other)

    def __rand__(self, other: object) -> EventFilter:
        return _combine(_And, other, self)

    def __or__(self, other: object) -> EventFilter:
        return _combine(_Or, self, other)

    def __ror__(self, other: object) -> EventFilter:
        return _combine(_Or, other, self)

    def __invert__(self) -> EventFilter:
        return _Not(self)


class CallableEventFilter(EventFilter):
    """Accepts what `event_filter(event)` accepts."""

    def __init__(self, event_filter: Callable[[typing.Any], object]) -> None:
        self._event_filter = event_filter

    def __call__(self, event: Event) -> bool:
        return bool(self._event_filter(event))


class LayerNameEventFilter(EventFilter):
    """Accepts events whose source has, in `root`, a name that `name_filter` accepts.

    The names are those of `root.named_modules()` now, "" being `root` itself. The modules are
    not kept alive. Sources outside of `root` are refused.
    """

    def __init__(self, root: torch.nn.Module, name_filter: Callable[[str], object]) -> None:
        self._names = weakref.WeakKeyDictionary({m: name for name, m in root.named_modules()})
        self._name_filter = name_filter

    def __call__(self, event: Event) -> bool:
        return self._accepts(event.source)

    def may_accept(self, event_type: type[Event], source: torch.nn.Module) -> bool:
        return self._accepts(source)

    def _accepts(self, source: torch.nn.Module) -> bool:
        name = self._names.get(source)
        return name is not None and bool(self._name_filter(name))


def event_class(klass: type[Event] | types.UnionType) -> EventFilter:
    """Accepts the events that are instances of `klass`."""
    return _EventClass(klass)


def from_layer(layer: torch.nn.Module) -> EventFilter:
    """Accepts the events whose source is `layer` itself."""
    return _FromLayer(layer)


def layer_name_contains(root: torch.nn.Module, name: str) -> EventFilter:
    """Accepts the events whose source has a name in `root` that contains `name`.

    A plain substring: "layers.1" accepts "layers.10" too.
    """
    return LayerNameEventFilter(root, lambda layer_name: name in layer_name)


def as_event_filter(event_filter: object) -> EventFilter:
    """`event_filter` as an `EventFilter`.

    Raises:
        TypeError: it is no filter, no `Event` subclass or union of them, and no callable.
    """
    if isinstance(event_filter, EventFilter):
        return event_filter
    if _is_event_class(event_filter):
        return _EventClass(typing.cast("type[Event]", event_filter))
    if callable(event_filter) and not isinstance(event_filter, type):
        return CallableEventFilter(event_filter)
    raise TypeError(
        f"event_filter must be an Event subclass, a union of them, a filter or a callable, got "
        f"{event_filter!r}; to accept every event pass Event"
    )


class _EventClass(EventFilter):
    def __init__(self, klass: type[Event] | types.UnionType) -> None:
        self._klass = klass

    def __call__(self, event: Event) -> bool:
        return isinstance(event, self._klass)

    def may_accept(self, event_type: type[Event], source: torch.nn.Module) -> bool:
        return issubclass(event_type, self._klass)


class _FromLayer(EventFilter):
    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer = layer

    def __call__(self, event: Event) -> bool:
        return event.source is self._layer

    def may_accept(self, event_type: type[Event], source: torch.nn.Module) -> bool:
        return source is self._layer


class _And(EventFilter):
    def __init__(self, left: EventFilter, right: EventFilter) -> None:
        self._left, self._right = left, right

    def __call__(self, event: Event) -> bool:
        return self._left(event) and self._right(event)

    def may_accept(self, event_type: type[Event], source: torch.nn.Module) -> bool:
        return all(f.may_accept(event_type, source) for f in (self._left, self._right))


class _Or(EventFilter):
    def __init__(self, left: EventFilter, right: EventFilter) -> None:
        self._left, self._right = left, right

    def __call__(self, event: Event) -> bool:
        return self._left(event) or self._right(event)

    def may_accept(self, event_type: type[Event], source: torch.nn.Module) -> bool:
        return any(f.may_accept(event_type, source) for f in (self._left, self._right))


class _Not(EventFilter):
    # may_accept stays True: that the inner filter may accept does not say that it always does.
    def __init__(self, inner: EventFilter) -> None:
        self._inner = inner

    def __call__(self, event: Event) -> bool:
        return not self._inner(event)


def _is_event_class(x: object) -> bool:
    if isinstance(x, types.UnionType) or typing.get_origin(x) is typing.Union:
        return all(_is_event_class(member) for member in typing.get_args(x))
    return isinstance(x, type) and issubclass(x, Event)


def _combine(kind: type[_And] | type[_Or], left: object, right: object) -> EventFilter:
    try:
        return kind(as_event_filter(left), as_event_filter(right))
    except TypeError:
        return NotImplemented  # Python then names both operands in its TypeError
