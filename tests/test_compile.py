"""torch.compile of whole models: one graph, the same results, no recompilation with the length."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fast_transformers.builders import (
    RecurrentDecoderBuilder,
    RecurrentEncoderBuilder,
    TransformerDecoderBuilder,
    TransformerEncoderBuilder,
)
from fast_transformers.feature_maps import ActivationFunctionFeatureMap
from fast_transformers.masking import LengthMask, TriangularCausalMask
from fast_transformers.specs import FEATURE_MAPS
from tests.maps import ALL, CATALOGUE

MAPS = {**ALL, "relu": ActivationFunctionFeatureMap.factory(torch.relu)}
# all the others that have a name
NAMED = {name: FEATURE_MAPS[name] for name in FEATURE_MAPS if name not in (*MAPS, "concat")}
TRAINED = {**MAPS, **NAMED, "concat": CATALOGUE["concat"]}
# dynamo itself makes an instance of an autograd function
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
NEEDS_A_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++")
SIZES: dict[str, Any] = {
    "n_layers": 1,
    "n_heads": 2,
    "query_dimensions": 8,
    "value_dimensions": 8,
    "feed_forward_dimensions": 32,
    "dropout": 0.0,
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compiled(
    function: Callable[..., Any], backend: str = "aot_eager"
) -> tuple[Callable[..., Any], Any]:
    """The function in one graph, and a counter of the graphs made."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize(
    ("attention", "name", "padded"),
    [
        *(("causal-linear", name, True) for name in TRAINED),
        *(("linear", name, False) for name in ("elu", "favor", "asymmetric")),
    ],
)
def test_training_step(attention: str, name: str, padded: bool) -> None:
    """Values, gradients, and the draws of random maps that follow."""
    model = TransformerEncoderBuilder.from_kwargs(
        **SIZES, attention_type=attention, feature_map=TRAINED[name]
    ).get()
    twin = copy.deepcopy(model)

    def loss(model: nn.Module, x: Tensor, lengths: Tensor | None) -> Tensor:
        length = x.shape[1]
        causal = TriangularCausalMask(length) if attention == "causal-linear" else None
        mask = None if lengths is None else LengthMask(lengths, max_len=length)
        return model(x, causal, mask).square().mean()

    in_one_graph, counter = compiled(loss)
    graphs = []
    for length in (37, 37, 200, 70):
        x = torch.randn(2, length, 16)
        lengths = torch.tensor([length // 2, length]) if padded else None
        values = [in_one_graph(model, x, lengths), loss(twin, x, lengths)]
        torch.testing.assert_close(*values)
        for value in values:
            value.backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
            a.grad = b.grad = None
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2]  # one for the first length, one for any
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("elu", "aot_eager"),
        ("asymmetric", "aot_eager"),
        pytest.param("favor", "inductor", marks=NEEDS_A_COMPILER),
    ],
)
def test_encoder_without_gradients(name: str, backend: str) -> None:
    model = TransformerEncoderBuilder.from_kwargs(
        **SIZES, attention_type="causal-linear", feature_map=MAPS[name]
    ).get()
    model.eval()
    in_one_graph, counter = compiled(lambda x: model(x, TriangularCausalMask(x.shape[1])), backend)
    with torch.no_grad():
        for length in (37, 300, 129, 2):
            x = torch.randn(2, length, 16)
            expected = model(x, TriangularCausalMask(length))
            torch.testing.assert_close(in_one_graph(x), expected)
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", MAPS)
def test_decoder(name: str) -> None:
    types = {"self_attention_type": "causal-linear", "cross_attention_type": "linear"}
    builder = TransformerDecoderBuilder.from_kwargs(**SIZES, **types, feature_map=MAPS[name])
    model = builder.get().eval()
    in_one_graph, counter = compiled(lambda x, m: model(x, m, TriangularCausalMask(x.shape[1])))
    with torch.no_grad():
        for length in (37, 200, 70):
            x, memory = torch.randn(2, length, 16), torch.randn(2, length + 5, 16)
            expected = model(x, memory, TriangularCausalMask(length))
            torch.testing.assert_close(in_one_graph(x, memory), expected)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("name", "decoder"), [*((name, True) for name in MAPS), ("elu", False), ("favor", False)]
)
def test_recurrent_step(name: str, decoder: bool) -> None:
    """The first step starts the state, all others share a graph."""
    types = {"attention_type": "causal-linear"}
    if decoder:
        types = {"self_attention_type": "causal-linear", "cross_attention_type": "linear"}
    builder = RecurrentDecoderBuilder if decoder else RecurrentEncoderBuilder
    model = builder.from_kwargs(**SIZES, **types, feature_map=MAPS[name]).get().eval()
    memory = [torch.randn(2, 9, 16)] if decoder else []
    in_one_graph, counter = compiled(lambda x, state: model(x, *memory, state=state))
    with torch.no_grad():
        states: list[Any] = [None, None]
        for _ in range(4):
            x = torch.randn(2, 16)
            y, states[0] = in_one_graph(x, states[0])
            expected, states[1] = model(x, *memory, state=states[1])
            torch.testing.assert_close(y, expected)
    assert counter.frame_count == 2
