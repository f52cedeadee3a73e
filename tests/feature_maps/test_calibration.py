"""Maps that are fitted to queries and keys: what fitting gains, and that it stays what it is."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fast_transformers import ops
from fast_transformers.feature_maps import (
    Centered,
    Concat,
    CosReweight,
    DenseExponentialFeatures,
    Favor,
    Moments,
    Normalized,
    OptimalPositiveFeatures,
    Projected,
    RandomFourierFeatures,
    TaylorFeatureMap,
    elu_feature_map,
    features_of,
)
from tests.support import plain_softmax

E, H = 16, 3
MODES = ["sderf", "saderf", "aderf", "aligned"]


def examples(tokens: int = 400, seed: int = 0, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Queries and keys (1, tokens, H, E) with a few strong directions, not those of the axes."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    mixing = torch.randn(2, H, E, E, generator=fixed, dtype=torch.float64) / E**0.5
    strength = torch.tensor([3.0] * 3 + [0.5] * (E - 3), dtype=torch.float64)
    means = mean * torch.randn(2, H, E, generator=fixed, dtype=torch.float64)
    x = torch.randn(2, 1, tokens, H, 1, E, generator=generator, dtype=torch.float64)
    q, k = ((x * strength) @ mixing[:, None, None])[..., 0, :] + means[:, None, None]
    return q, k


def log_variance(feature_map, q: Tensor, k: Tensor) -> float:
    """The mean logarithm of the second moment, which the fit is to minimise."""
    variance = feature_map.relative_variance(q[:, :, None], k[:, None])
    return float((1 + feature_map.n_dims * variance).log().mean())


@pytest.mark.parametrize("heads", [None, H])
@pytest.mark.parametrize("mode", MODES)
def test_x_and_y_keep_their_dot_product(mode: str, heads: int | None) -> None:
    q, k = examples(mean=0.5)
    feature_map = DenseExponentialFeatures(E, 8, mode, heads=heads).double()
    feature_map.calibrate(q, k)
    x, y = feature_map.aligned_queries(q), feature_map.aligned_keys(k)
    torch.testing.assert_close((x * y).sum(-1), (q * k).sum(-1) / 4)


def test_each_mode_is_better_than_one_number_and_the_alignment_is_best() -> None:
    q, k = examples(mean=0.3)
    new_q, new_k = examples(60, seed=1, mean=0.3)
    found = {"oprf": OptimalPositiveFeatures(E, 8, heads=H).double()}
    found |= {mode: DenseExponentialFeatures(E, 8, mode, heads=H).double() for mode in MODES}
    values = {}
    for mode, feature_map in found.items():
        feature_map.calibrate(q, k)
        values[mode] = log_variance(feature_map, new_q, new_k)
    assert max(values[mode] for mode in MODES) < values["oprf"]
    assert min(values, key=lambda mode: values[mode]) == "aligned"


@pytest.mark.parametrize("mode", MODES)
def test_a_is_the_minimum_for_the_examples(mode: str) -> None:
    q, k = examples(200)
    feature_map = DenseExponentialFeatures(E, 8, mode, heads=H).double()
    feature_map.calibrate(q, k)
    best, log_rho = log_variance(feature_map, q, k), feature_map.log_rho.clone()
    for factor in (0.9, 1.1):
        feature_map.log_rho.copy_(log_rho * factor)
        assert log_variance(feature_map, q, k) > best


def test_aligned_moments_are_equal_and_diagonal() -> None:
    q, k = torch.randn(2, 1, 400, H, E, dtype=torch.float64) * torch.linspace(0.5, 2, E)
    feature_map = DenseExponentialFeatures(E, 8, "aligned", heads=H).double()
    feature_map.calibrate(q, k)
    of_queries = Moments.of(feature_map.aligned_queries(q), H).second
    of_keys = Moments.of(feature_map.aligned_keys(k), H).second
    diagonal = of_queries.diagonal(dim1=-2, dim2=-1)
    assert (of_queries - diagonal.diag_embed()).abs().max() < 1e-6 * diagonal.max()
    torch.testing.assert_close(of_queries, of_keys, rtol=1e-5, atol=1e-6 * float(diagonal.max()))


@pytest.mark.parametrize("mode", ["sderf", "aderf", "aligned"])
def test_the_transform_does_not_depend_on_the_signs_of_eigenvectors(mode, monkeypatch) -> None:
    """Which LAPACK leaves open, and gives otherwise with another number of threads."""
    q, k = examples(mean=0.3)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(E // 2)
    eigh, svd = torch.linalg.eigh, torch.linalg.svd

    class Turned(NamedTuple):
        eigenvalues: Tensor
        eigenvectors: Tensor

    def calibrated() -> DenseExponentialFeatures:
        feature_map = DenseExponentialFeatures(E, 8, mode, heads=H).double()
        feature_map.calibrate(q, k)
        return feature_map

    before = calibrated()
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda x: Turned(eigh(x).eigenvalues, eigh(x).eigenvectors * signs)
    )
    monkeypatch.setattr(
        torch.linalg,
        "svd",
        lambda x: (svd(x).U * signs, svd(x).S, signs[:, None] * svd(x).Vh),
    )
    after = calibrated()
    for name in ("of_queries", "of_keys", "log_rho"):
        torch.testing.assert_close(after.get_buffer(name), before.get_buffer(name))
    for matrix in before.of_queries:
        assert (matrix.gather(0, matrix.abs().argmax(0, keepdim=True)) > 0).all()


def test_moments_that_cannot_be_inverted() -> None:
    """Fewer directions than dimensions: the features stay finite and unbiased everywhere."""
    q, k = examples()
    q[..., 4:] = 0
    feature_map = DenseExponentialFeatures(E, 8).double()
    feature_map.calibrate(q, k)
    other_q, other_k = examples(5, seed=3)
    x, y = feature_map.aligned_queries(other_q), feature_map.aligned_keys(other_k)
    torch.testing.assert_close((x * y).sum(-1), (other_q * other_k).sum(-1) / 4)


def test_before_it_is_calibrated_every_mode_is_the_isotropic_map() -> None:
    maps = [DenseExponentialFeatures(E, 8, mode, generator=1) for mode in MODES]
    maps.append(OptimalPositiveFeatures(E, 8, generator=1))
    x = torch.randn(5, E)
    for feature_map in maps[1:]:
        torch.testing.assert_close(feature_map.forward_keys(x), maps[0].forward_keys(x))
    unit = torch.randn(1, 50_000, 1, E, generator=torch.Generator().manual_seed(0))
    before = maps[-1].a.clone()
    maps[-1].calibrate(unit, unit.flip(1))
    torch.testing.assert_close(maps[-1].a, before, rtol=0.02, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_map_per_head_is_as_many_maps(mode: str) -> None:
    q, k = examples(mean=0.3)
    together = Centered(E, DenseExponentialFeatures.factory(8, mode, heads=H), heads=H).double()
    together.calibrate(q, k)
    for head in range(H):
        alone = Centered(E, DenseExponentialFeatures.factory(8, mode)).double()
        alone.inner.omega.copy_(together.inner.omega)
        alone.calibrate(q[:, :, [head]], k[:, :, [head]])
        torch.testing.assert_close(
            alone.kernel(q[:, :, head], k[:, :, head]), together.kernel(q, k)[:, :, head]
        )
        torch.testing.assert_close(
            alone.relative_variance(q[:, :, head], k[:, :, head]),
            together.relative_variance(q, k)[:, :, head],
        )


def test_moments_of_several_texts_may_be_averaged() -> None:
    q, k = examples()
    parts = [Moments.of(x, H) for x in q.chunk(4, 1)]
    mean = Moments(*(torch.stack(x).mean(0) for x in zip(*parts, strict=True)))
    whole = Moments.of(q, H)
    torch.testing.assert_close(tuple(mean), tuple(whole))
    a, b = (DenseExponentialFeatures(E, 8, heads=H).double() for _ in range(2))
    a.calibrate(q, k)
    b.set_moments(mean, Moments.of(k, H))
    torch.testing.assert_close(a.a, b.a)
    with pytest.raises(ValueError, match=r"means over tokens, got none"):
        Moments.of(q[:, :0])
    with pytest.raises(ValueError, match=r"made with heads=2, got inputs of shape"):
        Moments.of(q, 2)


def test_a_transform_can_be_set() -> None:
    feature_map = DenseExponentialFeatures(E, 8).double()
    matrix = torch.randn(E, E, dtype=torch.float64) + 3 * torch.eye(E)
    feature_map.set_transform(matrix, torch.full((E,), -0.1))
    x, y = torch.randn(2, 5, E, dtype=torch.float64)
    products = feature_map.aligned_queries(x) * feature_map.aligned_keys(y)
    torch.testing.assert_close(products.sum(-1), (x * y).sum(-1) / 4)
    with pytest.raises(ValueError, match=r"every A must be below 1/8, got up to 0\.125"):
        feature_map.set_transform(matrix, torch.full((E,), 0.125))


@pytest.mark.parametrize("heads", [None, H])
def test_centring_changes_no_weight_of_the_softmax_kernel(heads: int | None) -> None:
    q, k = examples(50, mean=1.0)
    feature_map = Centered(E, Favor, heads=heads).double()
    feature_map.calibrate(q, k)
    assert feature_map.of_queries.abs().max() > 0.1
    torch.testing.assert_close(feature_map.kernel(q, k), ((q * k).sum(-1) / 4).exp())


def test_centring_leaves_no_denominator_to_eps() -> None:
    """Means so large that the factor of a query, which cancels, would be e^-60."""
    q, k = examples(30)
    q, k = 0.3 * q + 4, 0.3 * k - 4
    feature_map = Centered(E, TaylorFeatureMap).double()
    feature_map.calibrate(q, k)
    assert (q * feature_map.of_keys).sum(-1).max() / 4 < -50
    v = torch.randn(1, 30, H, 5, dtype=torch.float64)
    features = features_of(feature_map)
    found = ops.linear_attention(q, k, v, features).values
    exact = ops.linear_attention(q, k, v, features, eps=0.0).values
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


def weights_of(feature_map, q: Tensor, k: Tensor) -> Tensor:
    products = torch.einsum(
        "nlhf,nshf->nhls", feature_map.forward_queries(q), feature_map.forward_keys(k)
    )
    return products / products.sum(-1, keepdim=True)


def divergence(feature_map, q: Tensor, k: Tensor) -> float:
    """Mean KL of softmax attention to the map's."""
    exact = plain_softmax(q, k, k)[1]
    return float((exact * (exact / weights_of(feature_map, q, k)).log()).sum(-1).mean())


def test_centring_pays_where_means_are_large() -> None:
    """Statistics from some tokens, measured on others."""
    q, k = (0.4 * x for x in examples(500, mean=3.0))
    new_q, new_k = (0.4 * x for x in examples(100, seed=1, mean=3.0))
    taylor, centered = TaylorFeatureMap(E), Centered(E, TaylorFeatureMap, heads=H)
    centered = centered.double()
    centered.calibrate(q, k)
    assert divergence(centered, new_q, new_k) < divergence(taylor, new_q, new_k) / 6
    plain, dense = (
        Centered(E, DenseExponentialFeatures.factory(64, heads=H, generator=0), heads=H).double()
        for _ in range(2)
    )
    plain.inner.calibrate(q, k)
    dense.calibrate(q, k)
    assert (
        dense.relative_variance(new_q, new_k).log().mean()
        < plain.relative_variance(new_q, new_k).log().mean() - 0.5
    )


def test_learned_centres_get_gradients_and_start_where_calibration_puts_them() -> None:
    q, k = (x.float() for x in examples(40, mean=1.0))
    feature_map = Centered(E, TaylorFeatureMap, heads=H, learned=True)
    feature_map.calibrate(q, k)
    torch.testing.assert_close(feature_map.of_keys.detach(), k.mean((0, 1)))
    loss = divergence_with_gradients(feature_map, q, k)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in feature_map.parameters())
    optimizer = torch.optim.Adam(feature_map.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        divergence_with_gradients(feature_map, q, k).backward()
        optimizer.step()
    assert divergence_with_gradients(feature_map, q, k) < loss


def divergence_with_gradients(feature_map, q: Tensor, k: Tensor) -> Tensor:
    exact = plain_softmax(q, k, k)[1]
    return -(exact * weights_of(feature_map, q, k).log()).sum(-1).mean()


def test_learned_numbers_stay_possible() -> None:
    """Steps that are far too long leave A below 1/8."""
    q, k = (x.float() for x in examples(30))
    feature_map = OptimalPositiveFeatures(E, 8, heads=H, learned=True)
    before = feature_map.log_rho.detach().clone()
    optimizer = torch.optim.Adam(feature_map.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        weights_of(feature_map, q, k).square().mean().backward()
        optimizer.step()
    assert (feature_map.log_rho - before).abs().max() > 1
    assert (feature_map.a < 1 / 8).all()
    feature_map.calibrate(q, k)
    fixed = OptimalPositiveFeatures(E, 8, heads=H)
    fixed.calibrate(q, k)
    torch.testing.assert_close(feature_map.log_rho.detach(), fixed.log_rho)


def test_wrappers_calibrate_what_is_inside() -> None:
    q, k = (x.float() for x in examples(mean=0.5))
    derf = DenseExponentialFeatures.factory(8)
    for wrapper in (
        Normalized(E, derf),
        Normalized(E, derf, of="inputs"),
        Projected(E, derf, E),
        Concat(E, [Favor, derf]),
        CosReweight(E, Centered.factory(derf)),
    ):
        before = {name: x.clone() for name, x in wrapper.state_dict().items()}
        wrapper.calibrate(q, k)
        changed = {
            n.split(".")[-1] for n, x in wrapper.state_dict().items() if (x != before[n]).any()
        }
        assert {"log_rho", "of_queries", "of_keys"} <= changed


def test_what_does_not_fit_together() -> None:
    with pytest.raises(ValueError, match=r"softmax kernel.*RandomFourierFeatures does not"):
        Centered(E, RandomFourierFeatures)
    with pytest.raises(ValueError, match=r"heads must be the same in Centered .* got 2 and 3"):
        Centered(E, DenseExponentialFeatures.factory(heads=2), heads=3)
    with pytest.raises(ValueError, match="CosReweight needs positions, so it must be outermost"):
        Concat(E, [elu_feature_map, CosReweight])
    with pytest.raises(TypeError, match="derive from FeatureMap, got Stranger"):
        Normalized(E, lambda dims: Stranger())
    with pytest.raises(ValueError, match=r"weights must be 1 positive numbers.*got \[0\]"):
        Concat(E, [elu_feature_map], [0])
    with pytest.raises(ValueError, match="one map at least"):
        Concat(E, [])
    with pytest.raises(ValueError, match=r"mode must be one of sderf, .* got 'derf'"):
        DenseExponentialFeatures(E, mode="derf")
    with pytest.raises(ValueError, match=r"heads must be at least 1, .* got 0"):
        DenseExponentialFeatures(E, heads=0)
    with pytest.raises(ValueError, match=r"heads=3, got inputs of shape \(1, 5, 2, 16\)"):
        DenseExponentialFeatures(E, heads=3).forward_keys(torch.randn(1, 5, 2, E))


class Stranger:
    def new_feature_map(self) -> None: ...

    def forward_queries(self, x: Tensor) -> Tensor:
        return x

    forward_keys = forward_queries
