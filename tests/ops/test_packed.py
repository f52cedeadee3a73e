"""Packed sequences: each as if it were alone, from cu_seqlens and from nested tensors."""

from __future__ import annotations

import pytest
import torch

from fast_transformers import ops
from tests.support import exponential_features, make_qkv, positive_features

FUNCTIONS = {"full": ops.linear_attention, "causal": ops.causal_linear_attention}
FEATURES = {"positive": positive_features(), "exponential": exponential_features()}
LENGTHS = [70, 1, 0, 133, 69, 5, 300, 72]
CU = torch.tensor([0, *LENGTHS]).cumsum(0)
close = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_each_sequence_as_if_alone(kind, features, groups) -> None:
    """Values, states, and gradients; going on with the states that came out."""
    function, phi = FUNCTIONS[kind], FEATURES[features]
    q, k, v = make_qkv(sum(LENGTHS), N=1, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k[:, :, : 3 // groups], v[:, :, : 3 // groups])]
    leaves = [x.detach().requires_grad_() for x in leaves]
    w = torch.randn(1, sum(LENGTHS), 3, 5, dtype=torch.float64)
    first = function(*leaves, phi, cu_seqlens=CU)
    again = function(*leaves, phi, cu_seqlens=CU.int(), state=first.state)
    gradients = torch.autograd.grad(((first.values + again.values) * w).sum(), leaves)
    for i, (start, stop) in enumerate(zip(CU.tolist(), CU.tolist()[1:], strict=False)):
        alone = [x[:, start:stop].detach().requires_grad_() for x in leaves]
        one = function(*alone, phi)
        two = function(*alone, phi, state=one.state)
        torch.testing.assert_close(first.values[:, start:stop], one.values, **close)
        torch.testing.assert_close(again.values[:, start:stop], two.values, **close)
        torch.testing.assert_close(again.state[0][i], two.state[0][0], **close)
        loss = ((one.values + two.values) * w[:, start:stop]).sum()
        expected = torch.autograd.grad(loss, alone)
        for whole, part in zip(gradients, expected, strict=True):
            torch.testing.assert_close(whole[:, start:stop], part, **close)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_nothing_crosses_a_boundary(kind) -> None:
    """Not even NaN."""
    q, k, v = make_qkv(sum(LENGTHS), N=1)
    out = FUNCTIONS[kind](q, k, v, FEATURES["exponential"], cu_seqlens=CU).values
    spoilt = slice(71, 204)  # the sequence of 133
    for x in (q, k, v):
        x[:, spoilt] = torch.nan
    other = FUNCTIONS[kind](q, k, v, FEATURES["exponential"], cu_seqlens=CU).values
    rest = torch.ones(sum(LENGTHS), dtype=torch.bool)
    rest[spoilt] = False
    assert torch.equal(out[:, rest], other[:, rest])
    assert other[:, spoilt].isnan().all()


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_other_lengths_of_keys_and_a_mask(kind) -> None:
    q, _, _ = make_qkv(30, N=1, dtype=torch.float64)
    _, k, v = make_qkv(24, N=1, dtype=torch.float64)
    keep = torch.rand(1, 24, generator=torch.Generator().manual_seed(3)) > 0.3
    starts, key_starts = torch.tensor([0, 10, 30]), torch.tensor([0, 20, 24])
    out = FUNCTIONS[kind](
        q, k, v, FEATURES["positive"], cu_seqlens=starts, cu_seqlens_keys=key_starts, key_mask=keep
    ).values
    for (a, b), (c, d) in (((0, 10), (0, 20)), ((10, 30), (20, 24))):
        alone = FUNCTIONS[kind](
            q[:, a:b], k[:, c:d], v[:, c:d], FEATURES["positive"], key_mask=keep[:, c:d]
        ).values
        torch.testing.assert_close(out[:, a:b], alone, **close)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_nested_tensors(kind) -> None:
    rows = [[x[0] for x in make_qkv(n, N=1, seed=n)] for n in (3, 8, 5)]
    q, k, v = (
        torch.nested.nested_tensor(list(x), layout=torch.jagged, requires_grad=True)
        for x in zip(*rows, strict=True)
    )
    values, state = FUNCTIONS[kind](q, k, v, FEATURES["positive"])
    assert values.is_nested
    assert state.kv.shape[0] == 3
    for one, (a, b, c) in zip(values.unbind(), rows, strict=True):
        alone = FUNCTIONS[kind](a[None], b[None], c[None], FEATURES["positive"]).values[0]
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-6)
    values.values().sum().backward()
    assert q.grad.is_nested
    assert q.grad.values().isfinite().all()
    strided = torch.nested.nested_tensor([x[0] for x in rows], layout=torch.strided)
    with pytest.raises(
        TypeError, match=r"queries must be a nested tensor of layout torch\.jagged"
    ):
        FUNCTIONS[kind](strided, k, v)


def jagged(*lengths: int) -> torch.Tensor:
    rows = [make_qkv(n, N=1, H=2)[0][0] for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_nested_tensors_that_contradict(kind) -> None:
    """Each other, the boundaries, or the layout: here sums would come out, of other tokens."""
    x, function = jagged(1, 1), FUNCTIONS[kind]
    for name in ("cu_seqlens", "cu_seqlens_keys"):
        with pytest.raises(ValueError, match="cu_seqlens and cu_seqlens_keys must be None"):
            function(x, x, x, **{name: torch.tensor([0, 2])})
    transposed = x.transpose(1, 2)  # (N, H, length, E), with as many heads as tokens
    with pytest.raises(TypeError, match=r"queries must be .*\(N, length, H, dim\)"):
        function(transposed, transposed, transposed)
    k, v = jagged(2, 5), jagged(5, 2)
    with pytest.raises(ValueError, match=r"lengths of the keys.*\[2, 5\], got \[5, 2\]"):
        function(k, k, v)
    function(k, jagged(3, 1), jagged(3, 1))  # equal, if not the same


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 4], "must rise from 0 to the number of tokens"),
        ([1, 6], "must rise from 0"),
        ([0, 5, 2, 6], "must rise from 0"),
        ([0.0, 6.0], "1-D integer tensor"),
        ([[0, 6]], "1-D integer tensor"),
    ],
)
def test_errors(starts, message) -> None:
    q, k, v = make_qkv(6, N=1)
    with pytest.raises(ValueError, match=message):
        ops.linear_attention(q, k, v, cu_seqlens=torch.tensor(starts))
    with pytest.raises(ValueError, match="cu_seqlens_keys must be given"):
        ops.linear_attention(q, k[:, :3], v[:, :3], cu_seqlens=torch.tensor([0, 6]))
