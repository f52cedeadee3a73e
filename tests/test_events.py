from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Union

import pytest
import torch
from torch.nn import Linear, Sequential

from fast_transformers.events import (
    AttentionEvent,
    Event,
    EventDispatcher,
    IntermediateOutput,
    QKVEvent,
)
from fast_transformers.events.filters import (
    CallableEventFilter,
    EventFilter,
    LayerNameEventFilter,
    event_class,
    from_layer,
    layer_name_contains,
)

X = torch.zeros(1)
LAYER, OTHER = Linear(1, 1), Linear(1, 1)
ATTENTION, QKV, OUTPUT = (
    AttentionEvent(LAYER, X),
    QKVEvent(LAYER, X, X, X),
    IntermediateOutput(OTHER, X),
)


@pytest.fixture
def dispatcher():
    return EventDispatcher()


def heard(dispatcher, event_filter):
    """Which of the three events the filter lets through."""
    seen = []
    dispatcher.listen(event_filter, seen.append)
    for event in (ATTENTION, QKV, OUTPUT):
        dispatcher.dispatch(event)
    return seen


def is_qkv(event):
    return isinstance(event, QKVEvent)


@pytest.mark.parametrize(
    ("event_filter", "expected"),
    [
        (Event, [ATTENTION, QKV, OUTPUT]),
        (AttentionEvent, [ATTENTION]),
        (AttentionEvent | QKVEvent, [ATTENTION, QKV]),
        (Union[AttentionEvent, IntermediateOutput], [ATTENTION, OUTPUT]),  # noqa: UP007
        (is_qkv, [QKV]),
        (CallableEventFilter(is_qkv), [QKV]),
        (event_class(QKVEvent), [QKV]),
        (from_layer(OTHER), [OUTPUT]),
        (~from_layer(LAYER), [OUTPUT]),
        (AttentionEvent & from_layer(LAYER), [ATTENTION]),
        (AttentionEvent & from_layer(OTHER), []),
        (from_layer(LAYER) & QKVEvent, [QKV]),
        (from_layer(OTHER) | AttentionEvent, [ATTENTION, OUTPUT]),
        (AttentionEvent | from_layer(OTHER), [ATTENTION, OUTPUT]),
        ((AttentionEvent | QKVEvent) & ~event_class(QKVEvent), [ATTENTION]),
        (is_qkv & from_layer(LAYER), [QKV]),
        (from_layer(OTHER) | is_qkv, [QKV, OUTPUT]),
    ],
)
def test_filters(dispatcher, event_filter, expected):
    assert heard(dispatcher, event_filter) == expected
    # What is promised not to be wanted is never accepted.
    for event in expected:
        assert dispatcher.wants(type(event), event.source)


def test_operators_stop_early():
    def refuse(event):
        raise AssertionError("asked in vain")

    assert (from_layer(LAYER) | refuse)(ATTENTION) is True
    assert (from_layer(OTHER) & refuse)(ATTENTION) is False


@pytest.mark.parametrize("wrong", [None, 3, "AttentionEvent", Linear, int | str])
def test_filters_are_checked_when_listening(dispatcher, wrong):
    with pytest.raises(TypeError, match="event_filter must be"):
        dispatcher.listen(wrong, print)
    with pytest.raises(TypeError):
        _ = from_layer(LAYER) & wrong
    with pytest.raises(TypeError):
        _ = wrong | from_layer(LAYER)
    with pytest.raises(TypeError, match="event_handler must be callable"):
        dispatcher.listen(Event, wrong if not isinstance(wrong, type) else None)


def test_layer_names():
    model = Sequential(Linear(1, 1), Sequential(Linear(1, 1)))
    inner = model[1][0]
    assert layer_name_contains(model, "1.0")(Event(inner)) is True
    assert layer_name_contains(model, "1.0")(Event(model[1])) is False
    assert layer_name_contains(model, "")(Event(model)) is True
    assert layer_name_contains(model, "")(Event(LAYER)) is False
    assert LayerNameEventFilter(model, lambda name: name == "1")(Event(model[1])) is True


def test_layer_names_do_not_keep_the_model_alive():
    model = Sequential(Linear(1, 1))
    named, alive = layer_name_contains(model, "0"), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert named(Event(LAYER)) is False


def test_dispatch_in_order_and_one_filter_a_handler(dispatcher):
    calls = []

    def first(event):
        calls.append("first")

    dispatcher.listen(QKVEvent, first)
    dispatcher.listen(AttentionEvent, lambda event: calls.append("second"))
    dispatcher.listen(AttentionEvent, first)
    dispatcher.dispatch(QKV)
    assert calls == []
    dispatcher.dispatch(ATTENTION)
    assert calls == ["first", "second"]
    dispatcher.remove(first)
    dispatcher.remove(first)
    dispatcher.dispatch(ATTENTION)
    assert calls == ["first", "second", "second"]
    dispatcher.clear()
    dispatcher.dispatch(ATTENTION)
    assert len(calls) == 3


def test_listeners_may_change_while_they_are_called(dispatcher):
    seen = []

    def once(event):
        dispatcher.remove(once)
        dispatcher.listen(Event, seen.append)

    dispatcher.listen(Event, once)
    dispatcher.dispatch(ATTENTION)
    dispatcher.dispatch(QKV)
    assert seen == [QKV]


def test_wants_is_false_only_when_certain(dispatcher):
    def wants():
        return [dispatcher.wants(t, s) for t in (AttentionEvent, QKVEvent) for s in (LAYER, OTHER)]

    assert wants() == [False, False, False, False]
    for event_filter, expected in [
        (AttentionEvent, [True, True, False, False]),
        (from_layer(LAYER), [True, False, True, False]),
        (AttentionEvent & from_layer(OTHER), [False, True, False, False]),
        (AttentionEvent | from_layer(OTHER), [True, True, False, True]),
        (layer_name_contains(LAYER, ""), [True, False, True, False]),
        (AttentionEvent & ~from_layer(LAYER), [True, True, False, False]),
        (lambda event: False, [True, True, True, True]),
        (EventFilter(), [True, True, True, True]),
    ]:
        dispatcher.clear()
        dispatcher.listen(event_filter, print)
        assert wants() == expected


def test_one_dispatcher_for_each_key():
    assert EventDispatcher.get() is EventDispatcher.get("")
    assert EventDispatcher.get("a") is EventDispatcher.get("a")
    keys = ["", "a", None, 1]
    assert len({id(EventDispatcher.get(key)) for key in keys}) == len(keys)
    own = EventDispatcher()
    assert EventDispatcher.get(own) is own


class Emitting(torch.nn.Module):
    def __init__(self, dispatcher):
        super().__init__()
        self.dispatcher = dispatcher


@pytest.mark.parametrize("key", ["", "test", None])
def test_a_copied_model_reaches_the_same_listeners(key):
    dispatcher = EventDispatcher.get(key)

    def handler(event):  # local, so that it cannot be pickled
        pass

    dispatcher.listen(Event, handler)
    model = Emitting(dispatcher)
    assert copy.deepcopy(model).dispatcher is dispatcher
    assert copy.copy(dispatcher) is dispatcher
    assert pickle.loads(pickle.dumps(model)).dispatcher is dispatcher
    dispatcher.remove(handler)


def test_a_dispatcher_without_key_is_copied_as_itself_and_pickled_empty(dispatcher):
    dispatcher.listen(Event, lambda event: None)
    assert copy.deepcopy(Emitting(dispatcher)).dispatcher is dispatcher
    assert copy.copy(dispatcher) is dispatcher
    unpickled = pickle.loads(pickle.dumps(dispatcher))
    assert unpickled is not dispatcher
    assert not unpickled.wants(Event, LAYER)
