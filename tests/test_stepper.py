"""Steps that own their state; without a GPU, with a plain call where a graph would be."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fast_transformers import stepper as module
from fast_transformers.builders import RecurrentDecoderBuilder
from fast_transformers.events import AttentionEvent, EventDispatcher
from fast_transformers.state import State
from fast_transformers.state.fixed import tensors_of
from fast_transformers.stepper import Stepper
from tests.test_streaming import MODELS, SIZES, L, N, S, twins

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FIXED = [name for name in MODELS if not name.startswith("conditional")]


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """What has been recorded; on a CPU a replay calls the step, on the same buffers."""
    recorded, real = [], module.record

    def record(call, device):
        recorded.append(device)
        return real(call, device) if GPU else call

    monkeypatch.setattr(module, "record", record)
    monkeypatch.setattr(module, "DEVICES", (DEVICE,))
    return recorded


@pytest.fixture
def x():
    return torch.randn(N, L, 12, dtype=torch.float64, device=DEVICE)


def make(name):
    batch, recurrent = twins(name)
    return batch.to(DEVICE), recurrent.to(DEVICE)


def tokens_of(stepper, x, first):
    return torch.stack([stepper(x[:, i]) for i in range(first, x.shape[1])], 1)


@torch.no_grad()
@pytest.mark.parametrize("form", ["recurrent", "batch"])
@pytest.mark.parametrize("name", FIXED)
def test_equals_steps_that_are_values(name, form, x, graphs):
    batch, recurrent = make(name)
    whole, end = batch(x, return_state=True)
    _, state = batch(x[:, :4], return_state=True)
    kept = [t.clone() for t in tensors_of(state)]

    def one(token, state):
        y, state = batch(token[:, None], state=state, return_state=True)
        return y[:, 0], state

    stepper = Stepper(recurrent if form == "recurrent" else one, state)
    assert_close(tokens_of(stepper, x, 4), whole[:, 4:])
    assert len(graphs) == 1
    assert stepper.explain()["graph"] == "chosen"
    for mine, before in zip(tensors_of(state), kept, strict=True):
        assert torch.equal(mine, before)
    assert stepper.state.position == end.position
    more = torch.randn(N, 3, 12, dtype=torch.float64, device=DEVICE)
    assert_close(batch(more, state=stepper.state), batch(more, state=end))
    stepper.restart(state)
    assert_close(tokens_of(stepper, x, 4), whole[:, 4:])
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("name", FIXED)
def test_prompts_of_different_lengths_that_change_places(name, x):
    batch, recurrent = make(name)
    mask = torch.arange(4, device=DEVICE) < torch.tensor([[4], [1], [3]], device=DEVICE)
    _, state = batch(x[:, :4], length_mask=mask, return_state=True)
    expected, stepper = state, Stepper(recurrent, state)
    for i in range(4, L):
        if i in (5, 8):
            index = torch.tensor([2, 0, 0], device=DEVICE)
            expected = expected.reorder(index)
            stepper.reorder(index)
        y, expected = recurrent(x[:, i], expected)
        assert_close(stepper(x[:, i]), y)
    assert torch.equal(stepper.state.positions, expected.positions)
    fewer = torch.tensor([1, 2], device=DEVICE)
    stepper.reorder(fewer)
    y, expected = recurrent(x[:2, 0], expected.reorder(fewer))
    assert_close(stepper(x[:2, 0]), y)


@torch.no_grad()
@pytest.mark.parametrize("cross", ["linear", "full"])
@pytest.mark.parametrize("own", ["causal-linear", "full"])
def test_decoder(own, cross, x, graphs):
    options = {"self_attention_type": own, "cross_attention_type": cross, "rotary": True}
    decoder = RecurrentDecoderBuilder.from_kwargs(**SIZES, **options).get()
    decoder = decoder.to(DEVICE).double().eval()
    memory = torch.randn(N, S, 12, dtype=torch.float64, device=DEVICE)
    y, state = decoder(x[:, 0], memory, state=State())
    stepper = Stepper(lambda token, state: decoder(token, None, state=state), state)
    for i in range(1, L):
        y, state = decoder(x[:, i], None, state=state)
        assert_close(stepper(x[:, i]), y)
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("tokens", [None, 150])
def test_caches_grow_and_graphs_are_recorded_anew(tokens, graphs):
    _, recurrent = make("hybrid")
    x = torch.randn(2, 150, 12, dtype=torch.float64, device=DEVICE)
    _, state = recurrent(x[:, 0], State())
    stepper = Stepper(recurrent, state, tokens=tokens)
    for i in range(1, 150):
        y, state = recurrent(x[:, i], state)
        assert_close(stepper(x[:, i]), y)
    assert len(graphs) == 4  # with room for 64, 96, 144 and more
    assert stepper.state.position == 150
    assert stepper.state.nbytes <= state.nbytes


def test_states_change_hands_between_modes_of_gradients(x):
    _, recurrent = make("hybrid")
    with torch.inference_mode():
        _, state = recurrent(x[:, 0], State())
        stepper = Stepper(recurrent, state)
        stepper(x[:, 1])
    y = stepper(x[:, 2].requires_grad_())
    assert not y.requires_grad
    with torch.inference_mode():
        stepper(x[:, 3])
    expected, _ = recurrent(x[:, 4], stepper.state)
    assert_close(stepper(x[:, 4]), expected.detach())


@torch.no_grad()
def test_says_why_there_is_no_graph(x, graphs, monkeypatch):
    _, recurrent = make("hybrid")
    _, state = recurrent(x[:, 0], State())
    stepper, expected = Stepper(recurrent, state), state
    weights, dispatcher = [], EventDispatcher.get()
    for i in range(1, 9):
        if i in (3, 6):
            dispatcher.listen(AttentionEvent, weights.append)
            assert "somebody listens" in stepper.explain()["graph"]
        y, expected = recurrent(x[:, i], expected)
        dispatcher.clear()
        if i in (3, 6):
            dispatcher.listen(AttentionEvent, weights.append)
        assert_close(stepper(x[:, i]), y)
        dispatcher.clear()
    assert len(weights) == 2 * 4  # two softmax layers, twice, of the model and of the stepper
    assert len(graphs) == 3
    monkeypatch.setattr(module, "DEVICES", ())
    assert f"of type {DEVICE}, graphs need cuda" in stepper.explain()["graph"]
    plain = Stepper(recurrent, state, form="plain")
    asked = "no: plain steps were asked for"
    assert plain.explain() == {"graph": asked, "compiled": asked, "plain": "chosen"}
    with pytest.raises(RuntimeError, match="no graph step can be taken: the tensors are on"):
        Stepper(recurrent, state, form="graph")(x[:, 1])


@torch.no_grad()
def test_what_has_no_constant_shapes_runs_as_it_is(x, graphs):
    _, recurrent = make("conditional-full:causal-linear")
    _, state = recurrent(x[:, 0], State())
    stepper = Stepper(recurrent, state)
    for i in range(1, L):
        y, state = recurrent(x[:, i], state)
        assert_close(stepper(x[:, i]), y)
    assert "changes its form with the length" in stepper.explain()["graph"]
    assert not graphs


@torch.no_grad()
def test_a_step_that_cannot_be_recorded_runs_as_it_is(x, monkeypatch):
    def record(call, device):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    _, recurrent = make("causal-linear")
    _, state = recurrent(x[:, 0], State())
    monkeypatch.setattr(module, "record", record)
    stepper = Stepper(recurrent, state)
    for i in range(1, L):
        y, state = recurrent(x[:, i], state)
        assert_close(stepper(x[:, i]), y)
    assert stepper.explain()["graph"] == "no: RuntimeError: operation not permitted"
    with pytest.raises(RuntimeError, match="operation not permitted"):
        tokens_of(Stepper(recurrent, state, form="graph"), x, 0)


@torch.no_grad()
def test_clear_errors(x):
    _, recurrent = make("causal-linear")
    with pytest.raises(ValueError, match="state must have seen a token"):
        Stepper(recurrent, State())
    _, state = recurrent(x[:, 0], State())
    with pytest.raises(ValueError, match="form must be one of auto, graph, compiled, plain, got"):
        Stepper(recurrent, state, form="eager")
    stepper = Stepper(recurrent, state)
    stepper(x[:, 1])
    with pytest.raises(ValueError, match=r"inputs must be as those of the first step, \(3, 12\)"):
        stepper(x[:2, 1])
