"""No form but the reference holds all features, an L x L matrix, a state per token, or keys once
for every query head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fast_transformers import ops
from fast_transformers.feature_maps import Favor, elu_feature_map, features_of
from fast_transformers.ops.call import Call, Settings
from fast_transformers.ops.chunked import Inputs, allocate
from tests.support import make_qkv

FUNCTIONS = [ops.linear_attention, ops.causal_linear_attention]
L, E, M, F = 6000, 8, 8, 256
BLOCK, CHUNK = 256, 32  # tokens that are worked on together


def largest_tensor(call: Callable[[], Any]) -> int:
    """Elements in float32 of the largest memory that is asked for at once, also inside of our
    operators (where a dispatch mode of PyTorch sees nothing)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    return max(event.self_cpu_memory_usage for event in prof.events()) // 4


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("factory", [elu_feature_map, Favor.factory(n_dims=F)])
def test_no_large_tensor(function, factory) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(L, N=1, H=1, E=E, M=M))
    feature_map = factory(E)
    assert feature_map.feature_dims in (E, F)
    features = features_of(feature_map)
    largest = largest_tensor(lambda: function(q, k, v, features).values.sum().backward())
    one_block = 2 * BLOCK * (F + M) + BLOCK * CHUNK + BLOCK  # with pairs and denominators
    assert largest <= max(L * max(E, M), one_block) < L * F // 8
    largest = largest_tensor(lambda: function(q.exp(), k.exp(), v, impl="reference"))
    assert largest >= L * L


@pytest.mark.parametrize("features", [16, 64, 192, 256, 257, 1024])
def test_kept_states_are_few(features) -> None:
    length, heads, dims = 16384, 2, 64
    x = torch.empty(1, length, heads, dims, device="meta")
    omega = torch.empty(dims, features, device="meta")
    call = Call.of(Settings("projected_relu", (1.0,), keep=True), None, omega, x.dtype, 32)
    out, _, kept = allocate(call, Inputs(x, x, x, None))
    assert 0 < kept.kv.numel() <= (out.numel() + 3 * x.numel()) / 7


@pytest.mark.parametrize("function", FUNCTIONS)
def test_keys_are_not_repeated(function) -> None:
    heads, dims, values = 16, 64, 4
    q, k = torch.randn(1, L, heads, dims), torch.randn(1, L, 1, dims)
    v, features = torch.randn(1, L, 1, values), features_of(elu_feature_map(dims))
    repeated = k.expand(-1, -1, heads, -1)
    assert largest_tensor(repeated.contiguous) >= repeated.numel()
    assert largest_tensor(lambda: function(q, k, v, features)) < repeated.numel() // 4
