"""The forms in which ``generate`` of transformers takes its steps."""

from __future__ import annotations

import pytest
import torch

from fast_transformers import compiled, stepper
from fast_transformers.hf import FastTransformerForCausalLM, RecurrentState
from tests.hf.test_models import prompts, seq2seq, small

MODELS = {
    "linear": lambda: small(FastTransformerForCausalLM, feature_map="favor:n_dims=16"),
    "softmax": lambda: small(FastTransformerForCausalLM, attention="full", rotary=True),
    "encoder-decoder": seq2seq,
}
OPTIONS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def compilations(monkeypatch):
    """Compiled without kernels; one entry for each graph."""
    torch._dynamo.reset()
    made, real = [], compiled._compile

    def compile(graph, inputs):
        made.append(graph)
        return real(graph, inputs)

    monkeypatch.setattr(compiled, "_compile", compile)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(stepper, "why_not_compile", lambda device: None)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_compiled_steps(name, compilations):
    """The second generation finds what the first one compiled."""
    model = MODELS[name]()
    expected = model.generate(prompts(), **OPTIONS)
    for _ in range(2):
        cache = RecurrentState(form="compiled")
        assert torch.equal(model.generate(prompts(), past_key_values=cache, **OPTIONS), expected)
        assert cache.form == "compiled"
        assert len(compilations) == 1


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_graphs(name, beams, monkeypatch):
    """On a CPU a replay calls the step, on the buffers that a graph would have."""
    model, recorded = MODELS[name](), []
    expected = model.generate(prompts(), num_beams=beams, **OPTIONS)

    def record(call, device):
        recorded.append(device)
        return call

    monkeypatch.setattr(stepper, "DEVICES", ("cpu",))
    monkeypatch.setattr(stepper, "record", record)
    cache = RecurrentState()
    out = model.generate(prompts(), past_key_values=cache, num_beams=beams, **OPTIONS)
    assert torch.equal(out, expected)
    assert cache.form == "graph"
    assert len(recorded) == 1


def test_the_state_can_be_told_how():
    model = MODELS["linear"]()
    cache = RecurrentState(form="graph")
    with pytest.raises(RuntimeError, match="no graph step can be taken"):
        model.generate(prompts(), past_key_values=cache, **OPTIONS)
    cache = RecurrentState(form="plain")
    model.generate(prompts(), past_key_values=cache, **OPTIONS)
    assert cache.form == "plain"
