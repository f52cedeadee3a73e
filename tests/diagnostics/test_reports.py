"""The reports: known values, the two references, and numbers computed another way."""

from __future__ import annotations

import math

import pytest
import torch

from fast_transformers.diagnostics import (
    attention_map,
    attention_report,
    capacity,
    kernel_report,
    scale_report,
    suggest,
)
from fast_transformers.diagnostics.measures import effective_rank, ranks_of
from fast_transformers.feature_maps import (
    ActivationFunctionFeatureMap,
    Favor,
    FeatureMap,
    OptimalPositiveFeatures,
)
from fast_transformers.masking import LengthMask, TriangularCausalMask

IID = "projection='iid'"


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def median(measures, name):
    return float(getattr(measures, name).median())


# Attention statistics at initialisation, simulated by other code (numpy): q, k ~ N(0, I), E = 64,
# L = 256: entropy, KL, rank correlation, effective rank.
STATISTICS = {
    "elu": (5.540, 0.443, 0.50, 6),
    "relu": (5.492, 0.351, 0.59, 28),
    "relu squared": (5.349, 0.373, 0.49, 44),
    "exp:scale=2": (4.916, 0.594, 0.43, 45),
    "hedgehog": (5.536, 0.388, 0.87, 26),
    "dpfp:nu=3": (5.370, 0.274, 0.65, 109),
    "generalized:n_dims=128": (5.506, 0.338, 0.68, 34),
    "one-sided Favor": (3.843, 1.303, 0.45, 64),
    "taylor": (5.287, 0.060, 0.90, 144),
    "poly": (4.820, 0.922, 0.00, 185),
    "lln": (4.745, 0.684, 0.43, 45),
}


class OneSided(OptimalPositiveFeatures):
    """FAVOR+ with exp(w.x - |x|^2 / 2) alone, without the exp(-w.x - |x|^2 / 2) that Favor has:
    FAVOR++ with an A that stays 0. The figures are of these."""

    _calibrate = FeatureMap._calibrate


SQUARED = ActivationFunctionFeatureMap.factory(lambda x: x.relu().square())


ROUNDING = {"entropy": 5e-4, "kl": 5e-4, "rank_correlation": 5e-3, "effective_rank": 0.5}


@pytest.fixture(scope="module")
def standard():
    q, k = normal(2, 1, 256, 16, 64)
    own = {"relu squared": SQUARED, "one-sided Favor": OneSided.factory(128, sum_norm=0.0)}
    maps = {name: name for name in STATISTICS} | own
    return attention_report(maps, q, k, draws=1)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_at_initialisation(standard, name) -> None:
    """Within 3 standard deviations of single matrices, and what the figures are rounded by."""
    for (measure, rounding), expected in zip(ROUNDING.items(), STATISTICS[name], strict=True):
        found = getattr(standard[name], measure)
        allowed = 3 * float(found.std()) + rounding
        assert float(found.mean()) == pytest.approx(expected, abs=allowed), measure


def test_the_two_references(standard) -> None:
    assert [row.name for row in standard.rows[:2]] == ["exact softmax", "uniform"]
    softmax, uniform = standard["exact softmax"], standard["uniform"]
    for name, value in (("kl", 0), ("frobenius", 0), ("top1", 1), ("rank_correlation", 1)):
        assert median(softmax, name) == pytest.approx(value, abs=1e-9)
    assert median(softmax, "entropy") == pytest.approx(5.05, abs=0.03)
    assert median(softmax, "effective_rank") == pytest.approx(156, rel=0.03)
    assert median(uniform, "kl") == pytest.approx(0.492, abs=0.02)
    assert median(uniform, "entropy") == pytest.approx(math.log(256))
    assert median(uniform, "effective_rank") == pytest.approx(1, abs=1e-4)
    assert median(uniform, "rank_correlation") == pytest.approx(0, abs=1e-9)


def test_measures_by_hand() -> None:
    """One head, two queries and three keys, a map whose weights are known."""
    q = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    k = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]], [[3.0, 4.0]]]])
    v = torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]])
    identity = ActivationFunctionFeatureMap.factory(lambda x: x)
    found = attention_report({"x": identity}, q, k, v, softmax_temp=1.0)["x"]
    w = torch.tensor([[1.0, 0, 3], [0, 2, 4]]).double() / torch.tensor([[4.0], [6]]).double()
    p = torch.tensor([[1.0, 0, 3], [0, 2, 4]]).double().softmax(-1)
    floor = w.clamp(min=1e-12)
    assert float(found.kl) == pytest.approx(float((p * (p / floor).log()).sum(-1).mean()), 1e-4)
    assert float(found.frobenius) == pytest.approx(float((w - p).norm() / p.norm()), rel=1e-4)
    values = v[0, :, 0].double()
    error = ((w - p) @ values).norm() / (p @ values).norm()
    assert float(found.output_error) == pytest.approx(float(error), rel=1e-4)
    assert float(found.top1) == 1
    assert float(found.rank_correlation) == pytest.approx(1)
    assert float(found.largest) == pytest.approx((3 / 4 + 4 / 6) / 2, rel=1e-4)


def test_causal_attention_has_the_ranks_of_itself() -> None:
    """The first query, which sees one key, has none, and does not count."""
    q, k = normal(2, 2, 6, 1, 8)
    report = attention_report("elu", q, k, attn_mask=TriangularCausalMask(6))
    assert float(report["exact softmax"].rank_correlation) == pytest.approx(1)
    assert float(report["uniform"].rank_correlation) == 0


def test_signed_weights_show() -> None:
    q, k = normal(2, 1, 50, 1, 8)
    found = attention_report("rff:n_dims=16", q, k)["rff:n_dims=16"]
    assert 0.05 < float(found.negative) < 0.7
    assert float(found.denominator) < 0.5


def test_dead_rows_show() -> None:
    """Queries without a positive entry have no relu features at all."""
    q = -normal(1, 20, 1, 8).abs()
    found = attention_report("relu", q, normal(1, 20, 1, 8))["relu"]
    assert float(found.denominator) == 0


def test_heads_and_ready_maps() -> None:
    q, k = normal(2, 1, 30, 3, 16)
    feature_map = Favor(16, generator=3).eval()
    omega = feature_map.omega.clone()
    report = attention_report({"own": feature_map}, q, k, draws=1)
    assert report["own"].kl.shape == (3,)
    assert torch.equal(omega, feature_map.omega)
    w = attention_map(feature_map, q, k)
    p = torch.einsum("nlhe,nshe->nhls", q, k).div(4).softmax(-1)
    error = (w - p).flatten(2).norm(dim=-1) / p.flatten(2).norm(dim=-1)
    torch.testing.assert_close(report["own"].frobenius, error[0].double(), rtol=1e-5, atol=1e-5)


def test_reports_spare_the_global_generator_and_repeat_themselves() -> None:
    q, k = normal(2, 1, 30, 1, 16)
    before = torch.get_rng_state()
    first, again, other = (attention_report("favor", q, k, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert str(first) == str(again) != str(other)


def test_the_kernel_report_knows_bias_and_variance() -> None:
    q, k = 0.4 * normal(2, 2, 64, 2, 32)
    right = [f"favor:n_dims=64,{IID}", f"rff:n_dims=64,{IID}", f"generalized:n_dims=64,{IID}"]
    report = kernel_report(right, q, k, draws=1000)
    for row in report.rows[2:]:
        assert 0.5 < row.standard_errors < 1.6
        assert row.ratio == pytest.approx(1, rel=0.1)
        assert row.variance == pytest.approx(row.predicted, rel=0.1)
    assert report["exact softmax"].misfit == 0
    assert 0 < report["uniform"].misfit < 1
    assert report[right[0]].top > report[right[0]].bottom  # positive features, large weights
    assert report[right[1]].top < report[right[1]].bottom  # Fourier features


def test_the_kernel_report_sees_a_wrong_scale() -> None:
    class Wrong(Favor):
        def log_keys(self, x):
            return super().log_keys(x) + 0.05

        def forward(self, x):
            return self.log_keys(x).exp()

        exponential = True

    q, k = 0.3 * normal(2, 1, 64, 1, 16)
    row = kernel_report({"wrong": Wrong.factory(n_dims=64)}, q, k)["wrong"]
    assert row.bias == pytest.approx(math.exp(0.05) - 1, abs=0.02)
    assert row.standard_errors > 4


def test_ranks_share_ties() -> None:
    x = torch.tensor([[3.0, 1.0, 1.0, 9.0]])
    shown = torch.tensor([[True, True, True, False]])
    expected = torch.tensor([[2.0, 0.5, 0.5, 0.0]]) - torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(ranks_of(x, shown), (expected / expected.norm()).double())


def test_effective_rank() -> None:
    torch.testing.assert_close(effective_rank(torch.eye(5)), torch.tensor(5.0))
    torch.testing.assert_close(effective_rank(torch.ones(5, 5)), torch.tensor(1.0))


def test_scale() -> None:
    q, k = normal(2, 4, 200, 2, 64)
    report = scale_report(q + 1, k, attn_mask=None)
    torch.testing.assert_close(
        report.query_norm, torch.full((2,), 16.0).double(), rtol=0.03, atol=0
    )
    torch.testing.assert_close(report.key_norm, torch.full((2,), 8.0).double(), rtol=0.03, atol=0)
    centred = torch.full((2,), 16.0).double()
    torch.testing.assert_close(report.centred_sum_norm, centred, rtol=0.03, atol=0)
    x, y = (t.flatten(0, 1) / 64**0.25 for t in (q + 1, k))  # pairs across sequences, too
    pairs = (x[:, None] + y[None]).square().sum(-1).mean((0, 1))
    torch.testing.assert_close(report.sum_norm, pairs.double(), rtol=1e-4, atol=0)
    pairs = (x[:, None] - y[None]).square().sum(-1).mean((0, 1))
    torch.testing.assert_close(report.difference_norm, pairs.double(), rtol=1e-4, atol=0)
    same = scale_report(q, k)
    assert same.logit_std.tolist() == pytest.approx([1, 1], abs=0.02)
    assert same.below.tolist() == pytest.approx([0.159, 0.159], abs=0.01)
    assert 50 < float(same.effective_rank.min()) <= 64


def test_scale_leaves_padding_out() -> None:
    q, k = normal(2, 2, 20, 1, 8)
    k[1, 12:] = 1e3
    lengths = torch.tensor([20, 12])
    padded = scale_report(q, k, key_lengths=LengthMask(lengths))
    assert float(padded.key_norm) < 10
    assert float(padded.logit_max) < 20


# The share of pairs decoded, simulated by other code (numpy): S = 64, 128, 256, 512.
CAPACITIES = {
    "elu": (0.78, 0.44, 0.21, 0.05),
    "relu": (0.96, 0.80, 0.52, 0.18),
    "hedgehog": (1.00, 0.98, 0.88, 0.54),
    "dpfp": (0.95, 0.89, 0.74, 0.47),
    "dpfp:nu=3": (1.00, 0.99, 0.97, 0.82),
    "favor:n_dims=128": (0.51, 0.38, 0.23, 0.15),
    "taylor": (1.0, 1.0, 1.0, 1.0),
    "exact softmax": (1.0, 1.0, 1.0, 1.0),
}


def test_capacity() -> None:
    report = capacity([name for name in CAPACITIES if name != "exact softmax"])
    for name, expected in CAPACITIES.items():
        assert report.decoded[name] == pytest.approx(expected, abs=0.06)
    assert "S = 512" in str(report)


@pytest.mark.parametrize("feature_map", [None, "a map"])
def test_suggestions(feature_map) -> None:
    small = feature_map is not None
    q, k = (0.5 if small else 1.5) * normal(2, 1, 128, 1, 32)
    found = suggest(q, k, error=0.2 if small else 0.1)
    assert (found.feature_map is not None) == small
    if small:
        report = attention_report(found.feature_map, q, k)
        assert float(report[found.feature_map].frobenius) <= 0.2
        assert found.verdict.startswith(f"Take {found.feature_map}")
    else:
        assert "No random map of at most 1024 features will do" in found.verdict
        assert all(trial.error > 0.1 for trial in found.trials)
    assert "uniform" in str(found)


def test_suggestions_know_when_nothing_is_needed() -> None:
    q, k = 0.01 * normal(2, 1, 64, 1, 16)
    assert "none is needed" in suggest(q, k).verdict


@pytest.mark.parametrize("options", [{"error": 0}, {"error": math.nan}, {"most": 0}])
def test_suggestions_refuse(options) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        suggest(*normal(2, 1, 8, 1, 8), **options)
