"""Token by token equals the whole sequence; states are values."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fast_transformers.attention import CausalLinearAttention
from fast_transformers.builders import (
    RecurrentEncoderBuilder,
)
from fast_transformers.events import Event, EventDispatcher, IntermediateOutput
from fast_transformers.feature_maps import Favor
from fast_transformers.masking import TriangularCausalMask
from fast_transformers.recurrent._utils import check_state
from fast_transformers.recurrent.attention import (
    RecurrentAttentionLayer,
    RecurrentConditionalFullAttention,
    RecurrentCrossLinearAttention,
    RecurrentFullAttention,
    RecurrentLinearAttention,
)
from tests.maps import ALL
from tests.support import make_qkv

N, L, S, H, E, M = 2, 6, 7, 3, 8, 5
SIZES = {
    "n_layers": 2, "n_heads": 2, "query_dimensions": 8, "value_dimensions": 6,
    "feed_forward_dimensions": 16, "dropout": 0.0, "attention_dropout": 0.0,
    "length_limit": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", ["elu", "favor", "asymmetric"])
def test_a_whole_sequence_can_be_continued(name):
    q, k, v = make_qkv(L)
    attention = RecurrentLinearAttention(E, ALL[name])
    stepped, state = _steps(attention, q, k, v)
    _, half = _steps(attention, q[:, :3], k[:, :3], v[:, :3])
    again, end = _steps(attention, q[:, 3:], k[:, 3:], v[:, 3:], half)
    assert torch.equal(again, stepped[:, 3:])
    assert torch.equal(end[0], state[0])


def _steps(attention, q, k, v, state=None):
    outputs = []
    for i in range(q.shape[1]):
        out, state = attention(q[:, i], k[:, i], v[:, i], state)
        outputs.append(out)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize(
    "make", [RecurrentLinearAttention, lambda E: RecurrentFullAttention(attention_dropout=0.0)]
)
def test_older_states_go_in_and_out(make):
    q, k, v = make_qkv(L)
    attention = make(E)
    expected, state = _steps(attention, q, k, v)
    outputs, old = [], None
    for i in range(L):
        out, (first, second) = attention(q[:, i], k[:, i], v[:, i], old)
        old = [first, second] if i % 2 else (first, second)
        outputs.append(out)
    assert_close(torch.stack(outputs, 1), expected)
    assert len(state) == 2
    assert [tuple(t.shape) for t in state] == [tuple(t.shape) for t in old]
    if isinstance(attention, RecurrentLinearAttention):
        features = nn.functional.elu(k) + 1
        assert_close(state[0], torch.einsum("nshe,nshm->nhem", features, v))
        assert_close(state[1], features.sum(1))
        assert state[0].shape == (N, H, E, M)
    else:
        assert_close(state[0], k.transpose(1, 2))
        assert_close(state[1], v.transpose(1, 2))


def test_favors_state_unpacks_to_a_pair_that_can_go_on():
    q, k, v = make_qkv(L)
    attention = RecurrentLinearAttention(E, Favor.factory(n_dims=16))
    expected, _ = _steps(attention, q, k, v)
    _, (first, second) = _steps(attention, q[:, :-1], k[:, :-1], v[:, :-1])
    out, _ = attention(q[:, -1], k[:, -1], v[:, -1], [first, second])
    assert_close(out, expected[:, -1], rtol=1e-4, atol=1e-4)
    assert_close(second, attention.feature_map(k[:, :-1]).sum(1), rtol=1e-4, atol=1e-4)


SELF_ATTENTIONS = {
    "linear": lambda: RecurrentLinearAttention(E),
    "favor": lambda: RecurrentLinearAttention(E, Favor),
    "full": lambda: RecurrentFullAttention(attention_dropout=0.0),
    "conditional": lambda: RecurrentConditionalFullAttention(
        RecurrentLinearAttention(E), 3, attention_dropout=0.0
    ),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", SELF_ATTENTIONS)
def test_states_are_values(name, grad):
    """A state can be continued twice, and keeps what it held."""
    q, k, v = make_qkv(L)
    attention = SELF_ATTENTIONS[name]()
    with torch.set_grad_enabled(grad):
        _, state = _steps(attention, q[:, :2], k[:, :2], v[:, :2])
        before = copy.deepcopy(state)
        one = _steps(attention, q[:, 2:], k[:, 2:], v[:, 2:], state)[0]
        _steps(attention, q[:, 2:], -k[:, 2:], v[:, 2:], state)
        assert torch.equal(_steps(attention, q[:, 2:], k[:, 2:], v[:, 2:], state)[0], one)
        assert torch.equal(_steps(attention, q[:, 2:], k[:, 2:], v[:, 2:], before)[0], one)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(_steps(attention, q[:, 2:], k[:, 2:], v[:, 2:], loaded)[0], one)


def test_gradients_through_the_state():
    q, k, v = make_qkv(L, dtype=torch.float64)
    gradients = []
    for whole in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        if whole:
            out = CausalLinearAttention(E)(*leaves, TriangularCausalMask(L), None, None)
        else:
            out = _steps(RecurrentLinearAttention(E), *leaves)[0]
        gradients.append(torch.autograd.grad(out.square().sum(), leaves))
    assert_close(*gradients)


def test_check_state():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_state() is None
        assert check_state("state") == "state"
        assert check_state(state="state", memory=None) == "state"
    with pytest.warns(DeprecationWarning, match="'memory' is deprecated"):
        assert check_state(memory="memory") == "memory"
    with pytest.warns(DeprecationWarning, match="use 'state' instead"):
        assert check_state("state", "memory") == "state"


@pytest.mark.parametrize("name", SELF_ATTENTIONS)
def test_memory_is_the_older_name_of_state(name):
    attention = SELF_ATTENTIONS[name]()
    layer = RecurrentAttentionLayer(attention, 12, H, E, M)
    encoder = RecurrentEncoderBuilder.from_kwargs(**SIZES).get()
    q, k, v = (x[:, 0] for x in make_qkv(1))
    x = torch.randn(N, 12)
    for module, inputs in (
        (attention, (q, k, v)), (layer, (x, x, x)), (encoder.layers[0], (x,)), (encoder, (x,)),
    ):  # fmt: skip
        _, state = module(*inputs)
        expected, _ = module(*inputs, state)
        with pytest.warns(DeprecationWarning, match="use 'state' instead") as warned:
            out, _ = module(*inputs, memory=state)
        assert torch.equal(out, expected)
        assert len(warned) == 1


@pytest.mark.parametrize("name", SELF_ATTENTIONS)
def test_the_batch_size_must_stay(name):
    attention = SELF_ATTENTIONS[name]()
    q, k, v = (x[:, 0] for x in make_qkv(1))
    _, state = attention(q, k, v)
    with pytest.raises(ValueError, match="The batch size changed during iteration"):
        attention(q[:1], k[:1], v[:1], state)


def test_interleaved_sequences_do_not_disturb_each_other():
    attention = RecurrentLinearAttention(E, Favor.factory(redraw=1)).train()
    one, other = make_qkv(L, seed=1), make_qkv(L, seed=2)
    expected, _ = _steps(attention, *one)
    states, outputs = [None, None], []
    for i in range(L):
        for j, inputs in enumerate((one, other)):
            out, states[j] = attention(*(x[:, i] for x in inputs), states[j])
            if j == 0:
                outputs.append(out)
    assert torch.equal(torch.stack(outputs, 1), expected)


def test_a_map_that_must_be_drawn_is_drawn_once():
    calls = []

    class Drawn(ALL["asymmetric"]):
        def new_feature_map(self, device=None):
            calls.append(device)

    for attention in (RecurrentLinearAttention(E, Drawn), RecurrentCrossLinearAttention(E, Drawn)):
        q, k, v = make_qkv(1)
        more = (q[:, 0], k[:, 0], v[:, 0])
        if isinstance(attention, RecurrentCrossLinearAttention):
            more = (q[:, 0], k, v, None)
        for _ in range(2):
            _, state = attention(*more)
            attention(*more, state)
        assert len(calls) == 1
        calls.clear()


def test_events():
    events = []
    EventDispatcher.get().listen(Event, events.append)
    q, k, v = make_qkv(L)
    attention = RecurrentFullAttention(attention_dropout=0.0)
    _steps(attention, q, k, v)
    assert [e.attention_matrix.shape for e in events] == [(N, H, t + 1) for t in range(L)]
    assert_close(events[-1].attention_matrix.sum(-1), torch.ones(N, H))
    events.clear()
    _steps(RecurrentLinearAttention(E), q, k, v)
    assert not events
    RecurrentAttentionLayer(RecurrentLinearAttention(E), 12, H)(*[torch.randn(N, 12)] * 3)
    assert not events  # no QKVEvent
    encoder = RecurrentEncoderBuilder.from_kwargs(attention_type="linear", **SIZES).get()
    y, _ = encoder(torch.randn(N, 12))
    assert [type(e) for e in events] == [IntermediateOutput] * 2
    assert_close(encoder.norm(events[-1].x), y)
    assert all(e.source is encoder for e in events)
