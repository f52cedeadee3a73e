"""From the modules that dispatch events to the functions that listen for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, ClassVar
from weakref import WeakSet

from torch.nn import Module

from .event import Event
from .filters import EventFilter, as_event_filter

Handler = Callable[[Any], object]


class EventDispatcher:
    """Calls every listener whose filter accepts an event, in the order they were added.

    `EventDispatcher.get(key)` gives the one dispatcher this process has for that key; it stays
    the same one through `copy.deepcopy` and `pickle` of a model that holds it. A dispatcher made
    by `EventDispatcher()` is its own: it survives a copy, and unpickles without listeners.
    """

    _dispatchers: ClassVar[dict[Hashable, EventDispatcher]] = {}
    _alive: ClassVar[WeakSet[EventDispatcher]] = WeakSet()

    def __init__(self) -> None:
        self._alive.add(self)
        self._listeners: dict[Handler, EventFilter] = {}
        self._key: tuple[Hashable, ...] = ()  # (key,) once `get` has filed it; None is a key too

    @classmethod
    def get(cls, key: EventDispatcher | Hashable = "") -> EventDispatcher:
        """The dispatcher of this process for `key`; a dispatcher is returned as it is."""
        if isinstance(key, EventDispatcher):
            return key
        if key not in cls._dispatchers:
            dispatcher = cls()
            dispatcher._key = (key,)
            cls._dispatchers[key] = dispatcher
        return cls._dispatchers[key]

    @classmethod
    def anybody_listens(cls) -> bool:
        """Whether any dispatcher of this process has a listener."""
        return any(dispatcher._listeners for dispatcher in cls._alive)

    def listen(self, event_filter: object, event_handler: Handler) -> None:
        """Call `event_handler(event)` for every event that `event_filter` accepts.

        Args:
            event_filter: an `Event` subclass, a union of them (`AttentionEvent | QKVEvent`), a
                filter of `events.filters`, or any callable from event to bool.
            event_handler: called with the event. A handler has one filter: the last one given.

        Raises:
            TypeError: `event_filter` is none of these, or `event_handler` cannot be called.
        """
        if not callable(event_handler):
            raise TypeError(
                f"event_handler must be callable, got {event_handler!r}; pass a function of one "
                "argument, the event"
            )
        self._listeners[event_handler] = as_event_filter(event_filter)

    def remove(self, event_handler: Handler) -> None:
        """Stop calling `event_handler`; nothing happens if it is not listening."""
        self._listeners.pop(event_handler, None)

    def clear(self) -> None:
        """Remove all listeners."""
        self._listeners.clear()

    def dispatch(self, event: Event) -> None:
        """Hand `event` to the listeners; they may add and remove listeners meanwhile."""
        for handler, event_filter in tuple(self._listeners.items()):
            if event_filter(event):
                handler(event)

    def wants(self, event_type: type[Event], source: Module) -> bool:
        """Whether a listener may accept an event of that very type from `source`.

        False is certain, so the event need not be made. A filter that is a plain function can
        only be asked about the event itself, hence may accept anything.
        """
        return any(f.may_accept(event_type, source) for f in self._listeners.values())

    def __copy__(self) -> EventDispatcher:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> EventDispatcher:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self).get, self._key) if self._key else (type(self), ())
