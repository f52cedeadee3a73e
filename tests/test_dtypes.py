"""Whole models in every dtype and under autocast, against the same weights in float64."""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fast_transformers import ops
from fast_transformers.feature_maps import ActivationFunctionFeatureMap
from fast_transformers.masking import LengthMask, TriangularCausalMask
from tests.maps import ALL
from tests.models import MODELS
from tests.support import DTYPES, EPS_FP32, assert_as_accurate

N, L, S, D = 2, 9, 7, 12
MAPS = {**ALL, "relu": ActivationFunctionFeatureMap.factory(torch.relu)}
SIZES = {
    "n_layers": 2, "n_heads": 2, "query_dimensions": 8, "value_dimensions": 6,
    "feed_forward_dimensions": 16, "dropout": 0.0,
}  # fmt: skip


def build(make, name: str) -> nn.Module:
    causal = "linear" if "Recurrent" in make.__name__ else "causal-linear"
    types = {
        option: "linear" if "cross" in option else causal
        for option in make.options() if option.endswith("attention_type")
    }  # fmt: skip
    return make.from_kwargs(feature_map=MAPS[name], **types, **SIZES).get().eval()


def run(model: nn.Module, x: Tensor, memory: Tensor) -> tuple[Tensor, list[ops.LinearState]]:
    """Outputs of all tokens, and the states of all layers after the last if it has any."""
    decodes = hasattr(model.layers[0], "cross_attention")
    lengths = LengthMask(torch.tensor([S, 3]))
    if "Recurrent" not in type(model).__name__:
        masks = (TriangularCausalMask(L),)
        if decodes:
            return model(x, memory, *masks, memory_length_mask=lengths), []
        return model(x, *masks), []
    state, outputs = None, []
    for i in range(L):
        y, state = model(x[:, i], *((memory, lengths) if decodes else ()), state=state)
        outputs.append(y)
    return torch.stack(outputs, 1), [s for own in state for s in (own if decodes else [own])]


def weigh(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()


def attend(model: nn.Module, inputs, context) -> tuple[Tensor, list[Tensor], list]:
    """Outputs, gradients of the inputs, and states."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    with context():
        out, states = run(model, *inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    loss = (out.double() * weight).sum()
    return out.detach(), torch.autograd.grad(loss, inputs, materialize_grads=True), states


@pytest.mark.parametrize("dtype", [*DTYPES, "autocast-bfloat16", "autocast-float16"], ids=str)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("make", MODELS)
def test_models(make, name, dtype, monkeypatch) -> None:
    """Outputs within two roundings to the nearest in each sublayer: of its branch, of the sum.

    Everything between, the sums over the sequence above all, is float32 at least. Gradients are
    as accurate as those of the reference forms in the same model.
    """
    model, context = build(make, name), contextlib.nullcontext
    inputs = [torch.randn(N, L, D), torch.randn(N, S, D)]
    if isinstance(dtype, str):
        low, dtype = getattr(torch, dtype.removeprefix("autocast-")), torch.float32
        context = partial(torch.autocast, "cpu", low)
    else:
        low, model, inputs = dtype, model.to(dtype), [x.to(dtype) for x in inputs]
    out, gradients, states = attend(model, inputs, context)
    with monkeypatch.context() as patch:
        for function in ("linear_attention", "causal_linear_attention"):
            patch.setattr(ops, function, partial(getattr(ops, function), impl="reference"))
        _, plain, _ = attend(model, inputs, context)
        model = copy.deepcopy(model).double()  # the very same weights and features
        exact, true, _ = attend(model, [x.double() for x in inputs], contextlib.nullcontext)
    assert out.dtype == dtype  # under autocast that of the last norm
    assert out.isfinite().all()
    sublayers = 2 * (2 + hasattr(model.layers[0], "cross_attention"))
    noise = torch.finfo(dtype).eps if dtype == torch.float64 else EPS_FP32
    budget = (sublayers * torch.finfo(low).eps + 32 * noise) * exact.abs().max()
    assert (out.double() - exact).abs().max() <= budget
    for gradient, *others in zip(gradients, plain, true, strict=True):
        assert gradient.dtype == dtype
        assert_as_accurate(gradient, *others)
    sums = torch.promote_types(dtype, torch.float32)
    assert all(s.kv.dtype == s.z.dtype == sums for s in states)
    assert all(s.shift is None or s.shift.dtype == sums for s in states)
    assert bool(states) == ("Recurrent" in make.__name__)
