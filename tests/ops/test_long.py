"""A million tokens in half precision: nothing overflows, nothing stagnates."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from fast_transformers import ops
from fast_transformers.feature_maps import Favor, elu_feature_map, features_of
from tests.support import EPS_FP32

L, DIM, CHUNK = 1_000_000, 16, 256
FUNCTIONS = {"full": ops.linear_attention, "causal": ops.causal_linear_attention}
MAPS = {
    "elu": elu_feature_map(DIM),
    "favor": Favor(DIM, n_dims=DIM, generator=1).eval(),
}


@functools.cache
def make_inputs() -> list[Tensor]:
    """Numbers that bfloat16 and float16 both hold exactly; values are positive, up to 5e4."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, L, 1, DIM, generator=generator)
    inputs = [x.bfloat16() for x in (q, k, 1e4 * v.abs() + 1)]
    inputs = [x.masked_fill(x.abs() < 1e-4, 0) for x in inputs]  # below float16's normal range
    assert all(torch.equal(x.half().float(), x.float()) for x in inputs)
    return inputs


def relative(found: Tensor, exact: Tensor) -> float:
    assert found.isfinite().all()
    return float(((found - exact) / exact).abs().max())  # promotes to float64


@torch.no_grad()
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_million_tokens(kind, name) -> None:
    """Against float64 in the same chunks, a form that tests of its own tie to the reference.

    All terms are positive. Each of n chunks rounds the float32 sums once, errors that are
    independent: 4 sqrt(n) roundings. The values are a ratio of two such sums, and rounded.
    """
    inputs, features = make_inputs(), features_of(MAPS[name])
    run = FUNCTIONS[kind]
    exact = run(*(x.double() for x in inputs), features, impl="chunked", chunk_size=CHUNK)
    kv, z = exact.state
    assert kv.min() > 65_504 * 100  # the end of float16, and far beyond
    sums = 4 * (L / CHUNK) ** 0.5 * EPS_FP32
    for dtype in (torch.bfloat16, torch.float16):
        out, state = run(*(x.to(dtype) for x in inputs), features, chunk_size=CHUNK)
        assert (out.dtype, state.kv.dtype, state.z.dtype) == (dtype, *[torch.float32] * 2)
        assert relative(out, exact.values) <= torch.finfo(dtype).eps / 2 + 2 * sums
        for found, true in zip(state, (kv, z), strict=True):
            assert relative(found, true) <= sums
        if kind == "full":  # goes on from the sums as recurrent generation does
            q, k, v = (x[:, 0].to(dtype) for x in inputs)
            step = ops.linear_attention_step(q, k, v, features, state=state).values
            assert relative(step, exact.values[:, 0]) <= 2 * torch.finfo(dtype).eps
