"""Seeing inside a model: modules dispatch events, listeners receive the ones they ask for.

>>> seen = []
>>> EventDispatcher.get().listen(AttentionEvent, seen.append)
>>> EventDispatcher.get().remove(seen.append)
"""

from .event import AttentionEvent, Event, IntermediateOutput, QKVEvent
from .event_dispatcher import EventDispatcher

__all__ = ["AttentionEvent", "Event", "EventDispatcher", "IntermediateOutput", "QKVEvent"]
