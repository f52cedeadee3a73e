"""One state between all forms; sequences split anywhere."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fast_transformers import ops
from fast_transformers.feature_maps import Favor, features_of
from tests.support import exponential_features, make_qkv, positive_features

FEATURES = {
    "positive": positive_features(),
    "exponential": exponential_features(),
    "favor": features_of(Favor(8, n_dims=16, generator=0).eval()),
}
IMPLS = ["chunked", "reference", "recurrent"]
close = {"rtol": 1e-10, "atol": 1e-10}


def assert_same_state(a: ops.LinearState, b: ops.LinearState) -> None:
    """Equal as true sums, whatever the shifts."""
    torch.testing.assert_close(a.kv / a.z[..., None], b.kv / b.z[..., None], **close)
    logs = [s.z.log() + (0 if s.shift is None else s.shift * math.log(2)) for s in (a, b)]
    torch.testing.assert_close(*logs, **close)


@pytest.mark.parametrize("second", IMPLS)
@pytest.mark.parametrize("first", IMPLS)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("causal", [True, False])
def test_a_state_of_any_form_continues_any_other(causal, features, first, second) -> None:
    function = ops.causal_linear_attention if causal else ops.linear_attention
    phi = FEATURES[features]
    q, k, v = make_qkv(40, dtype=torch.float64)
    whole = function(q, k, v, phi)
    start = function(q[:, :17], k[:, :17], v[:, :17], phi, impl=first)
    rest = function(q[:, 17:], k[:, 17:], v[:, 17:], phi, state=start.state, impl=second)
    torch.testing.assert_close(rest.values, whole.values[:, 17:], **close)
    assert_same_state(rest.state, whole.state)


@pytest.mark.parametrize("heads", [8, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_keys_that_leave_the_shift_as_it_is(causal: bool, heads: int) -> None:
    """Then the sums are kept where they are, in a tile of some heads or of all."""
    function = ops.causal_linear_attention if causal else ops.linear_attention
    q, k, v = make_qkv(600, dtype=torch.float64, H=heads)
    phi = FEATURES["exponential"]
    state = function(q, k, v, phi).state
    found, exact = (function(q, k, v, phi, state=state, impl=x) for x in ("chunked", "reference"))
    torch.testing.assert_close(found.values, exact.values, **close)
    assert_same_state(found.state, exact.state)


@pytest.mark.parametrize("causal", [True, False])
def test_a_state_of_any_strides(causal: bool) -> None:
    """It is read where it lies, and its gradients are complete."""
    function = ops.causal_linear_attention if causal else ops.linear_attention
    q, k, v = make_qkv(40, dtype=torch.float64)
    phi = FEATURES["positive"]
    _, (kv, z) = function(q, k, v, phi)
    given = [kv, z], [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (kv, z)]
    found = []
    for tensors in given:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, final = function(q, k, v, phi, state=ops.LinearState(*leaves, None))
        loss = out.square().sum() + final.kv.sum() + final.z.sum()
        found.append([out, *final, *torch.autograd.grad(loss, leaves)])
    assert not given[1][0].is_contiguous()
    torch.testing.assert_close(*found, **close)
    torch.testing.assert_close(*given, rtol=0, atol=0)  # and it is left as it was


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 50), max_size=4),
    chunk_size=st.integers(1, 70),
    features=st.sampled_from(sorted(FEATURES)),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_splits_and_chunk_sizes_change_nothing(cuts, chunk_size, features, causal, seed) -> None:
    function = ops.causal_linear_attention if causal else ops.linear_attention
    phi = FEATURES[features]
    q, k, v = make_qkv(50, dtype=torch.float64, seed=seed, std=2.0)
    whole = function(q, k, v, phi)
    edges = [0, *sorted(cuts), 50]
    state, parts = None, []
    for lo, hi in itertools.pairwise(edges):
        part = function(
            q[:, lo:hi], k[:, lo:hi], v[:, lo:hi], phi, state=state, chunk_size=chunk_size
        )
        parts, state = [*parts, part.values], part.state
    if causal:
        torch.testing.assert_close(torch.cat(parts, 1), whole.values, **close)
    assert_same_state(state, whole.state)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), features=st.sampled_from(sorted(FEATURES)))
def test_rows_of_a_batch_do_not_see_each_other(order, features) -> None:
    q, k, v = make_qkv(20, N=4, dtype=torch.float64)
    q, k = q * torch.tensor([0.1, 1, 3, 10])[:, None, None, None], k * 3
    mask = torch.arange(20) < torch.tensor([[20], [1], [7], [0]])
    rows = torch.tensor(order)
    a = ops.causal_linear_attention(q, k, v, FEATURES[features], key_mask=mask).values
    b = ops.causal_linear_attention(
        q[rows], k[rows], v[rows], FEATURES[features], key_mask=mask[rows]
    ).values
    torch.testing.assert_close(b, a[rows], rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(log_scale=st.floats(-300, 300), causal=st.booleans())
def test_scaling_all_key_features_changes_nothing(log_scale, causal) -> None:
    function = ops.causal_linear_attention if causal else ops.linear_attention
    q, k, v = make_qkv(30, dtype=torch.float64)
    phi = FEATURES["exponential"]
    scaled = phi._replace(keys=lambda x: phi.keys(x) + log_scale)
    torch.testing.assert_close(
        function(q, k, v, scaled).values, function(q, k, v, phi).values, **close
    )
    plain = FEATURES["positive"]
    scaled = plain._replace(keys=lambda x: plain.keys(x) * 10 ** (log_scale / 3))
    a, b = (function(q, k, v, phi, eps=0.0).values for phi in (scaled, plain))
    torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_flow_through_the_state(causal, features) -> None:
    """Truncated back-propagation that is not truncated is the whole gradient."""
    function = ops.causal_linear_attention if causal else ops.linear_attention
    w = torch.randn(2, 30, 3, 5, dtype=torch.float64)
    gradients = []
    for impl in ("reference", "chunked"):
        leaves = [x.requires_grad_() for x in make_qkv(30, dtype=torch.float64, std=2.0)]
        state, loss, start = None, 0, 0
        for q, k, v in zip(*(x.split([11, 19], 1) for x in leaves), strict=True):
            values, state = function(q, k, v, FEATURES[features], state=state, impl=impl)
            loss = loss + (values * w[:, start : start + q.shape[1]]).sum()
            start += q.shape[1]
        gradients.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("features", FEATURES)
def test_a_state_is_a_value(features) -> None:
    q, k, v = (x[:, 0] for x in make_qkv(1))
    start = ops.linear_attention_step(q, k, v, FEATURES[features])
    before = start.state.map(torch.clone)
    results = [
        ops.linear_attention_step(q, 2 * k, v, FEATURES[features], state=start.state).values
        for _ in range(2)
    ]
    assert torch.equal(*results)
    assert torch.equal(start.state.kv, before.kv)
    assert torch.equal(start.state.z, before.z)


@pytest.mark.parametrize("inplace", [False, True])
def test_steps_of_favor_whether_or_not_the_shift_stays(inplace: bool) -> None:
    features = features_of(Favor(8, n_dims=24, generator=0))
    q, k, v = make_qkv(40, dtype=torch.float64)
    k = k * torch.arange(40, 0, -1)[:, None, None] / 8  # features of smaller keys are larger
    whole = ops.causal_linear_attention(q, k, v, features, impl="reference")
    state, values, stays = None, [], []
    for token in zip(*(x.unbind(1) for x in (q, k, v)), strict=True):
        before = None if state is None else state.map(Tensor.clone)
        out, after = ops.linear_attention_step(*token, features, state=state, inplace=inplace)
        if before is not None:
            assert (after is state) == inplace
            stays.append(torch.equal(after.shift, before.shift))
            if not inplace:
                assert torch.equal(state.kv, before.kv)
                assert torch.equal(state.shift, before.shift)
        state = after
        values.append(out)
    assert set(stays) == {True, False}
    torch.testing.assert_close(torch.stack(values, 1), whole.values, **close)
    assert_same_state(state, whole.state)


@pytest.mark.parametrize("features", FEATURES)
def test_the_older_pair_goes_in_and_comes_out(features) -> None:
    q, k, v = (x[:, 0] for x in make_qkv(2, dtype=torch.float64))
    phi = FEATURES[features]
    state = ops.linear_attention_step(q, k, v, phi).state
    S, Z = state
    assert len(state) == 2
    assert torch.equal(state[0], S)
    factor = 1 if state.shift is None else state.shift.exp2()
    torch.testing.assert_close(Z, factor * state.z, **close)
    a = ops.linear_attention_step(q, k, v, phi, state=[S, Z]).values
    b = ops.linear_attention_step(q, k, v, phi, state=state).values
    torch.testing.assert_close(a, b, **close)


def test_reorder_and_size() -> None:
    q, k, v = make_qkv(3)
    state = ops.causal_linear_attention(q, k, v, FEATURES["exponential"]).state
    swapped = state.reorder(torch.tensor([1, 0]))
    for name in ("kv", "z", "shift"):
        assert torch.equal(getattr(swapped, name)[0], getattr(state, name)[1])
    assert state.nbytes == 4 * 2 * 3 * 24 * (5 + 1 + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_state_is_float32(dtype) -> None:
    q, k, v = make_qkv(3, dtype=dtype)
    for impl in IMPLS:
        out, state = ops.causal_linear_attention(q, k, v, FEATURES["positive"], impl=impl)
        assert (out.dtype, state.kv.dtype, state.z.dtype) == (dtype, torch.float32, torch.float32)


def test_autocast_does_not_reach_the_backward_pass() -> None:
    gradients = []
    for enabled in (False, True):
        leaves = [x.requires_grad_() for x in make_qkv(65)]
        for function in (ops.linear_attention, ops.causal_linear_attention):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                function(*leaves, FEATURES["exponential"]).values.square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for plain, cast in zip(*gradients, strict=True):
        torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_autocast_does_not_reach_the_sums() -> None:
    q, k, v = make_qkv(65, dtype=torch.bfloat16)
    plain = ops.causal_linear_attention(q, k, v, FEATURES["positive"])
    with torch.autocast("cpu", torch.bfloat16):
        cast = ops.causal_linear_attention(q, k, v, FEATURES["positive"])
    assert torch.equal(plain.values, cast.values)
    assert cast.state.kv.dtype == torch.float32
