"""One state in every mode: whatever is split, padded, joined or saved equals a single pass."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fast_transformers.attention import AttentionLayer
from fast_transformers.builders import (
    RecurrentDecoderBuilder,
    RecurrentEncoderBuilder,
    TransformerDecoderBuilder,
    TransformerEncoderBuilder,
)
from fast_transformers.events import AttentionEvent, EventDispatcher
from fast_transformers.masking import FullMask, LengthMask, TriangularCausalMask
from fast_transformers.state import KeysValues, State
from fast_transformers.transformers import TransformerEncoder
from fast_transformers.utils import make_mirror
from tests.maps import ALL, CATALOGUE

N, L, S, LIMIT = 3, 11, 7, 6
KINDS = ["causal-linear", "full", "conditional-full:causal-linear"]
SIZES = {
    "n_layers": 2, "n_heads": 2, "query_dimensions": 8, "value_dimensions": 6,
    "feed_forward_dimensions": 16, "dropout": 0.0, "attention_dropout": 0.0,
    "length_limit": LIMIT,
}  # fmt: skip
MODELS = {
    **{kind: {"attention_type": kind} for kind in KINDS},
    "favor": {"attention_type": "causal-linear", "feature_map": ALL["favor"]},
    "positions": {"attention_type": "causal-linear", "feature_map": CATALOGUE["cos"]},
    "rotary": {"attention_type": "causal-linear", "rotary": True},
    "rotary full": {"attention_type": "full", "rotary": True, "norm_first": True},
    "hybrid": {},
}


def encoder(name: str, recurrent: bool = False, dtype: torch.dtype = torch.float64):
    """An encoder; the hybrid has a linear layer, a softmax one, and one of both."""
    builder = RecurrentEncoderBuilder if recurrent else TransformerEncoderBuilder
    if name != "hybrid":
        model = builder.from_kwargs(**SIZES, **MODELS[name]).get()
    else:
        kinds = [("causal-linear", True), ("full", False), ("full", True)]
        stacks = [
            builder.from_kwargs(
                **{**SIZES, "n_layers": 1}, attention_type=kind, rotary=rotary
            ).get()
            for kind, rotary in kinds
        ]
        model = type(stacks[0])([stack.layers[0] for stack in stacks], stacks[0].norm)
    return model.to(dtype).eval()


def twins(name: str):
    batch, recurrent = encoder(name), encoder(name, recurrent=True)
    make_mirror(batch, recurrent)
    return batch, recurrent


@pytest.fixture
def x():
    return torch.randn(N, L, 12, dtype=torch.float64)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_split_anywhere(name, grad, x):
    batch, recurrent = twins(name)
    with torch.set_grad_enabled(grad):
        whole, end = batch(x, return_state=True)
        if not name.startswith("conditional"):
            assert_close(whole, batch(x, TriangularCausalMask(L)))
        for first in range(L + 1):
            state, outputs = State(), []
            if first:
                y, state = batch(x[:, :first], state=state, return_state=True)
                outputs.append(y)
            for i in range(first, L):
                y, state = recurrent(x[:, i], state)
                outputs.append(y[:, None])
            assert_close(torch.cat(outputs, 1), whole)
            assert state.position == end.position == L
            y, state = batch(x[:, :1], state=state, return_state=True)
            assert_close(y, batch(x[:, :1], state=end))
        parts, state = [], None
        for piece in x.split([1, 4, 1, 5], 1):
            y, state = batch(piece, TriangularCausalMask(piece.shape[1]), None, state=state,
                             return_state=True)  # fmt: skip
            parts.append(y)
        assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("cross", ["linear", "full", "conditional-full:linear"])
@pytest.mark.parametrize("own", ["causal-linear", "full"])
def test_decoder(own, cross, x):
    options = {
        **SIZES, "self_attention_type": own, "cross_attention_type": cross, "rotary": True,
        "cross_n_heads": 3, "cross_query_dimensions": 10, "cross_value_dimensions": 4,
        "cross_model_dimensions": 9,
    }  # fmt: skip
    batch = TransformerDecoderBuilder.from_kwargs(**options).get().double().eval()
    recurrent = RecurrentDecoderBuilder.from_kwargs(**options).get().double().eval()
    make_mirror(batch, recurrent)
    for size in (LIMIT - 1, S):
        memory = torch.randn(N, size, 9, dtype=torch.float64)
        kept = LengthMask(torch.tensor([size, 2, 3]), max_len=size)
        whole, end = batch(x, memory, memory_length_mask=kept, return_state=True)
        if not cross.startswith("conditional"):
            expected = batch(x, memory, TriangularCausalMask(L), memory_length_mask=kept)
            assert_close(whole, expected)
        y, state = batch(x[:, :4], memory, memory_length_mask=kept, return_state=True)
        forked = state
        z, state = batch(x[:, 4:6], None, state=state, return_state=True)
        outputs = [y, z]
        for i in range(6, L):
            step, state = recurrent(x[:, i], None, state=state)
            outputs.append(step[:, None])
        assert_close(torch.cat(outputs, 1), whole)
        assert state.position == end.position == L
        assert_close(batch(x[:, 4:], None, state=forked), whole[:, 4:])
    with pytest.raises(ValueError, match="memory must be given for the first tokens"):
        batch(x, None, return_state=True)
    with pytest.raises(ValueError, match="memory must be given for the first tokens"):
        recurrent(x[:, 0], None)
    half = FullMask(torch.arange(L)[:, None] > torch.arange(S))
    with pytest.raises(ValueError, match="memory_mask must keep everything"):
        batch(x, memory, memory_mask=half, return_state=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_prompts_continue(name, side, x):
    """Each sequence as if it were alone, whatever the padding holds."""
    batch, recurrent = twins(name)
    lengths = [7, 1, 4]
    prompt = torch.full((N, 7, 12), torch.nan, dtype=torch.float64)
    mask = torch.zeros(N, 7, dtype=torch.bool)
    for i, n in enumerate(lengths):
        at = slice(7 - n, 7) if side == "left" else slice(n)
        prompt[i, at], mask[i, at] = x[i, :n], True
    y, state = batch(prompt, length_mask=mask, return_state=True)
    assert state.positions.tolist() == lengths
    more = x[:, -4:]
    z, later = batch(more[:, :2], state=state, return_state=True)
    outputs = [z]
    for i in (2, 3):
        step, later = recurrent(more[:, i], later)
        outputs.append(step[:, None])
    for i, n in enumerate(lengths):
        alone = torch.cat([x[i : i + 1, :n], more[i : i + 1]], 1)
        expected, _ = batch(alone, return_state=True)
        assert_close(y[i : i + 1, mask[i]], expected[:, :n])
        assert_close(torch.cat(outputs, 1)[i : i + 1], expected[:, n:])
    again = torch.tensor([[True, False], [True, True], [False, True]])
    z, _ = batch(more[:, :2], length_mask=again, state=state, return_state=True)
    for i, n in enumerate(lengths):
        alone = torch.cat([x[i, :n], more[i, :2][again[i]]])[None]
        assert_close(z[i, again[i]], batch(alone, return_state=True)[0][0, n:])


@pytest.mark.parametrize("name", MODELS)
def test_states_are_values(name, x):
    """Continued in two ways, in any order, and gone back to."""
    batch, recurrent = twins(name)
    with torch.no_grad():
        _, state = batch(x[:, :4], return_state=True)
        _, state = recurrent(x[:, 4], state)  # buffers with room to write to
        one = batch(x[:, 5:], state=state)
        copied = state.clone()
        _, other = recurrent(-x[:, 5], state)
        _, mine = recurrent(x[:, 5], state)
        batch(-x[:, 6:], state=other)
        assert_close(batch(x[:, 6:], state=mine), one[:, 1:])
        for again in (state, copied, state.detach(), state.to("cpu"), state.reserve(50)):
            assert_close(batch(x[:, 5:], state=again), one)
    assert "position=5" in repr(state)


def test_caches_grow_by_doubling(x):
    model = encoder("full")
    with torch.no_grad():
        _, state = model(x[:, :4], return_state=True)
        places, capacities = set(), set()
        for i in range(100):
            _, state = model(x[:, i % L, None], state=state, return_state=True)
            places.add(state[0].key_buffer.data_ptr())
            capacities.add(state[0].capacity)
        assert sorted(capacities) == [8, 16, 32, 64, 128]
        room = state.reserve(300)
        assert room.nbytes > state.nbytes
        before = room[0].key_buffer.data_ptr()
        for _ in range(196):
            _, room = model(x[:, :1], state=room, return_state=True)
        assert room[0].key_buffer.data_ptr() == before
        assert room[0].capacity == 300 == room.position
    with torch.inference_mode():
        _, state = model(x[:, :4], return_state=True)
        _, state = model(x[:, 4:5], state=state, return_state=True)
    expected = model(x, TriangularCausalMask(L))
    assert_close(model(x[:, 5:], state=state), expected[:, 5:])
    with torch.no_grad():
        assert_close(model(x[:, 5:], state=state), expected[:, 5:])


def test_an_older_states_pair_goes_on(x):
    for kind in ("full", "causal-linear"):
        model = encoder(kind)
        whole, _ = model(x, return_state=True)
        _, state = model(x[:, :5], return_state=True)
        old = [list(layer) for layer in state]
        assert_close(model(x[:, 5:], state=old), whole[:, 5:])


def test_events(x):
    events = []
    EventDispatcher.get().listen(AttentionEvent, events.append)
    model = encoder("full")
    whole, state = model(x[:, :5], return_state=True)
    _, state = model(x[:, 5:7], state=state, return_state=True)
    shapes = [tuple(e.attention_matrix.shape) for e in events]
    assert shapes == [(N, 2, 5, 5)] * 2 + [(N, 2, 2, 7)] * 2
    EventDispatcher.get().clear()
    assert_close(model(x[:, :5], return_state=True)[0], whole)
    for event in events:
        matrix = event.attention_matrix
        assert_close(matrix.sum(-1), torch.ones_like(matrix.sum(-1)))
        assert not matrix.triu(1 + matrix.shape[-1] - matrix.shape[-2]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model = encoder("hybrid", dtype=dtype)
    _, state = model(torch.randn(N, 3, 12, dtype=dtype), return_state=True)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert state[0].attention.kv.dtype == sums
    assert state[1].key_buffer.dtype == dtype
    y, state = model(torch.randn(N, 2, 12, dtype=dtype), state=state, return_state=True)
    assert y.dtype == dtype
    assert state[0].attention.kv.dtype == sums


def test_autocast_may_begin_and_end():
    model = encoder("hybrid", dtype=torch.float32)
    x = torch.randn(N, L, 12)
    expected = model(x, TriangularCausalMask(L))
    for first in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            _, state = model(x[:, :6], return_state=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=not first):
            y, state = model(x[:, 6:], state=state, return_state=True)
        assert_close(y.float(), expected[:, 6:], rtol=0.1, atol=0.1)
        assert state[0].attention.kv.dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_gradients_through_the_state(name, x):
    model = encoder(name)
    gradients = []
    for sizes in ([L], [4, 1, L - 5]):
        leaf, state, loss = x.clone().requires_grad_(), None, 0.0
        for piece in leaf.split(sizes, 1):
            y, state = model(piece, state=state, return_state=True)
            loss = loss + y.sin().sum()
        gradients.append(torch.autograd.grad(loss, [leaf, *model.parameters()]))
    assert_close(*gradients)


@pytest.mark.parametrize("name", MODELS)
def test_truncated_backpropagation(name, x):
    """A detached state gives the same values, and gradients of its own segment alone."""
    model = encoder(name)
    for detached in (True, False):
        leaf = x.clone().requires_grad_()
        _, state = model(leaf[:, :5], return_state=True)
        state = state.detach() if detached else state
        assert _attached(state) == (not detached)
        model(leaf[:, 5:], state=state).sin().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad[:, 5:].all()
        assert leaf.grad[:, :5].any() == (not detached)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    state = None
    for piece in x.split(3, 1):
        y, state = model(piece, state=state, return_state=True)
        optimizer.zero_grad()
        y.sin().sum().backward()
        optimizer.step()
        state = state.detach()
        assert not _attached(state)


def _attached(state: State) -> bool:
    found = []
    state.map(lambda t: found.append(t.requires_grad) or t)
    return any(found)


def test_maps_are_redrawn_for_new_sequences_alone(x):
    model = encoder("favor").train()
    draws = []
    state = None
    for piece in x.split([4, 1, 6], 1):
        _, state = model(piece, state=state, return_state=True)
        draws.append(model.layers[0].attention.inner_attention.feature_map.omega.clone())
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    model(x, return_state=True)
    omega = model.layers[0].attention.inner_attention.feature_map.omega
    assert not torch.equal(omega, draws[0])


def test_clear_errors(x):
    model = encoder("full")
    _, state = model(x, return_state=True)
    with pytest.raises(ValueError, match="attn_mask of a FullAttention with a state must be None"):
        model(x, FullMask(L), state=state)
    with pytest.raises(ValueError, match="state must be for 2 layers, got one for 3"):
        model(x, state=[None] * 3)
    with pytest.raises(TypeError, match="state must be the state an earlier call returned"):
        model(x, state=3)
    with pytest.raises(TypeError, match="or a pair"):
        model(x, state=[3, 3])
    with pytest.raises(ValueError, match="The batch size changed"):
        model(x[:2], state=state)
    with pytest.raises(ValueError, match="length_mask must have shape"):
        model(x, length_mask=LengthMask(torch.ones(N), max_len=3), return_state=True)
    linear = TransformerEncoderBuilder.from_kwargs(**SIZES, attention_type="linear").get().double()
    with pytest.raises(RuntimeError, match="use 'causal-linear', or 'full'"):
        linear(x, return_state=True)
    layer = AttentionLayer(torch.nn.Identity(), 12, 2)
    with pytest.raises(TypeError, match="Identity has no state to go on from: it lacks"):
        layer(x.float(), x.float(), x.float(), None, None, None, return_state=True)
    with pytest.raises(TypeError, match="it lacks remember"):
        layer.remember(x.float(), x.float(), None)
    assert isinstance(model, TransformerEncoder)
    assert isinstance(state[0], KeysValues)


def test_a_compiled_model_goes_on(x):
    """One graph for each kind of call, whatever the number of tokens seen."""
    model = encoder("hybrid")
    torch.compiler.reset()
    step = torch.compile(
        lambda x, state: model(x, state=state, return_state=True), backend="eager", fullgraph=True
    )
    with torch.no_grad():
        whole, _ = model(x, return_state=True)
        y, state = step(x[:, :4], None)
        outputs = [y]
        for i in range(4, L):
            y, state = step(x[:, i : i + 1], state)
            outputs.append(y)
    assert_close(torch.cat(outputs, 1), whole)
    assert state.position == L
