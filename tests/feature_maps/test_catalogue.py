"""Every map in all attentions, at any norm, copied, saved and compiled; and what each says of
itself."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fast_transformers import ops
from fast_transformers.attention import CausalLinearAttention, LinearAttention
from fast_transformers.feature_maps import (
    PROJECTIONS,
    RandomFeatureMap,
    features_of,
    with_positions,
)
from fast_transformers.masking import FullMask, LengthMask, TriangularCausalMask
from fast_transformers.recurrent.attention import (
    RecurrentCrossLinearAttention,
    RecurrentLinearAttention,
)
from fast_transformers.utils import make_mirror
from tests.maps import ALL, BUILT_IN, CATALOGUE, PROJECTED
from tests.support import make_qkv

# dynamo itself makes an instance of an autograd function
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
E = 8
EVERY = {**BUILT_IN, **CATALOGUE}
every_map = pytest.mark.parametrize("name", CATALOGUE)
DRAWN = {**EVERY, **PROJECTED}
every_draw = pytest.mark.parametrize("name", DRAWN)
RANDOM = {
    *(
        "favor",
        "rff",
        "smoothed",
        "generalized",
        "sderf",
        "saderf",
        "aderf",
        "concat exponentials",
    ),
    *("polysketch", "polysketch, simplex", "polysketch, degree 8", "oprf", "oprf, heads"),
    "oprf, learned",
    *("aligned", "aligned, heads", "normalized exponentials", "normalized inputs"),
    *("projected, heads", "centered", "centered aligned", "cos of exponentials"),
    "concat exponentials",
}
TRAINED = {
    *("oprf, learned", "projected, of a user's"),
    *("lln, heads", "rebased", "rebased, tied", "t2r", "t2r, heads", "hedgehog"),
    *("hedgehog, joint", "hedgehog, heads", "projected", "projected, heads", "centered taylor"),
}
UNKNOWN = {"projected, of a user's"}  # whether weights may be below 0
SIGNED = {"rff", "taylor, first order", "normalized inputs"}  # weights below 0


def inputs(length: int, keys: int | None = None, **options) -> list[Tensor]:
    return make_qkv(length, keys, H=2, E=E, **options)


def attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    causal = isinstance(attention, CausalLinearAttention)
    mask = TriangularCausalMask(q.shape[1]) if causal else FullMask(q.shape[1], k.shape[1])
    keep = LengthMask(lengths, max_len=k.shape[1])
    return attention(q, k, v, mask, LengthMask(lengths, max_len=q.shape[1]), keep)


@every_draw
def test_steps_are_the_sequence(name: str) -> None:
    batch = CausalLinearAttention(E, DRAWN[name]).double().eval()
    steps = RecurrentLinearAttention(E, DRAWN[name]).double().eval()
    make_mirror(batch, steps)
    q, k, v = inputs(17, std=0.7, dtype=torch.float64)
    whole = attend(batch, q, k, v, torch.tensor([17, 17]))
    state = None
    for i in range(17):
        y, state = steps(q[:, i], k[:, i], v[:, i], state)
        torch.testing.assert_close(y, whole[:, i], rtol=1e-8, atol=1e-8)


@every_draw
def test_queries_of_a_memory_one_by_one(name: str) -> None:
    batch = LinearAttention(E, DRAWN[name]).double().eval()
    steps = RecurrentCrossLinearAttention(E, DRAWN[name]).double().eval()
    make_mirror(batch, steps)
    q, k, v = inputs(5, 11, std=0.7, dtype=torch.float64)
    lengths = LengthMask(torch.tensor([11, 6]))
    whole = batch(q, k, v, FullMask(5, 11), LengthMask(torch.tensor([5, 5])), lengths)
    state = None
    for i in range(5):
        y, state = steps(q[:, i], k, v, lengths, state)
        torch.testing.assert_close(y, whole[:, i], rtol=1e-8, atol=1e-8)


@every_map
@pytest.mark.parametrize("attention", [LinearAttention, CausalLinearAttention])
def test_padding_changes_nothing(name: str, attention: type[nn.Module]) -> None:
    module = attention(E, CATALOGUE[name]).double().eval()
    q, k, v = inputs(12, std=0.7, dtype=torch.float64)
    short = attend(module, *(x[:, :7] for x in (q, k, v)), torch.tensor([7, 7]))
    k[:, 7:] = v[:, 7:] = torch.nan
    padded = attend(module, q, k, v, torch.tensor([7, 7]))
    torch.testing.assert_close(padded[:, :7], short)


@every_map
def test_any_norm(name: str) -> None:
    """Finite at 30 standard deviations in float32, with finite gradients; and exact there, for
    maps that give logarithms, by the evaluation in float64."""
    module = CausalLinearAttention(E, CATALOGUE[name]).eval()
    exact = copy.deepcopy(module).double()
    leaves = [x.requires_grad_() for x in inputs(21, std=30.0)]
    found = attend(module, *leaves, torch.tensor([21, 21]))
    gradients = torch.autograd.grad(found.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (found, *gradients))
    expected = attend(exact, *(x.detach().double() for x in leaves), torch.tensor([21, 21]))
    if module.feature_map.exponential:
        q, k = (with_positions(module.feature_map, x) for x in leaves[:2])
        features = features_of(module.feature_map)
        logs = features.queries(q), features.keys(k)
        size = max(float(x.detach().abs().max()) for x in logs)
        error = (found.double() - expected).detach().abs().max()
        assert error < 64 * size * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_map
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Inputs and weights of half precision, sums of float32: close to float64 of the same."""
    module = LinearAttention(E, CATALOGUE[name]).eval().to(dtype)
    exact = copy.deepcopy(module).double()
    qkv = inputs(9, std=0.5, dtype=dtype)
    found = attend(module, *qkv, torch.tensor([9, 9]))
    expected = attend(exact, *(x.double() for x in qkv), torch.tensor([9, 9]))
    assert found.dtype == dtype
    tolerance = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@every_map
def test_copies_pickles_and_checkpoints(name: str) -> None:
    first = CATALOGUE[name](E)
    q, k, _ = inputs(6)
    first.calibrate(q, k)
    others = [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), CATALOGUE[name](E)]
    others[-1].load_state_dict(first.state_dict())
    x = with_positions(first, q)
    for other in others:
        torch.testing.assert_close(other.forward_queries(x), first.forward_queries(x))
        torch.testing.assert_close(other.forward_keys(x), first.forward_keys(x))
    for _ in range(3):
        for other in (first, *others[:2]):
            other.new_feature_map(torch.device("cpu"))
    for other in others[:2]:
        assert torch.equal(other.forward_keys(x), first.forward_keys(x))


@every_map
def test_one_graph_with_gradients(name: str) -> None:
    """torch.compile of a training step, and the draws that follow, for two lengths."""
    torch._dynamo.reset()
    module = CausalLinearAttention(E, CATALOGUE[name])
    twin = copy.deepcopy(module)

    def loss(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = TriangularCausalMask(q.shape[1])
        return module(q, k, v, mask, None, None).square().mean()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for length in (9, 33, 20):
        qkv = inputs(length, std=0.5)
        values = compiled(module, *qkv), loss(twin, *qkv)
        torch.testing.assert_close(*values)
        if TRAINED & {name}:
            for value in values:
                value.backward()
        for a, b in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 2
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EVERY)
def test_what_a_map_says_of_itself(name: str) -> None:
    feature_map = EVERY[name](E)
    assert feature_map.random == (name in RANDOM)
    assert feature_map.trainable == (name in TRAINED)
    assert feature_map.causal_safe
    assert feature_map.positive == (name not in SIGNED | UNKNOWN)
    q, k, _ = inputs(40, std=2.0)
    q, k = (with_positions(feature_map, x) for x in (q, k))
    phi, psi = feature_map.forward_queries(q), feature_map.forward_keys(k)
    assert phi.shape[-1] == feature_map.feature_dims
    weights = torch.einsum("nlhf,nshf->nhls", phi.double(), psi.double())
    rounding = 1e-6 * phi.norm(dim=-1).max() * psi.norm(dim=-1).max()
    assert bool((weights >= -rounding).all()) == (name not in SIGNED)
    before = phi
    if feature_map.random:
        for _ in range(2):
            feature_map.new_feature_map(torch.device("cpu"))
        assert not torch.equal(feature_map.forward_queries(q), before)
    else:
        if name in UNKNOWN:
            return
        variance = feature_map.relative_variance(q, k)
        assert variance.shape == q.shape[:-1]
        assert not variance.any()


@pytest.mark.parametrize("name", EVERY)
def test_calibration_changes_what_has_statistics(name: str) -> None:
    feature_map = EVERY[name](E)
    before = copy.deepcopy(feature_map.state_dict())
    q, k, _ = inputs(40, std=2.0)
    feature_map.calibrate(q + 1, k)
    after = feature_map.state_dict()
    changed = not all(torch.equal(before[key], after[key]) for key in before)
    assert feature_map.has_statistics == changed


@pytest.mark.parametrize("name", EVERY)
def test_logarithms_are_those_of_the_features(name: str) -> None:
    feature_map = EVERY[name](E).double()
    if not feature_map.exponential:
        return
    q, k, _ = inputs(5, dtype=torch.float64)
    q, k = (with_positions(feature_map, x) for x in (q, k))
    logs = feature_map.log_queries(q) + feature_map.query_offset(q)
    torch.testing.assert_close(logs.exp(), feature_map.forward_queries(q))
    torch.testing.assert_close(feature_map.log_keys(k).exp(), feature_map.forward_keys(k))


def test_every_random_map_is_drawn_in_every_way() -> None:
    from fast_transformers import feature_maps

    classes = [value for value in vars(feature_maps).values() if isinstance(value, type)]
    random = {c for c in classes if issubclass(c, RandomFeatureMap)} - {RandomFeatureMap}
    drawn = {(type(m), m.projection) for m in (make(E) for make in PROJECTED.values())}
    assert drawn == set(itertools.product(random, PROJECTIONS))


def test_the_lists_are_complete() -> None:
    """Every name that the library exports is in one of the lists, but for the interface."""
    from fast_transformers import feature_maps

    classes = {
        value
        for value in vars(feature_maps).values()
        if isinstance(value, type) and issubclass(value, feature_maps.FeatureMap)
    }
    made = {type(m) for factory in ALL.values() for m in factory(E).modules()}
    made |= {type(m) for factory in CATALOGUE.values() for m in factory(E).modules()}
    assert classes - made == {feature_maps.FeatureMap, feature_maps.RandomFeatureMap}


def test_grouped_queries_need_no_heads() -> None:
    """Two query heads to each key head, for a map that treats all heads alike."""
    q, k, v = inputs(7)
    features = features_of(CATALOGUE["hedgehog"](E))
    out = ops.causal_linear_attention(q, k[:, :, :1], v[:, :, :1], features).values
    both = (x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v))
    torch.testing.assert_close(out, ops.causal_linear_attention(q, *both, features).values)
