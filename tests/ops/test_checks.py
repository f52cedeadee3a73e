"""Bad input: a message that names the argument, what was expected, what came, the remedy."""

from __future__ import annotations

import pytest
import torch

from fast_transformers import ops
from fast_transformers.feature_maps import elu_feature_map, features_of
from tests.support import exponential_features, make_qkv, positive_features


@pytest.mark.parametrize("function", [ops.linear_attention, ops.causal_linear_attention])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q.long(), k, v), TypeError, r"queries must be floating.*int64.*float\("),
        (lambda q, k, v: (q[0], k, v), ValueError, r"queries must have 4 dim.*\(N, length, H"),
        (lambda q, k, v: (q, k[:1], v), ValueError, r"keys must have the batch size .*\(2\).*1"),
        (lambda q, k, v: (q, k, v[:, :, :2]), ValueError, r"values must have the heads.*\(3\).*2"),
        (lambda q, k, v: (q, k, v[:, :4]), ValueError, r"values must have as many rows.*\(6\).*4"),
        (lambda q, k, v: (q, "k", v), TypeError, r"keys must be a tensor, got str"),
        (lambda q, k, v: (q, k.to("meta"), v), ValueError, r"keys must be on the device.*\.to\("),
    ],
)
def test_inputs(function, change, error, message) -> None:
    with pytest.raises(error, match=message):
        function(*change(*make_qkv(6)))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 5, dtype=torch.bool), r"key_mask .*\(2, 6\).*\(2, 5\)"),
        (torch.ones(2, 6), r"key_mask must be a bool.*float32"),
    ],
)
def test_key_mask(mask, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.linear_attention(*make_qkv(6), key_mask=mask)


def test_widths_of_query_and_key_features() -> None:
    features = ops.Features(lambda x: x[..., :4], lambda x: x)
    for function in (ops.linear_attention, ops.causal_linear_attention):
        for impl in ("chunked", "reference", "recurrent"):
            with pytest.raises(ValueError, match=r"same number of features, got 4 .* and 8"):
                function(*make_qkv(3), features, impl=impl)
            q, k, v = make_qkv(3)
            with pytest.raises(ValueError, match=r"same number of features, got 8 .* and 4"):
                function(q, k[..., :4], v, features_of(elu_feature_map(8)), impl=impl)


@pytest.mark.parametrize("impl", ["chunked", "reference", "recurrent"])
@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (make_qkv(3, N=1), ValueError, "batch size changed during iteration.*1 seq.*2"),
        (make_qkv(3, H=2), ValueError, "2 heads of 5 value dimensions, the inputs have 3 of 5"),
        (make_qkv(3, M=4), ValueError, "3 heads of 4 value dimensions"),
        (make_qkv(3, dtype=torch.float64), TypeError, "state must be torch.float32.*float64"),
    ],
    ids=["batch", "heads", "values", "dtype"],
)
def test_states_of_other_inputs(state, error, message, impl) -> None:
    features = positive_features()
    state = ops.linear_attention(*state, features).state
    for function in (ops.linear_attention, ops.causal_linear_attention):
        with pytest.raises(error, match=message):
            function(*make_qkv(3), features, state=state, impl=impl)


@pytest.mark.parametrize("impl", ["chunked", "reference", "recurrent"])
def test_states_of_other_maps(impl) -> None:
    inputs = make_qkv(3)
    plain, exponential = positive_features(), exponential_features()
    state = ops.linear_attention(*inputs, plain).state
    with pytest.raises(ValueError, match=r"no exponentials, this one has exponential"):
        ops.causal_linear_attention(*inputs, exponential, state=state, impl=impl)
    for function in (ops.linear_attention, ops.causal_linear_attention):
        with pytest.raises(ValueError, match=r"feature map of 24 features, this one has 8"):
            function(*inputs, state=state, impl=impl)
    with pytest.raises(TypeError, match=r"pair .S, Z., got int"):
        ops.linear_attention(*inputs, plain, state=3, impl=impl)  # type: ignore[arg-type]


def test_step() -> None:
    q, k, v = (x[:, 0] for x in make_qkv(1))
    with pytest.raises(ValueError, match="state must be given"):
        ops.linear_attention_step(q, None, None)
    with pytest.raises(ValueError, match=r"3 dimensions, \(N, H, dim\)"):
        ops.linear_attention_step(q[:, None], k, v)


def test_choice_of_form() -> None:
    inputs = make_qkv(3)
    with pytest.raises(ValueError, match=r"impl must be 'auto' or one of .*chunked.*'fast'"):
        ops.linear_attention(*inputs, impl="fast")
    with pytest.raises(ValueError, match=r"impl='triton' cannot serve this.*use impl='auto'"):
        ops.linear_attention(*(x.double() for x in inputs), impl="triton")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        ops.linear_attention(*inputs, chunk_size=0)
    answer = ops.explain(causal=True, length=10, keys=10)
    assert [form for form, text in answer.items() if text.startswith("chosen")] == ["chunked"]
