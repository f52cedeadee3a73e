"""What can be done with a state: picked, joined, split, moved, saved and loaded."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from fast_transformers.builders import TransformerDecoderBuilder
from fast_transformers.state import KeysValues, PositionState, State
from fast_transformers.state.files import FORMAT
from tests.test_streaming import MODELS, SIZES, L, N, encoder


@pytest.fixture
def x():
    return torch.randn(N, L, 12, dtype=torch.float64)


def ragged(model, x, lengths=(7, 1, 4)) -> State:
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    return model(x[:, :7], length_mask=mask, return_state=True)[1]


@pytest.mark.parametrize("name", MODELS)
def test_rows(name, x):
    model = encoder(name)
    for state in (model(x[:, :7], return_state=True)[1], ragged(model, x)):
        y, _ = model(x[:, 7:], state=state, return_state=True)
        assert state.batch_size == N
        order = torch.tensor([2, 0, 0, 1])
        again = state.reorder(order)
        assert again.positions.tolist() == state.positions[order].tolist()
        assert_close(model(x[order, 7:], state=again), y[order])
        for index in ([2, 1], slice(1, None), torch.tensor([False, True, True]), [-1], 0, []):
            at = torch.arange(N)[[index] if isinstance(index, int) else index].long()
            chosen = state.select(index)
            assert chosen.batch_size == len(at)
            assert_close(model(x[at, 7:], state=chosen), y[at])
        joined = State.join([state.select(2), *state.split([2, 1])])
        order = torch.tensor([2, 0, 1, 2])
        assert joined.positions.tolist() == state.positions[order].tolist()
        assert_close(model(x[order, 7:], state=joined), y[order])
        with pytest.raises(IndexError):
            state.select([3])
        with pytest.raises(ValueError, match="sizes must add up to the 3 sequences"):
            state.split([2, 2])
        assert len(state.split()) == N


@pytest.mark.parametrize("name", MODELS)
def test_sequences_of_any_age_join_and_leave(name, x):
    """Beyond the limit of conditional attention, too."""
    model = encoder(name)
    states = [model(x[:1, :n], return_state=True)[1] for n in (2, 9, 5)]
    joined = State.join(states)
    assert joined.positions.tolist() == [2, 9, 5]
    y, after = model(x[:, :9], state=joined, return_state=True)
    for i, state in enumerate(states):
        assert_close(y[i : i + 1], model(x[i : i + 1, :9], state=state))
    alone = after.select([1])
    assert alone.position == 18
    assert alone.nbytes <= after.nbytes / N
    more = model(x[1:2], state=model(x[1:2, :9], state=states[1], return_state=True)[1])
    assert_close(model(x[1:2], state=alone), more)


@pytest.mark.parametrize("cross", ["linear", "full", "conditional-full:linear"])
def test_rows_of_a_decoder(cross, x):
    """Memories of different lengths."""
    model = TransformerDecoderBuilder.from_kwargs(
        **SIZES, self_attention_type="causal-linear", cross_attention_type=cross
    ).get()  # fmt: skip
    model = model.double().eval()
    memories = [torch.randn(1, n, 12, dtype=torch.float64) for n in (3, 8, 5)]
    states = [
        model(x[i : i + 1, : i + 2], memory, return_state=True)[1]
        for i, memory in enumerate(memories)
    ]
    joined = State.join(states)
    y, after = model(x[:, 4:], None, state=joined, return_state=True)
    for i, memory in enumerate(memories):
        rows = slice(i, i + 1)
        assert_close(y[rows], model(x[rows, 4:], memory, state=states[i]))
        again = model(x[rows, 4:], None, state=after.select(i))
        assert_close(again, model(x[:, 4:], None, state=after)[rows])


def test_what_it_says_of_itself(x):
    model = encoder("hybrid", dtype=torch.float32)
    empty = State()
    assert (len(empty), empty.batch_size, empty.nbytes, empty.position) == (0, 0, 0, 0)
    _, state = model(x.float(), return_state=True)
    linear = N * 2 * 8 * (6 + 1) * 4
    caches = 2 * N * 2 * L * (8 + 6) * 4
    assert state.nbytes == linear + caches
    assert_close(state.positions, torch.full((N,), L))
    assert [type(layer) for layer in state] == [PositionState, KeysValues, PositionState]
    copied = copy.deepcopy(state.detach())
    y = model(x.float(), state=state)
    assert torch.equal(model(x.float(), state=copied), y)
    assert state.map(lambda t: t.double())[0].attention.kv.dtype == torch.float64
    clone = state.clone()
    assert clone[1].key_buffer.data_ptr() != state[1].key_buffer.data_ptr()
    assert clone[0].attention.kv.data_ptr() != state[0].attention.kv.data_ptr()
    with pytest.raises(TypeError, match=r"device must be a device, got torch\.float16"):
        state.to(torch.float16)
    meta = state.to("meta")
    assert meta[1].key_buffer.is_meta
    assert meta.position == L


def test_what_cannot_be_joined(x):
    full, linear = encoder("full"), encoder("causal-linear")
    states = [model(x, return_state=True)[1] for model in (full, linear, encoder("favor"))]
    for pair in ([states[0], states[1]], [states[1], states[2]]):
        with pytest.raises(ValueError, match="states must come from one model to be joined"):
            State.join(pair)
    wide = encoder("full")(x, return_state=True)[1].map(lambda t: t.repeat_interleave(2, -1))
    with pytest.raises(ValueError, match="states must come from one model"):
        State.join([states[0], wide])
    for nothing in ([], [State(), states[0]], [[1]]):
        with pytest.raises(ValueError, match="states must be a list of states that have seen"):
            State.join(nothing)


@pytest.mark.parametrize("name", MODELS)
def test_files(name, x, tmp_path):
    model, path = encoder(name), tmp_path / "state.safetensors"
    for state in (model(x[:, :7], return_state=True)[1], ragged(model, x)):
        with torch.no_grad():  # buffers with room, which is not saved
            _, state = model(x[:, 7:8], state=state, return_state=True)
        state.save(path)
        loaded = State.load(path)
        assert torch.equal(model(x, state=loaded), model(x, state=state))
        assert_close(loaded.positions, state.positions)
        assert repr(loaded.position) == repr(state.position)


def test_files_of_decoders(x, tmp_path):
    for cross in ("linear", "full", "conditional-full:linear"):
        model = TransformerDecoderBuilder.from_kwargs(
            **SIZES, self_attention_type="full", cross_attention_type=cross
        ).get()  # fmt: skip
        model = model.double().eval()
        _, state = model(x[:, :3], x, memory_length_mask=x[..., 0] > 0, return_state=True)
        state.save(tmp_path / "state")
        loaded = State.load(tmp_path / "state")
        assert_close(model(x, None, state=loaded), model(x, None, state=state))


def _hostile() -> dict[str, Any]:
    """Structures and tensors that are no state, by what is wrong with them."""
    kv, z = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3)
    linear = {"kind": "LinearState", "kv": "kv", "z": "z", "shift": None}
    cache = {"kind": "KeysValues", "keys": "kv", "values": "kv2", "lengths": "n"}
    tensors = {"kv": kv, "z": z}
    caches = {"kv": kv, "kv2": kv.clone()}
    deep: Any = linear
    for _ in range(5000):
        deep = [deep]
    return {
        "unknown kind": ({"layers": [{**linear, "kind": "os.system"}]}, tensors),
        "missing tensor": ({"layers": [linear]}, {"kv": kv}),
        "unused tensor": ({"layers": []}, tensors),
        "tensor twice": ({"layers": [linear, linear]}, tensors),
        "shapes": ({"layers": [linear]}, {"kv": kv, "z": z[:, :1].contiguous()}),
        "dtype": ({"layers": [linear]}, {"kv": kv.half(), "z": z.half()}),
        "rank": ({"layers": [linear]}, {"kv": kv[0].clone(), "z": z[0].clone()}),
        "field": ({"layers": [{**linear, "more": 1}]}, tensors),
        "count": ({"layers": [linear], "position": -1}, tensors),
        "truth": ({"layers": [linear], "position": True}, tensors),
        "float": ({"layers": [linear], "position": 0.5}, tensors),
        "number": ({"layers": [3]}, {}),
        "no list": ({"layers": linear}, tensors),
        "depth": ({"layers": deep}, tensors),
        "lengths": ({"layers": [cache]}, {**caches, "n": torch.tensor([1, 4])}),
        "negative": ({"layers": [cache]}, {**caches, "n": torch.tensor([1, -1])}),
        "rows": ({"layers": [linear], "position": "p"}, {**tensors, "p": torch.zeros(3).long()}),
        "swapped": ({"layers": [{"kind": "ConditionalState", "full": linear, "other": None,
                                 "length": 1}]}, tensors),
        "tensor as state": ({"layers": [{"kind": "PositionState", "attention": "kv",
                                         "position": 1}]}, {"kv": kv}),
        "names": ({"layers": [linear], "what": 1}, tensors),
    }  # fmt: skip


@pytest.mark.parametrize("wrong", _hostile())
def test_hostile_files(wrong, tmp_path):
    structure, tensors = _hostile()[wrong]
    try:
        text = json.dumps({"position": 1, **structure})
    except RecursionError:
        text = '{"position": 1, "layers": ' + "[" * 10**5 + "]" * 10**5 + "}"
    save_file(tensors, tmp_path / "state", metadata={"format": FORMAT, "structure": text})
    with pytest.raises(ValueError, match="is not the file of a state: "):
        State.load(tmp_path / "state")


def test_other_files(x, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match=r"no such file; State\.save writes one"):
        State.load(path)
    with pytest.raises(FileNotFoundError):
        State.load(tmp_path)
    save_file({"kv": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="its format is None, not 'fast_transformers"):
        State.load(path)
    contents = [b"", b"junk", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{" * 100]
    encoder("full")(x, return_state=True)[1].save(path)
    whole = path.read_bytes()
    for content in [*contents, whole[:-1], whole[: len(whole) // 2]]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not the file of a state"):
            State.load(path)
    torch.save({"kv": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not the file of a state"):
        State.load(path)
    with pytest.raises(ValueError, match=r"layers\.0 is a object, which no file"):
        State([object()], 1).save(path)
