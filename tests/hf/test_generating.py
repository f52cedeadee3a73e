"""``generate`` in its modes, with the state of the library as its cache."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad
from transformers.generation.streamers import BaseStreamer

from fast_transformers import stepper
from fast_transformers.hf import RecurrentState
from tests.hf.test_modeling import every_kind, make, prompts


@pytest.fixture(params=["plain", "steps"], autouse=True)
def steps(request, monkeypatch):
    """With states that are values, and with what a GPU does: the loop's own, written over."""
    if request.param == "steps":
        monkeypatch.setattr(stepper, "DEVICES", ("cpu",))
        monkeypatch.setattr(stepper, "record", lambda call, device: call)


GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def padded(side, lengths=(5, 2, 4)):
    """Prompts of different lengths, padded with a token that means something, and the mask."""
    rows = [prompts()[i, :n] for i, n in enumerate(lengths)]
    widths = [(5 - n, 0) if side == "left" else (0, 5 - n) for n in lengths]
    pairs = list(zip(rows, widths, strict=True))
    tokens = torch.stack([pad(row, width, value=7) for row, width in pairs])
    mask = torch.stack([pad(torch.ones_like(row), width) for row, width in pairs])
    return rows, tokens, mask


@every_kind
@pytest.mark.parametrize("beams", [1, 3])
def test_unequal_prompts(kind, beams):
    model = make(**kind)
    rows, tokens, mask = padded("left")
    options = {**GREEDY, "num_beams": beams}
    together = model.generate(tokens, attention_mask=mask, **options)[:, 5:]
    for row, out in zip(rows, together, strict=True):
        assert torch.equal(model.generate(row[None], **options)[0, len(row) :], out)
    without = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(without[:, 5:], together)


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_state_of_padded_prompts_goes_on(kind, side):
    """Called by hand: prompt, a chunk, single tokens."""
    model, more = make(**kind), prompts(3, 4) + 1
    rows, tokens, mask = padded(side)
    more = more % 30
    cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
    assert cache.get_seq_length() == 5
    assert cache.state.positions.tolist() == [5, 2, 4]
    kept = cache.state
    logits = [model(more[:, :2], past_key_values=cache).logits]
    longer = torch.cat([mask, torch.ones(3, 3, dtype=mask.dtype)], 1)
    logits += [
        model(more[:, 2:3], attention_mask=longer, past_key_values=cache).logits,
        model(more[:, 3:], past_key_values=cache).logits,
    ]
    logits = torch.cat(logits, 1)
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, more[i]])[None]).logits[0, len(row) :]
        torch.testing.assert_close(logits[i], alone, atol=2e-4, rtol=1e-4)
    again = model(more, past_key_values=RecurrentState(kept, 5)).logits
    torch.testing.assert_close(again, logits, atol=2e-4, rtol=1e-4)


@every_kind
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_chunked_prefill(kind, size):
    model = make(**kind)
    _, tokens, mask = padded("left")
    options = {**GREEDY, "attention_mask": mask}
    expected = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=size, **options), expected)


def test_a_conversation_goes_on():
    """The cache of one call of ``generate`` serves the next."""
    model = make()
    first = model.generate(prompts(), return_dict_in_generate=True, **GREEDY)
    turn = torch.cat([first.sequences, prompts(3, 2)], 1)
    cache = first.past_key_values
    assert cache.get_seq_length() == 16  # the last token has not been read
    assert (cache.stepper is not None) == bool(stepper.DEVICES == ("cpu",))
    second = model.generate(turn, past_key_values=cache, **GREEDY)
    assert torch.equal(second, model.generate(turn, use_cache=False, **GREEDY))


def test_streamers_get_every_token():
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, collect = make(attention="full"), Collect()
    out = model.generate(prompts(1), streamer=collect, **GREEDY)
    assert collect.tokens == out[0].tolist()
    assert collect.ended


def test_sampling_of_several_continuations():
    model, drawn = make(rotary=True), []
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8}
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(model.generate(prompts(), max_new_tokens=8, use_cache=use_cache, **options))
    assert drawn[0].shape == (9, 13)
    assert torch.equal(*drawn)


def test_what_a_state_cannot_do_says_so():
    model = make()
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(prompts(1), prompt_lookup_num_tokens=2, **GREEDY)


def test_end_tokens_stop_sequences():
    model = make()
    free = model.generate(prompts(), **GREEDY)
    end = int(free[0, 7])
    stopped = model.generate(prompts(), eos_token_id=end, **GREEDY)
    assert torch.equal(stopped[0, :8], free[0, :8])
    assert not stopped[0, 8:].any()
    for row, whole in zip(stopped, free, strict=True):
        until = len(row) if end not in row[5:] else 5 + row[5:].tolist().index(end)
        assert torch.equal(row[:until], whole[:until])
