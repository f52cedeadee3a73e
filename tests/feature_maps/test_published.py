"""Formulas and figures of the papers, and slips that public implementations of them contain."""

from __future__ import annotations

import math

import pytest
import torch

from fast_transformers.attention import LinearAttention
from fast_transformers.feature_maps import (
    DPFP,
    ActivationFunctionFeatureMap,
    CosReweight,
    DenseExponentialFeatures,
    ExponentialFeatureMap,
    Favor,
    GeneralizedRandomFeatures,
    Hedgehog,
    LogNormal,
    OptimalPositiveFeatures,
    PolynomialFeatureMap,
    PolySketch,
    RandomFourierFeatures,
    ReBased,
    TaylorFeatureMap,
    elu_feature_map,
)
from fast_transformers.feature_maps.dense import optimal_a
from fast_transformers.masking import FullMask, LengthMask


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("square", "even", "positive", "optimal"),
    [(1, 0.44, 0.81, 0.75), (2, 1.42, 1.73, 1.55), (4, 3.17, 3.47, 2.87), (8, 6.65, 6.95, 5.04)],
)
def test_decades_of_variance_of_orthogonal_vectors(square, even, positive, optimal) -> None:
    """log10 of the relative variance per direction, 64 dimensions, |x|^2 = |y|^2, x.y = 0."""
    x, y = torch.eye(64, dtype=torch.float64)[:2] * square**0.5
    options = {"softmax_temp": 1.0}
    maps = [
        (Favor(64, 2, **options), even),
        (RandomFourierFeatures(64, 2, **options), even),
        (OptimalPositiveFeatures(64, 1, sum_norm=0.0, **options), positive),
        (OptimalPositiveFeatures(64, 1, sum_norm=2 * square, **options), optimal),
        (DenseExponentialFeatures(64, 1, **options).double(), None),
    ]
    for feature_map, expected in maps:
        found = float(feature_map.relative_variance(x, y).log10())
        if expected is not None:
            assert found == pytest.approx(expected, abs=0.006)


def test_optimal_features_have_the_variance_that_makes_them_optimal() -> None:
    """A slip in A, such as a sum that is not divided by E, leaves the mean as it is and gives a
    variance that is thousands of times larger."""
    x, y = torch.eye(16, dtype=torch.float64)[:2]
    feature_map = OptimalPositiveFeatures(16, 1, softmax_temp=1.0, sum_norm=2.0).double()
    best = float(feature_map.relative_variance(x, y))
    one_sided = OptimalPositiveFeatures(16, 1, softmax_temp=1.0, sum_norm=0.0)
    assert float(one_sided.relative_variance(x, y)) == pytest.approx(math.expm1(2), rel=1e-6)
    assert best < math.expm1(2)
    rho = (((4 + 16) ** 2 + 8 * 16 * 2) ** 0.5 - 4 - 16) / (4 * 2)
    theorem = ((1 + rho) / (2 * rho**0.5)) ** 16 * math.exp(2 * rho) - 1
    assert best == pytest.approx(theorem, rel=1e-6)
    for factor in (0.8, 1.2):
        other = OptimalPositiveFeatures(16, 1, softmax_temp=1.0, sum_norm=2.0).double()
        other.log_rho.mul_(factor)
        assert float(other.relative_variance(x, y)) > best
    assert float(optimal_a(torch.tensor(0.0))) == 0.0
    s = torch.linspace(0, 100, 50)
    rho = 1 / (1 - 8 * optimal_a(s))  # the other form of the same minimum
    closed = ((2 * s + 1).square() + 8 * s).sqrt() - 2 * s - 1
    torch.testing.assert_close((4 * s * rho)[1:], closed[1:], rtol=1e-4, atol=1e-4)


def test_dpfp_uses_the_negative_entries() -> None:
    """-relu(x) in the place of relu(-x) halves the rank and makes features negative."""
    feature_map = DPFP(64)
    phi = feature_map(normal(4000, 64))
    assert int(torch.linalg.matrix_rank(phi)) == phi.shape[-1] == 128
    assert phi.min() == 0
    x = torch.tensor([[1.0, -2.0, 3.0]])
    z = [1.0, 0.0, 3.0, 0.0, 2.0, 0.0]
    expected = [[z[i] * z[i - j] for j in (1, 2) for i in range(6)]]
    assert DPFP(3, nu=2)(x).tolist() == expected
    with pytest.raises(ValueError, match=r"nu of DPFP .* must be 1\.\.5, got 6"):
        DPFP(3, nu=6)


def test_taylor_features_are_packed_and_exact() -> None:
    x, y = normal(2, 50, 16)
    feature_map = TaylorFeatureMap(16)
    assert feature_map(x).shape[-1] == 1 + 16 + 16 * 17 // 2 == 153
    z = (x * y).sum(-1) / 4
    torch.testing.assert_close((feature_map(x) * feature_map(y)).sum(-1), 1 + z + z**2 / 2)
    assert feature_map.kernel(x, y).min() >= 0.5
    first = TaylorFeatureMap(16, order=1)
    torch.testing.assert_close((first(x) * first(y)).sum(-1), 1 + z)


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_polynomials_weigh_products_by_their_number(degree: int) -> None:
    """Without the roots of 2 off the diagonal the square would be a mixture of two kernels."""
    x, y = normal(2, 50, 6)
    feature_map = PolynomialFeatureMap(6, degree, softmax_temp=1.0)
    assert feature_map(x).shape[-1] == math.comb(6 + degree - 1, degree)
    found = (feature_map(x) * feature_map(y)).sum(-1)
    torch.testing.assert_close(found, (x * y).sum(-1) ** degree)


def test_a_sketch_has_the_degree_that_was_asked_for() -> None:
    x = normal(1, 16)
    for degree in (4, 8, 16):
        feature_map = PolySketch(16, 8, degree, normalize=False, generator=1).double()
        ratio = feature_map(2 * x).norm() / feature_map(x).norm()
        assert float(ratio) == pytest.approx(2**degree)
        assert feature_map.feature_dims == 8 * 9 // 2
    with pytest.raises(ValueError, match="must be 4, 8 or 16, got 2"):
        PolySketch(16, degree=2)


@pytest.mark.parametrize(("degree", "sketch"), [(4, 16), (4, 32), (4, 64), (8, 16)])
def test_the_bias_of_a_sketch(degree: int, sketch: int) -> None:
    """(1 + 8/r) for degree 4 of parallel vectors, and the same again for degree 8."""
    x = normal(1, 16)
    x = x / x.norm()
    feature_map = PolySketch(16, sketch, degree, softmax_temp=1.0, normalize=False)
    m = 9 / sketch + (1 - 1 / sketch)
    if degree == 8:
        m = 9 * m**2 / sketch + (1 - 1 / sketch) * m**2
    assert float(feature_map.kernel(x, x)) == pytest.approx(m)


def test_rebased_normalises_and_its_start_can_be_monotone() -> None:
    x, y = normal(2, 200, 16)
    norm = torch.nn.functional.layer_norm
    z = (norm(x, (16,)) * norm(y, (16,))).sum(-1)
    even, monotone = ReBased(16), ReBased(16, beta=1.0)
    torch.testing.assert_close(even.kernel(x, y), z.square() / 16)
    torch.testing.assert_close(monotone.kernel(x, y), (z + 16).square() / 16)
    torch.testing.assert_close(even.kernel(x, -y), even.kernel(x, y))
    assert torch.equal(monotone.kernel(x, y).argsort(), z.argsort())


def test_the_three_hedgehogs_are_three_kernels() -> None:
    x, y = normal(2, 8, 16)
    softmax, joint, plain = (
        Hedgehog(16, normalize=n).double() for n in ("softmax", "joint", "none")
    )
    expected = x.softmax(-1) * y.softmax(-1) + (-x).softmax(-1) * (-y).softmax(-1)
    torch.testing.assert_close(softmax.kernel(x, y), expected.sum(-1))
    sums = 2 * (x + y).cosh().sum(-1)
    torch.testing.assert_close(plain.kernel(x, y), sums)
    torch.testing.assert_close(
        joint.kernel(x, y), sums / (4 * x.cosh().sum(-1) * y.cosh().sum(-1))
    )
    with pytest.raises(ValueError, match="softmax, joint or none, got 'l2'"):
        Hedgehog(16, normalize="l2")


def test_one_constant_per_key_is_a_different_kernel_and_one_per_query_is_not() -> None:
    q, k = normal(2, 12, 16)
    plain, normalised = ExponentialFeatureMap(16), ExponentialFeatureMap(16, softmax=True)

    def weights(of_queries, of_keys):  # type: ignore[no-untyped-def]
        products = of_queries(q) @ of_keys(k).mT
        return products / products.sum(-1, keepdim=True)

    exact = weights(plain, plain)
    torch.testing.assert_close(weights(normalised, plain), exact)
    assert (weights(plain, normalised) - exact).abs().max() > 0.02


def test_log_normal_matches_moments_of_examples_that_it_was_shown_and_no_others() -> None:
    feature_map = LogNormal(8).double()
    q, k = 1.5 * normal(4, 50, 2, 8), 0.7 * normal(4, 50, 2, 8, seed=1) + 0.2
    feature_map.calibrate(q, k)
    s = ((q.std() ** 2 * k.std() ** 2 + 0.354870) / (2 * 0.148552)) ** 0.5
    torch.testing.assert_close(feature_map.alpha, (s / q.std())[None])
    torch.testing.assert_close(feature_map.beta, (s / k.std())[None])
    before = feature_map.forward_keys(k[:1, :3])
    feature_map.train()
    feature_map.forward_keys(100 * k)  # changes nothing, in training either
    feature_map.new_feature_map()
    torch.testing.assert_close(feature_map.forward_keys(k)[:1, :3], before)


def test_cosine_weights_use_the_length_that_they_were_made_for() -> None:
    """With the length of the call in its place a token would change when others follow."""
    relu = ActivationFunctionFeatureMap.factory(torch.relu)
    feature_map = CosReweight(8, relu, max_length=20)
    x, y = normal(2, 1, 20, 1, 8)
    x, y = (feature_map.add_positions(v) for v in (x, y))
    q, k = feature_map.forward_queries(x)[0, :, 0], feature_map.forward_keys(y)[0, :, 0]
    i = torch.arange(20, dtype=torch.float64)
    cosine = (math.pi * (i[:, None] - i) / 40).cos()
    inner = x[0, :, 0, :8].relu() @ y[0, :, 0, :8].relu().mT
    torch.testing.assert_close(q @ k.mT, inner * cosine)
    assert (cosine > 0).all()
    torch.testing.assert_close(feature_map.add_positions(x[:, :5, :, :8]), x[:, :5])
    torch.testing.assert_close(feature_map.add_positions(x[:, 5:6, :, :8], 5), x[:, 5:6])
    by_elu = CosReweight(8, elu_feature_map, max_length=20).double()
    both = by_elu.forward_queries(x)[0, :, 0] @ by_elu.forward_keys(y)[0, :, 0].mT
    elu = elu_feature_map(8)
    torch.testing.assert_close(both, elu(x[0, :, 0, :8]) @ elu(y[0, :, 0, :8]).mT * cosine)
    with pytest.raises(ValueError, match="made for 20 tokens, got position 20"):
        feature_map.add_positions(x[:, :1, :, :8], 20)
    with pytest.raises(ValueError, match="got position 20"):
        feature_map.add_positions(x[:, :1, :, :8], torch.tensor(20))
    with pytest.raises(ValueError, match=r"cosine and sine.*call add_positions\(x\) first"):
        feature_map.forward_keys(x[..., :8])


def test_cosine_weights_of_padded_sequences_refuse_what_is_too_long() -> None:
    """Weights beyond would be negative. What a mask leaves out has no position."""
    attention = LinearAttention(8, CosReweight.factory(max_length=4))
    q, k, v = (x.float() for x in normal(3, 2, 6, 1, 8))
    everything, four = (
        LengthMask(torch.tensor([6, 2])),
        LengthMask(torch.tensor([4, 2]), max_len=6),
    )
    attention(q, k, v, FullMask(6), four, four)
    with pytest.raises(ValueError, match="made for 4 tokens, got position 5"):
        attention(q, k, v, FullMask(6), everything, everything)


def test_relu_features_estimate_the_arc_cosine_kernel() -> None:
    x, y = torch.eye(2, dtype=torch.float64)
    feature_map = GeneralizedRandomFeatures(2, 1, softmax_temp=1.0)
    assert float(feature_map.kernel(x, y)) == pytest.approx(1 / (2 * math.pi))
    assert float(feature_map.kernel(x, x)) == pytest.approx(1 / 2)
    # E relu(u)^2 relu(v)^2 of independent u and v is 1/4
    assert float(feature_map.relative_variance(x, y)) == pytest.approx(math.pi**2 - 1)
    smooth = GeneralizedRandomFeatures(2, 1, softmax_temp=1.0, kernel_fn=torch.sigmoid)
    w = normal(1_000_000, 2)
    terms = (w @ x).sigmoid() * (w @ y).sigmoid()
    assert float(smooth.relative_variance(x, y)) == pytest.approx(
        float(terms.var() / terms.mean() ** 2), rel=0.01
    )


@pytest.mark.parametrize(
    ("make", "rank"), [(elu_feature_map, 0.50), (Hedgehog, 0.87), (TaylorFeatureMap, 0.90)]
)
def test_rank_correlation_with_the_logits(make, rank) -> None:
    """Of weights and dot products over the keys of a query: normal inputs, 64 dimensions."""
    q, k = (normal(8, 256, 64, seed=s) for s in (0, 1))
    logits = q @ k.mT
    feature_map = make(64).double()
    weights = feature_map.forward_queries(q) @ feature_map.forward_keys(k).mT
    ranks = [x.argsort(-1).argsort(-1).double() for x in (logits, weights)]
    ranks = [(r - r.mean(-1, keepdim=True)) / r.std(-1, keepdim=True) for r in ranks]
    found = (ranks[0] * ranks[1]).mean(-1).mean()
    assert float(found) == pytest.approx(rank, abs=0.03)
