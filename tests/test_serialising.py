"""Copied, pickled and saved models and states go on as the originals would."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from fast_transformers import ops
from fast_transformers.feature_maps import (
    ActivationFunctionFeatureMap,
    RandomFeatureMap,
    build_feature_map,
    draw,
    features_of,
)
from fast_transformers.masking import TriangularCausalMask
from tests.maps import ALL
from tests.models import MODELS, SMALL
from tests.support import make_qkv

N, L, D = 2, 5, 10
MAPS = {**ALL, "relu": ActivationFunctionFeatureMap.factory(torch.relu)}
SIZES = {**SMALL, "query_dimensions": 8, "dropout": 0.0}


def saved(thing, weights_only: bool = False):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": saved,
}


def build(make, name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    causal = "linear" if "Recurrent" in make.__name__ else "causal-linear"
    types = {
        option: "linear" if "cross" in option else causal
        for option in make.options() if option.endswith("attention_type")
    }  # fmt: skip
    model = make.from_kwargs(feature_map=MAPS[name], **types, **SIZES).get()
    for parameter in model.parameters():  # norms start alike
        nn.init.normal_(parameter, std=0.3)
    return model


def run(model: nn.Module) -> list[Tensor]:
    """Outputs and input gradients; a recurrent model token by token."""
    generator = torch.Generator().manual_seed(1)
    x, memory = (torch.randn(N, L, D, generator=generator).requires_grad_() for _ in range(2))
    rest = (memory,) if hasattr(model.layers[0], "cross_attention") else ()
    if "Recurrent" in type(model).__name__:
        outputs, state = [], None
        for i in range(L):
            y, state = model(x[:, i], *rest, state=state)
            outputs.append(y)
        y = torch.stack(outputs, 1)
    else:
        y = model(x, *rest, TriangularCausalMask(L))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *rest))]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def pointers(model: nn.Module) -> set[int]:
    return {t.data_ptr() for t in (*model.parameters(), *model.buffers())}


def omegas(model: nn.Module) -> list[Tensor]:
    return [b.clone() for name, b in model.named_buffers() if name.endswith("omega")]


@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("make", MODELS)
def test_a_duplicate_goes_on_as_the_original(make, name, duplicate) -> None:
    """In training, from the middle of a schedule of redraws, and then in evaluation."""
    model = build(make, name)
    for _ in range(2):
        run(model)
    copied = DUPLICATES[duplicate](model)
    before = omegas(model)
    assert not pointers(model) & pointers(copied)
    for _ in range(2):
        expected = run(model)
        torch.manual_seed(7)  # draws do not depend on it
        assert_same(run(copied), expected)
    redrawn = [not torch.equal(a, b) for a, b in zip(before, omegas(model), strict=True)]
    assert bool(redrawn) == (name not in ("elu", "relu", "asymmetric"))
    # a live recurrent state would lose its meaning
    assert all(drawn == ("Recurrent" not in make.__name__) for drawn in redrawn)
    assert_same(run(copied.eval()), run(model.eval()))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("make", MODELS)
def test_the_state_dict_is_all_that_evaluation_needs(make, name) -> None:
    """Loaded by ``weights_only`` into a model of another seed, after redraws in training."""
    model, other = build(make, name), build(make, name, seed=1)
    for _ in range(2):
        run(model)
    expected = run(model.eval())
    before = run(other.eval())[0]
    other.load_state_dict(saved(model.state_dict(), weights_only=True))
    assert not torch.equal(before, expected[0])
    assert_same(run(other), expected)
    assert not pointers(model) & pointers(other)


@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize("name", MAPS)
def test_a_duplicated_map_draws_on_its_own(name, duplicate) -> None:
    feature_map = build_feature_map(MAPS[name], 8)
    x = torch.randn(3, 8)
    for _ in range(2):
        draw(feature_map, x.device)
    copied = DUPLICATES[duplicate](feature_map)
    first = feature_map.forward_keys(x)
    assert torch.equal(copied.forward_keys(x), first)
    draw(copied, x.device)
    assert torch.equal(feature_map.forward_keys(x), first)  # does not follow the copy
    if isinstance(feature_map, RandomFeatureMap):
        assert not torch.equal(copied.forward_keys(x), first)
    draw(feature_map, x.device)
    assert torch.equal(copied.forward_keys(x), feature_map.forward_keys(x))


@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize("name", MAPS)
def test_a_duplicated_state_goes_on(name, duplicate) -> None:
    """One that whole sequences gave, through both forms; it shares nothing with the original."""
    features = features_of(build_feature_map(MAPS[name], 8).eval().requires_grad_(False))
    q, k, v = make_qkv(9)
    state = ops.causal_linear_attention(q[:, :6], k[:, :6], v[:, :6], features).state
    copied = DUPLICATES[duplicate](state)
    assert type(copied) is ops.LinearState
    for key, tensor in vars(state).items():
        if tensor is None:
            assert getattr(copied, key) is None
        else:
            assert torch.equal(getattr(copied, key), tensor)
            assert getattr(copied, key).data_ptr() != tensor.data_ptr()
    one, other = (
        ops.causal_linear_attention(q[:, 6:], k[:, 6:], v[:, 6:], features, state=s)
        for s in (state, copied)
    )
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.state.kv, other.state.kv)
    one, other = (
        ops.linear_attention_step(q[:, 6], k[:, 6], v[:, 6], features, state=s)
        for s in (state, copied)
    )
    assert torch.equal(one.values, other.values)


def test_a_state_as_plain_tensors_needs_no_pickle() -> None:
    """For files that ``weights_only`` reads: the three tensors, and the state made of them."""
    features = features_of(build_feature_map(MAPS["favor"], 8).eval())
    q, k, v = make_qkv(6)
    with torch.no_grad():
        state = ops.causal_linear_attention(q[:, :5], k[:, :5], v[:, :5], features).state
        loaded = ops.LinearState(**saved(vars(state), weights_only=True))
        one, other = (
            ops.linear_attention_step(q[:, 5], k[:, 5], v[:, 5], features, state=s).values
            for s in (state, loaded)
        )
    assert torch.equal(one, other)
