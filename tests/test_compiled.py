"""Steps that torch.compile makes: the same results, fused products of a row, compiled seldom."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from torch.nn.functional import linear
from torch.testing import assert_close

from fast_transformers import compiled as module
from fast_transformers.builders import RecurrentDecoderBuilder
from fast_transformers.compiled import product
from fast_transformers.events import AttentionEvent, EventDispatcher
from fast_transformers.state import State
from fast_transformers.stepper import Stepper
from tests.test_stepper import FIXED
from tests.test_streaming import SIZES, L, N, S, twins


@pytest.fixture
def compiler(monkeypatch):
    """Compiles without kernels, which no compiler is needed for; the functions in each graph."""
    torch._dynamo.reset()
    graphs, real = [], module._compile

    def compile(graph, inputs):
        run = real(graph, inputs)
        graphs.append([node.target for node in graph.graph.nodes])
        return run

    monkeypatch.setattr(module, "_compile", compile)
    monkeypatch.setattr(module, "BACKEND", "aot_eager")
    monkeypatch.setattr("fast_transformers.stepper.why_not_compile", lambda device: None)
    return graphs


def tokens(n=N, length=L, dtype=torch.float64):
    return torch.randn(n, length, 12, dtype=dtype)


def check(recurrent, x, state, **options):
    """Compiled steps give what plain ones give; returns the stepper."""
    stepper = Stepper(recurrent, state, form="compiled", **options)
    for token in x.unbind(1):
        y, state = recurrent(token, state)
        assert_close(stepper(token), y)
    assert stepper.form == "compiled"
    assert stepper.state.position == state.position
    return stepper


@torch.no_grad()
@pytest.mark.parametrize("name", FIXED)
def test_equals_plain_steps(name, compiler):
    batch, recurrent = twins(name)
    x = tokens()
    _, state = batch(x[:, :4], return_state=True)
    stepper = check(recurrent, x[:, 4:], state)
    assert len(compiler) == 1  # for all tokens, and in one graph
    stepper.restart(state)
    assert_close(stepper(x[:, 4]), recurrent(x[:, 4], state)[0])
    assert len(compiler) == 1


@torch.no_grad()
@pytest.mark.parametrize("own", ["causal-linear", "full"])
@pytest.mark.parametrize("cross", ["linear", "full"])
def test_decoder(own, cross, compiler):
    options = {"self_attention_type": own, "cross_attention_type": cross, "rotary": True}
    decoder = RecurrentDecoderBuilder.from_kwargs(**SIZES, **options).get().double().eval()
    memory, x = torch.randn(N, S, 12, dtype=torch.float64), tokens()
    _, state = decoder(x[:, 0], memory, state=State())
    check(lambda token, state: decoder(token, None, state=state), x[:, 1:], state)
    assert len(compiler) == 1


@torch.no_grad()
def test_caches_that_grow_are_compiled_for_all_sizes(compiler):
    _, recurrent = twins("hybrid")
    x = tokens(2, 150)
    _, state = recurrent(x[:, 0], State())
    check(recurrent, x[:, 1:], state)
    assert len(compiler) == 2  # with room for 64, and for any number


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2])
def test_products_of_one_row(n, compiler):
    _, recurrent = twins("causal-linear")
    x = tokens(n)
    _, state = recurrent(x[:, 0], State())
    check(recurrent, x[:, 1:], state)
    (targets,) = compiler
    layers = sum(isinstance(part, torch.nn.Linear) for part in recurrent.modules())
    assert targets.count(product) == (layers if n == 1 else 0)
    assert targets.count(linear) == (0 if n == 1 else layers)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (1, 1, 12)])
@pytest.mark.parametrize("biased", [True, False])
def test_product(shape, biased):
    x, weight = torch.randn(shape), torch.randn(5, 12)
    bias = torch.randn(5) if biased else None
    assert_close(product(x, weight, bias), linear(x, weight, bias))


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++")
@torch.no_grad()
@pytest.mark.parametrize("name", ["causal-linear", "full"])
def test_kernels(name):
    _, recurrent = twins(name)
    recurrent, x = recurrent.float(), tokens(1, dtype=torch.float32)
    _, state = recurrent(x[:, 0], State())
    check(recurrent, x[:, 1:], state)


@torch.no_grad()
@pytest.mark.parametrize("name", ["causal-linear", "full"])
def test_graphs_of_compiled_kernels(name, compiler, monkeypatch):
    """On a CPU a replay calls the compiled step, on the buffers that a graph would have."""
    _, recurrent = twins(name)
    recorded, device = [], "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr("fast_transformers.stepper.DEVICES", ("cpu",))
        monkeypatch.setattr(
            "fast_transformers.stepper.record", lambda call, _: recorded.append(call) or call
        )
    x, recurrent = tokens().to(device), recurrent.to(device)
    _, state = recurrent(x[:, 0], State())
    stepper = Stepper(recurrent, state, form="compiled")
    for token in x[:, 1:].unbind(1):
        y, state = recurrent(token, state)
        assert_close(stepper(token), y)
    assert stepper.form == "graph of compiled kernels"
    assert len(recorded) == (device == "cpu")
    assert len(compiler) == 1


@torch.no_grad()
def test_says_why_it_cannot(compiler):
    _, recurrent = twins("causal-linear")
    x = tokens()
    _, state = recurrent(x[:, 0], State())
    stepper, dispatcher = Stepper(recurrent, state, form="compiled"), EventDispatcher.get()
    stepper(x[:, 1])
    dispatcher.listen(AttentionEvent, print)
    try:
        with pytest.raises(RuntimeError, match="no compiled step can be taken: somebody listens"):
            stepper(x[:, 2])
    finally:
        dispatcher.clear()
    stepper(x[:, 2])
    assert stepper.state.position == 3
    _, recurrent = twins("conditional-full:causal-linear")
    _, state = recurrent(x[:, 0], State())
    with pytest.raises(RuntimeError, match=r"no compiled step.*changes its form with the length"):
        Stepper(recurrent, state, form="compiled")(x[:, 1])


@torch.no_grad()
def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    _, recurrent = twins("causal-linear")
    x = tokens()
    _, state = recurrent(x[:, 0], State())
    reason = "there is no C++ compiler no-such-compiler"
    stepper = Stepper(recurrent, state, form="compiled")
    assert stepper.explain()["compiled"] == f"no: {reason}"
    with pytest.raises(RuntimeError, match=f"no compiled step can be taken: {re.escape(reason)}"):
        stepper(x[:, 1])
    assert module.why_not_compile("mps").startswith("the tensors are on a device of type mps")
