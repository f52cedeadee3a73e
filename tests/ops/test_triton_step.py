"""The step as one kernel: on a GPU, or in Triton's interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fast_transformers import ops
from fast_transformers.ops import fused_step
from fast_transformers.ops.kinds import KINDS

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    pytest.importorskip("triton.runtime.interpreter")
OPERATORS = torch.ops.fast_transformers
PROJECTED = ("projected_relu", "fourier", "smoothed_fourier", "hyperbolic")


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_step, "DEVICES", (DEVICE,))


def make_features(kind: str, E: int, K: int) -> ops.Features:
    projection, numbers = None, ()
    if kind in PROJECTED:
        generator = torch.Generator().manual_seed(3)
        projection = torch.randn(E, K, generator=generator).to(DEVICE)
        numbers = (E**-0.5, 0.7) if kind == "smoothed_fourier" else (E**-0.5,)
    formula = ops.Formula(kind, projection, numbers)
    return ops.Features(exponential=KINDS[kind].exponential, any_heads=True, formula=formula)


def make_tokens(
    steps: int, kind: str, *, N: int = 2, H: int = 2, E: int = 8, M: int = 8, std: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> list[list[Tensor]]:  # fmt: skip
    """Queries, keys and values of each step; slices of something wider."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(steps, N, H, d + 3, generator=generator) for d in (E, E, M))
    q, k = std * q, std * k
    if kind in ("identity", "projected_relu"):  # denominators that do not cancel
        q, k = q.abs(), k.abs()
    if kind == "fourier":
        q, k = q / 3, k / 3
    return [[x.to(DEVICE, dtype)[..., 2:-1] for x in step] for step in zip(q, k, v, strict=True)]


def exact(features: ops.Features, dtype: torch.dtype) -> ops.Features:
    """The map in float64, with the projection as products of matrices are given it."""
    formula = features.formula
    if formula.projection is not None:
        projection = formula.projection.to(dtype).double()
        formula = formula._replace(projection=projection)
    return features._replace(formula=formula)


def assert_same(actual: Tensor, expected: Tensor, bound: float) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= bound, f"relative error {float(error):.1e}"


def means(state: ops.LinearState) -> list[Tensor]:
    """The sums free of the shift, and the shift of their largest terms."""
    z = state.z.double()
    if state.shift is None:
        return [state.kv.double(), z]
    return [state.kv.double() / z[..., None], z.log2() + state.shift.double()]


def compare(kind: str, *, steps: int = 3, K: int = 12, bound: float = 3e-6, **options) -> None:
    """Steps, every second one in place."""
    features = make_features(kind, options.get("E", 8), K)
    dtype = options.get("dtype", torch.float32)
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # which the interpreter does not round to
        projection = features.formula.projection
        if projection is not None:
            formula = features.formula._replace(projection=projection.to(dtype).float())
            features = features._replace(formula=formula)
    state = reference = None
    for i, (q, k, v) in enumerate(make_tokens(steps, kind, **options)):
        inplace = i % 2 == 0
        before = None if state is None else state.map(Tensor.clone)
        found = ops.linear_attention_step(q, k, v, features, state=state, inplace=inplace)
        given = [x.double() for x in (q, k, v)]
        expected = ops.linear_attention_step(*given, exact(features, dtype), state=reference)
        assert found.values.dtype == dtype
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert_same(found.values, expected.values, bound + rounding)
        for a, b in zip(means(found.state), means(expected.state), strict=True):
            assert_same(a, b, bound)
        if before is not None and inplace:
            assert found.state is state
        elif before is not None:
            assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
        state, reference = found.state, expected.state


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_torch_step_in_float64(kind: str) -> None:
    compare(kind, steps=20, N=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("E", "M", "K"), [(5, 70, 33), (72, 3, 34), (64, 64, 64)])
def test_sizes(kind: str, E: int, M: int, K: int) -> None:
    compare(kind, E=E, M=M, K=K, steps=2, N=1)


@pytest.mark.parametrize("kind", ["elu_plus_one", "hyperbolic"])
def test_heads_of_many_dimensions(kind: str) -> None:
    compare(kind, E=256, M=200, K=40, steps=2, N=1, H=1, dtype=torch.bfloat16)


def test_the_widest() -> None:
    compare("hyperbolic", E=8, M=256, K=256, steps=2, N=1, H=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_inputs(kind: str, dtype: torch.dtype) -> None:
    compare(kind, dtype=dtype, steps=2, N=1)


@pytest.mark.parametrize("kind", ["hyperbolic", "logarithm"])
def test_large_norms(kind: str) -> None:
    """Logarithms of hundreds are rounded before they are exponentiated."""
    compare(kind, std=10.0, steps=6, N=1, bound=3e-4)


def test_no_key_at_all_gives_zeros() -> None:
    features = make_features("relu", 4, 0)
    q = torch.ones(1, 1, 4, device=DEVICE)
    found = ops.linear_attention_step(q, -q, q, features, eps=0.0)
    assert torch.equal(found.values, torch.zeros_like(q))
    features = make_features("logarithm", 4, 0)
    gone = torch.full_like(q, -torch.inf)
    found = ops.linear_attention_step(gone, gone, q, features)
    assert torch.equal(found.values, torch.zeros_like(q))
    again = ops.linear_attention_step(q, q, 2 * q, features, state=found.state)
    torch.testing.assert_close(again.values, 2 * q)


def test_continues_a_sequence() -> None:
    features = make_features("hyperbolic", 8, 12)
    tokens = zip(*make_tokens(9, "hyperbolic"), strict=True)
    q, k, v = (torch.stack(x, 1) for x in tokens)
    whole = ops.causal_linear_attention(q, k, v, features)
    _, state = ops.causal_linear_attention(q[:, :8], k[:, :8], v[:, :8], features)
    values, _ = ops.linear_attention_step(q[:, 8], k[:, 8], v[:, 8], features, state=state)
    torch.testing.assert_close(values, whole.values[:, 8], rtol=1e-5, atol=1e-5)


def test_why_not() -> None:
    features = make_features("hyperbolic", 8, 12)
    ((q, k, v),) = make_tokens(1, "hyperbolic")
    kind = KINDS["hyperbolic"](features.formula, torch.float32)
    state = ops.linear_attention_step(q, k, v, features).state

    def reason(q=q, k=k, v=v, kind=kind, state=state, features=features) -> str:  # type: ignore[no-untyped-def]
        return str(fused_step.why_not_fused_step(q, k, v, features, kind, state))

    assert reason() == "None"
    assert "gradients" in reason(kind=None)
    assert "no key" in reason(k=None, v=None)
    assert "share" in reason(q=q.repeat(1, 2, 1))
    assert "dtype" in reason(q=q.half())
    assert "128 dimensions" in reason(v=torch.empty(2, 2, 300, device=DEVICE))
    assert "512 features" in reason(features=make_features("hyperbolic", 8, 300))
    sliced = state.map(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
    assert "contiguous" in reason(state=sliced)
    meta = [x.to("meta") for x in (q, k, v)]
    assert "device" in reason(*meta)


def test_other_steps_are_served_as_before() -> None:
    """Gradients, grouped queries, states for other features."""
    features = make_features("hyperbolic", 8, 12)
    ((q, k, v),) = make_tokens(1, "hyperbolic")
    q.requires_grad_()
    ops.linear_attention_step(q, k, v, features).values.sum().backward()
    assert q.grad is not None
    values, state = ops.linear_attention_step(q.detach().repeat(1, 2, 1), k, v, features)
    assert values.shape == (2, 4, 8)
    with pytest.raises(ValueError, match="24 features, this one has 26"):
        ops.linear_attention_step(
            q.detach(), k, v, make_features("hyperbolic", 8, 13), state=state
        )


@pytest.mark.parametrize("kind", ["relu", "smoothed_fourier", "hyperbolic"])
def test_operators_pass_opcheck(kind: str) -> None:
    features = make_features(kind, 8, 12)
    formula = features.formula
    ((q, k, v),) = make_tokens(1, kind)
    settings = (kind, formula.numbers, 1e-6, formula.projection, q, k, v)
    opcheck(OPERATORS.step.default, (*settings, None, None, None))
    state = ops.linear_attention_step(q, k, v, features).state
    opcheck(OPERATORS.step.default, (*settings, state.kv, state.z, state.shift))
    opcheck(OPERATORS.step_.default, (*settings, state.kv, state.z, state.shift))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["elu_plus_one", "hyperbolic"])
def test_in_a_cuda_graph(kind: str) -> None:
    features = make_features(kind, 64, 128)
    tokens = make_tokens(4, kind, E=64, M=64)
    q, k, v = (x.clone() for x in tokens[0])
    state = ops.linear_attention_step(q, k, v, features).state
    expected = state.map(Tensor.clone)
    ops.linear_attention_step(q, k, v, features, state=state.map(Tensor.clone), inplace=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linear_attention_step(q, k, v, features, state=state, inplace=True).values
    for token in tokens[1:]:
        for to, x in zip((q, k, v), token, strict=True):
            to.copy_(x)
        graph.replay()
        values, expected = ops.linear_attention_step(*token, features, state=expected)
        torch.testing.assert_close(out, values)
