"""The weights of any map are those that attention uses."""

from __future__ import annotations

import pytest
import torch

from fast_transformers import ops
from fast_transformers.attention import FullAttention
from fast_transformers.diagnostics import attention_map, make_sample
from fast_transformers.diagnostics.weights import softmax_weights
from fast_transformers.feature_maps import (
    Favor,
    FeatureMap,
    GeneralizedRandomFeatures,
    RandomFourierFeatures,
    elu_feature_map,
    features_of,
)
from fast_transformers.masking import FullMask, LengthMask, TriangularCausalMask


class Learned(FeatureMap):
    def __init__(self, query_dimensions):
        super().__init__(query_dimensions)
        self.linear = torch.nn.Linear(query_dimensions, 12)

    def forward(self, x):
        return self.linear(x).relu() + 1e-3


MAPS = [elu_feature_map, Favor, RandomFourierFeatures, GeneralizedRandomFeatures, Learned]


def inputs(seed=0, scale=1.0, heads_of_keys=3):
    generator = torch.Generator().manual_seed(seed)
    q = scale * torch.randn(2, 7, 3, 16, generator=generator)
    k = scale * torch.randn(2, 9, heads_of_keys, 16, generator=generator)
    return q, k, torch.randn(2, 9, heads_of_keys, 5, generator=generator)


@pytest.mark.parametrize("heads_of_keys", [3, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("make", MAPS, ids=lambda m: m.__name__)
def test_it_is_what_attention_multiplies_values_by(make, causal, heads_of_keys) -> None:
    q, k, v = inputs(heads_of_keys=heads_of_keys)
    feature_map, lengths = make(16).eval(), LengthMask(torch.tensor([9, 4]))
    mask = torch.ones(7, 9, dtype=torch.bool).tril() if causal else None
    weights = attention_map(
        feature_map, q, k, attn_mask=None if mask is None else FullMask(mask), key_lengths=lengths
    )
    function = ops.causal_linear_attention if causal else ops.linear_attention
    with torch.no_grad():
        call = function(
            q.double() if feature_map.any_input else q, k, v, features_of(feature_map),
            key_mask=lengths.bool_matrix,
        )  # fmt: skip
    v = v.repeat_interleave(3 // heads_of_keys, 2)
    out = (weights @ v.transpose(1, 2).double()).transpose(1, 2)
    torch.testing.assert_close(out, call.values.double(), rtol=1e-3, atol=1e-4)


def test_rows() -> None:
    q, k, _ = inputs()
    whole = attention_map(Favor(16, generator=0), q, k)
    assert whole.shape == (2, 3, 7, 9)
    for rows, expected in ((3, whole[:, :, 3:4]), (slice(2, 5), whole[:, :, 2:5])):
        torch.testing.assert_close(
            attention_map(Favor(16, generator=0), q, k, rows=rows), expected
        )
    picked = attention_map(Favor(16, generator=0), q, k, rows=[6, 0])
    torch.testing.assert_close(picked, whole[:, :, [6, 0]])


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("causal", [True, False])
def test_exponential_features_of_any_norm(scale, causal) -> None:
    """Beside the sum of every feature's logarithm; at 300 the logs differ by 100 thousands."""
    q, k, _ = inputs(scale=scale)
    feature_map = Favor(16, generator=0)
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask = mask.tril() if causal else mask
    weights = attention_map(feature_map, q, k, attn_mask=FullMask(mask))
    b, a = feature_map.log_queries(q.double()), feature_map.log_keys(k.double())
    logs = (b.transpose(1, 2)[:, :, :, None] + a.transpose(1, 2)[:, :, None]).logsumexp(-1)
    expected = logs.masked_fill(~mask, -torch.inf).softmax(-1)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


def test_softmax_is_that_of_full_attention() -> None:
    q, k, v = inputs()
    mask, lengths = TriangularCausalMask(7), LengthMask(torch.tensor([7, 4]))
    sample = make_sample(q, k[:, :7], attn_mask=mask, key_lengths=lengths, softmax_temp=0.3)
    out = softmax_weights(sample) @ v[:, :7].transpose(1, 2).double()
    attention = FullAttention(softmax_temp=0.3).eval()
    expected = attention(q, k[:, :7], v[:, :7], mask, None, lengths)
    torch.testing.assert_close(out.transpose(1, 2).float(), expected)


def test_a_query_without_keys_has_no_weights() -> None:
    q, k, _ = inputs()
    mask = FullMask(torch.ones(7, 9, dtype=torch.bool).tril(-1))
    for make in (elu_feature_map, Favor):
        weights = attention_map(make(16), q, k, attn_mask=mask)
        assert (weights[:, :, 0] == 0).all()
        assert weights.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(7, 3, 16)}, r"q must be a floating tensor \(N, length, H, dim\)"),
        ({"k": torch.zeros(2, 9, 3, 15)}, "must agree in N and E"),
        ({"k": torch.full((2, 9, 3, 16), torch.nan)}, "must be finite"),
        ({"attn_mask": FullMask(torch.ones(3, 3, dtype=torch.bool).tril())}, "attn_mask must"),
    ],
)
def test_what_does_not_fit(change, message) -> None:
    q, k, _ = inputs()
    with pytest.raises(ValueError, match=message):
        attention_map(Favor(16), **{"q": q, "k": k, **change})
