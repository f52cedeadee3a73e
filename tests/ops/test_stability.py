"""Favor at any norm: finite, and equal to the float64 evaluation of the same features."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fast_transformers import ops
from fast_transformers.feature_maps import Favor, features_of
from fast_transformers.ops.sums import Sums
from tests.support import assert_as_accurate, differentiate, make_qkv

FUNCTIONS = {"full": ops.linear_attention, "causal": ops.causal_linear_attention}


def favor() -> ops.Features:
    return features_of(Favor(64, n_dims=32, generator=3))


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("std", [1, 3, 10, 100])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_favor_is_exact_at_any_norm(kind, std, dtype, impl) -> None:
    function = FUNCTIONS[kind]
    inputs = make_qkv(131, N=1, H=2, E=64, M=8, std=std, dtype=dtype)
    features = favor()
    reference = partial(function, features=features, impl="reference")
    exact = differentiate(reference, [x.double() for x in inputs])
    plain = differentiate(reference, inputs)
    actual = differentiate(partial(function, features=features, impl=impl), inputs)
    logs = float(features.keys(inputs[1]).abs().max())
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_as_accurate(a, p, e, log_size=logs)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("order", ["rising", "falling", "spike"])
def test_keys_of_very_different_norms(order: str, kind: str) -> None:
    """A key that dwarfs its chunk must not take away the precision of the queries before it."""
    q, k, v = make_qkv(200, N=1, H=2, E=64, M=8, std=3)
    scale = torch.linspace(0.1, 6, 200)
    scale = {"rising": scale, "falling": scale.flip(0), "spike": torch.ones(200)}[order].clone()
    if order == "spike":
        scale[100] = 0.0  # exp(-|k|^2 / 2) of this key is greater by hundreds of nats
    k = k * scale[:, None, None]
    run = partial(differentiate, inputs=[q, k, v])
    features = favor()
    attend = partial(FUNCTIONS[kind], features=features)
    exact = differentiate(partial(attend, impl="reference"), [x.double() for x in (q, k, v)])
    plain = run(partial(attend, impl="reference"))
    logs = float(features.keys(k).abs().max())
    for chunk_size in (64, 256):
        actual = run(partial(attend, impl="chunked", chunk_size=chunk_size))
        for a, p, e in zip(actual, plain, exact, strict=True):
            assert_as_accurate(a, p, e, log_size=logs)


@pytest.mark.parametrize("queries", [0.01, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("keys", [0.01, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_sums_and_queries_in_and_out_of_range(kind, keys: float, queries: float) -> None:
    """Of features that are summed as they are, and those that are only so relative to others;
    from a state of either sort, some of whose blocks were of one sort and some of the other."""
    q, k, v = make_qkv(200, N=1, H=2, E=64, M=8)
    q, k = queries * q, keys * k
    k[:, 64:128] = k[:, 64:128] / keys * 3
    mask = torch.rand(1, 200, generator=torch.Generator().manual_seed(1)) > 0.2
    features = favor()
    found = {}
    for dtype, impl in (
        (torch.float64, "reference"),
        (torch.float32, "reference"),
        (torch.float32, "chunked"),
    ):
        inputs = [x.to(dtype) for x in (q, k, v)]
        attend = partial(FUNCTIONS[kind], features=features, impl=impl, chunk_size=64)
        first = attend(*inputs, key_mask=mask)
        more = attend(inputs[0], inputs[1].flip(3), inputs[2], state=first.state)
        found[dtype, impl] = first.values, more.values, attend(*inputs).values
    logs = max(float(features.keys(x).abs().max()) for x in (k, q))
    exact, plain, actual = found.values()
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_as_accurate(a, p, e, log_size=logs)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_features_in_range_need_no_shift(kind, monkeypatch) -> None:
    def enter(*_, **__):
        raise AssertionError

    monkeypatch.setattr(Sums, "enter", enter)
    attend, features = FUNCTIONS[kind], favor()
    q, k, v = make_qkv(700, N=1, H=2, E=64, M=8)
    state = attend(q, k, v, features, impl="chunked").state
    assert state.shift is not None
    assert ((state.z >= 1) & (state.z < 2)).all()
    attend(q, k, v, features, state=state, impl="chunked")
    large = ops.LinearState(state.kv * 2.0**60, state.z * 2.0**60, state.shift)
    with pytest.raises(AssertionError):
        attend(q, k, v, features, state=large, impl="chunked")
    for outlier in (100.0, torch.nan):
        k[0, 650] = outlier
        with pytest.raises(AssertionError):
            attend(q, k, v, features, impl="chunked")


@pytest.mark.parametrize("impl", ["chunked", "reference", "recurrent"])
def test_features_that_are_all_zero(impl: str) -> None:
    """A token whose logarithms are all -inf has no weight and asks for nothing: 0/0 is 0."""
    features = ops.Features(exponential=True)  # q and k are logarithms
    q, k, v = make_qkv(3, N=1, H=2, E=8, M=8)
    q, k = (torch.full_like(x, -torch.inf) for x in (q, k))
    out, state = ops.causal_linear_attention(q, k, v, features, impl=impl)
    step, _ = ops.linear_attention_step(q[:, 0], k[:, 0], v[:, 0], features, state=state)
    assert not out.any()
    assert not step.any()


def test_masked_key_before_a_dwarfing_one() -> None:
    """Queries before the greater key see the earlier sequence only, and see it in full."""
    features = ops.Features(exponential=True)  # q and k are logarithms
    q, k, v = make_qkv(6, N=1, H=2, E=8, M=8)
    _, past = ops.causal_linear_attention(q, k, v, features)
    k = k.clone()
    k[:, 1:] += 300.0
    keep = torch.tensor([[False, True, True, True, True, True]])
    run = partial(ops.causal_linear_attention, q, k, v, features, key_mask=keep, state=past)
    torch.testing.assert_close(run().values, run(impl="reference").values)


@pytest.mark.parametrize("impl", ["chunked", "reference", "recurrent"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_no_key_gives_zero(kind, impl) -> None:
    """0/0 is 0, in value and in gradient."""
    q, k, v = (x.requires_grad_() for x in make_qkv(5, E=64))
    mask = torch.tensor([[False] * 5, [False, False, True, True, False]])
    for features in (favor(), None):
        phi = [q, k] if features else [q.exp(), k.exp()]
        out = FUNCTIONS[kind](*phi, v, features, key_mask=mask, eps=0.0, impl=impl).values
        assert (out[0] == 0).all()
        assert (out[1, 2:] != 0).all()
        gradients = torch.autograd.grad(out.sum(), (q, k, v), materialize_grads=True)
        assert all(g.isfinite().all() and (g[0] == 0).all() for g in gradients)


def test_eps_is_added_to_the_denominator_of_plain_features() -> None:
    q, k, v = (x.abs() for x in make_qkv(6, dtype=torch.float64))
    out = ops.linear_attention(q, k, v, eps=0.5).values
    weights = torch.einsum("nlhe,nshe->nhls", q, k)
    expected = torch.einsum("nhls,nshm->nlhm", weights / (weights.sum(-1, True) + 0.5), v)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_sums_do_not_stagnate_in_half_precision(dtype) -> None:
    """Adding 1 in bfloat16 stops at 256, and float16 ends at 65504."""
    ones = torch.ones(1, 100_000, 1, 1, dtype=dtype)
    values = torch.linspace(0, 1, 100_000, dtype=torch.float64)[None, :, None, None].to(dtype)
    out, state = ops.causal_linear_attention(ones, ones, values, chunk_size=1000)
    exact = values.double().cumsum(1) / torch.arange(1, 100_001)[None, :, None, None]
    assert state.z.item() == 100_000
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
