"""Every form against the float64 reference: values, final state, gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import elu

from fast_transformers import ops
from tests.support import (
    DTYPES,
    LENGTHS,
    assert_as_accurate,
    differentiate,
    exponential_features,
    make_qkv,
    positive_features,
)

FEATURES = {
    "elu": ops.Features(lambda x: elu(x) + 1, lambda x: elu(x) + 1),
    "positive": positive_features(),
    "exponential": exponential_features(),
}
MANY = {"positive": positive_features(4, 6), "exponential": exponential_features(4, 6)}
FUNCTIONS = {"full": ops.linear_attention, "causal": ops.causal_linear_attention}


def check(function, features, inputs, **options) -> None:
    """``function`` with ``options`` is as accurate as the reference in the same dtype."""
    reference = partial(function, features=features, **{**options, "impl": "reference"})
    exact = differentiate(reference, [x.double() for x in inputs])
    plain = differentiate(reference, inputs)
    actual = differentiate(partial(function, features=features, **options), inputs)
    assert actual[0].dtype == inputs[0].dtype
    largest = max(float(x.abs().max()) for x in exact[2:] if x.numel())
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        # gradients of queries and keys are sums of terms that cancel, all the way for one key
        assert_as_accurate(a, p, e, size=largest if i >= 2 else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_chunked_matches_reference(kind, features, length, dtype) -> None:
    inputs = make_qkv(length, dtype=dtype, strided=True)
    check(FUNCTIONS[kind], FEATURES[features], inputs, impl="chunked", chunk_size=64)


@pytest.mark.parametrize("length", [65, 128, 129, 257])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_default_matches_reference(kind, features, length) -> None:
    check(FUNCTIONS[kind], FEATURES[features], make_qkv(length))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_recurrent_matches_reference(kind, features, length, dtype) -> None:
    inputs = make_qkv(length, dtype=dtype, strided=True)
    check(FUNCTIONS[kind], FEATURES[features], inputs, impl="recurrent")


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 65), (65, 1), (7, 12), (130, 64), (0, 3), (3, 0)]
)
@pytest.mark.parametrize("features", ["positive", "exponential"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_cross_lengths(kind, features, queries, keys, impl) -> None:
    inputs = make_qkv(queries, keys, dtype=torch.float64)
    check(FUNCTIONS[kind], FEATURES[features], inputs, impl=impl)


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_masked_keys(kind, features, impl) -> None:
    """Against the reference, and against leaving the masked keys out; padding left and right."""
    inputs = make_qkv(70, dtype=torch.float64)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(2)) > 0.3
    mask[0, :5], mask[0, 60:], mask[1, 1:68] = False, False, False
    mask[1, :2] = True
    check(FUNCTIONS[kind], FEATURES[features], inputs, key_mask=mask, impl=impl)
    masked = partial(FUNCTIONS[kind], features=FEATURES[features], key_mask=mask, impl=impl)
    _, _, _, dk, dv = differentiate(masked, inputs)
    assert (dk[~mask] == 0).all()
    assert (dv[~mask] == 0).all()
    if kind == "full":
        q, k, v = (x[:1] for x in inputs)
        left = FUNCTIONS[kind](q, k[:, mask[0]], v[:, mask[0]], FEATURES[features]).values
        torch.testing.assert_close(masked(*inputs).values[:1], left, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("features", MANY)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_many_blocks_and_tiles(kind, features) -> None:
    """Several kept states, several tiles, and masked keys in all of them."""
    inputs = make_qkv(600, N=3, H=9, E=4, M=3, dtype=torch.float64)
    mask = torch.rand(3, 600, generator=torch.Generator().manual_seed(2)) > 0.3
    mask[0, :300] = mask[1, 200:] = False
    w = torch.randn(3, 600, 9, 3, generator=torch.Generator().manual_seed(1)).double()
    run = partial(FUNCTIONS[kind], features=MANY[features])

    def results(row: slice, head: slice, **options) -> list[torch.Tensor]:
        leaves = [x[row, :, head].clone().requires_grad_() for x in inputs]
        out = run(*leaves, key_mask=mask[row], **options).values
        gradients = torch.autograd.grad((out * w[row, :, head]).sum(), leaves)
        return [out.detach(), *gradients]

    together = results(slice(None), slice(None))
    for row, head in ((0, 0), (1, 8), (2, 7)):
        at = slice(row, row + 1), slice(head, head + 1)
        for a, b in zip(together, results(*at, impl="recurrent"), strict=True):
            torch.testing.assert_close(a[at[0], :, at[1]], b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
@pytest.mark.parametrize("features", ["positive", "exponential"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_grouped_queries(kind, features, impl) -> None:
    """Three query heads to a key head: as if every key head were there three times."""
    q, k, v = make_qkv(140, H=6, dtype=torch.float64)
    k, v = k[:, :, :2], v[:, :, :2]
    check(FUNCTIONS[kind], FEATURES[features], [q, k, v], impl=impl)
    grouped = FUNCTIONS[kind](q, k, v, FEATURES[features], impl=impl)
    repeated = [x.repeat_interleave(3, 2) for x in (k, v)]
    expected = FUNCTIONS[kind](q, *repeated, FEATURES[features], impl="reference")
    torch.testing.assert_close(grouped.values, expected.values, rtol=1e-9, atol=1e-12)
    assert grouped.state.kv.shape[1] == 2
    with pytest.raises(ValueError, match="or a divisor"):
        FUNCTIONS[kind](q[:, :, :5], k, v, FEATURES[features])


def test_causal_definition() -> None:
    """The reference itself, against a loop over the sums of the definition."""
    q, k, v = make_qkv(9, dtype=torch.float64, N=1, H=1)
    phi_q, phi_k = (elu(x)[0, :, 0] + 1 for x in (q, k))
    rows = []
    for i in range(9):
        weights = torch.stack([phi_q[i] @ phi_k[j] for j in range(i + 1)])
        rows.append((weights[:, None] * v[0, : i + 1, 0]).sum(0) / (weights.sum() + 1e-6))
    out = ops.causal_linear_attention(q, k, v, FEATURES["elu"], impl="reference").values
    torch.testing.assert_close(out[0, :, 0], torch.stack(rows), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", ["chunked", "reference", "recurrent"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_exponential_features_are_the_exponentials(kind, impl) -> None:
    """Working with logarithms changes nothing but the range."""
    q, k, v = make_qkv(70, dtype=torch.float64)
    logs = exponential_features()
    plain = ops.Features(lambda x: logs.queries(x).exp(), lambda x: logs.keys(x).exp())
    a = FUNCTIONS[kind](q, k, v, logs, impl=impl)
    b = FUNCTIONS[kind](q, k, v, plain, eps=0.0, impl=impl)
    torch.testing.assert_close(a.values, b.values, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(a.state.z * a.state.shift.exp2(), b.state.z, rtol=1e-11, atol=0)


def test_gradients_of_trained_features() -> None:
    """The hand-written backward pass reaches weights inside an asymmetric map."""
    query_net, key_net = torch.nn.Linear(8, 12).double(), torch.nn.Linear(8, 12).double()
    weights = (*query_net.parameters(), *key_net.parameters())
    features = ops.Features(
        lambda x: query_net(x).sigmoid(), lambda x: key_net(x).exp(), parameters=weights
    )
    inputs = make_qkv(131, dtype=torch.float64)
    w = torch.randn(2, 131, 3, 5, dtype=torch.float64)
    for function in FUNCTIONS.values():
        gradients = [
            torch.autograd.grad((function(*inputs, features, impl=i).values * w).sum(), weights)
            for i in ("chunked", "reference")
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_weights_changed_before_the_backward_pass_are_noticed(kind) -> None:
    net = torch.nn.Linear(8, 12)
    features = ops.Features(
        lambda x: net(x).exp(), lambda x: net(x).exp(), parameters=tuple(net.parameters())
    )
    out = FUNCTIONS[kind](*make_qkv(5), features).values
    with torch.no_grad():
        net.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_gradcheck(kind, features) -> None:
    inputs = [x.requires_grad_() for x in make_qkv(7, 6, N=1, H=2, dtype=torch.float64)]

    def function(q, k, v):  # type: ignore[no-untyped-def]
        options = {"chunk_size": 3, "impl": "chunked"}
        return FUNCTIONS[kind](q, k, v, FEATURES[features], **options).values

    torch.autograd.gradcheck(function, inputs)


def test_second_derivatives_raise_or_are_right() -> None:
    """A gradient penalty never loses its gradient in silence."""
    q, k, v = (x.requires_grad_() for x in make_qkv(5, N=1, H=1, dtype=torch.float64))

    def gradient(impl: str) -> torch.Tensor:
        out = ops.causal_linear_attention(q, k, v, FEATURES["elu"], impl=impl).values
        return torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]

    with pytest.raises(RuntimeError, match=r"second derivatives.*impl='reference'"):
        torch.autograd.grad(gradient("chunked").square().sum(), q)
    assert gradient("reference").square().sum().requires_grad


@pytest.mark.parametrize("expanded", [True, False])
def test_any_layout_of_the_gradient(expanded: bool) -> None:
    """Gradients of expanded and of transposed outputs, which misled the older kernel."""
    inputs = make_qkv(70, dtype=torch.float64)
    results = []
    for impl in ("chunked", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = ops.causal_linear_attention(*leaves, FEATURES["elu"], impl=impl).values
        loss = out.sum() if expanded else (out.transpose(1, 3) ** 2).contiguous().sum()
        results.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
