"""The feature maps that the tests of attentions and models run through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fast_transformers.feature_maps import (
    DPFP,
    PROJECTIONS,
    T2R,
    ActivationFunctionFeatureMap,
    Centered,
    Concat,
    CosReweight,
    DenseExponentialFeatures,
    ExponentialFeatureMap,
    Favor,
    FeatureMap,
    GeneralizedRandomFeatures,
    Hedgehog,
    LogNormal,
    Normalized,
    OptimalPositiveFeatures,
    PolynomialFeatureMap,
    PolySketch,
    Projected,
    RandomFourierFeatures,
    ReBased,
    SmoothedRandomFourierFeatures,
    TaylorFeatureMap,
    elu_feature_map,
)


class Asymmetric(FeatureMap):
    """A user's map: trained weights, other features for queries than for keys, F != E."""

    def __init__(self, query_dims: int) -> None:
        super().__init__(query_dims)
        self.of_queries = nn.Linear(query_dims, 11)
        self.of_keys = nn.Linear(query_dims, 11)

    def forward_queries(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(self.of_queries(x))

    def forward_keys(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(self.of_keys(x)) + 0.1


relu = ActivationFunctionFeatureMap.factory(torch.relu)
BUILT_IN = {
    "elu": elu_feature_map,
    "favor": Favor.factory(n_dims=16),
    "rff": RandomFourierFeatures.factory(n_dims=64),
    "smoothed": SmoothedRandomFourierFeatures.factory(n_dims=9),
    "generalized": GeneralizedRandomFeatures.factory(n_dims=16),
}
# every other map and wrapper of the library: through the conformance suite and all attentions,
# with two heads where heads are told apart
CATALOGUE = {
    "exp": ExponentialFeatureMap,
    "exp, scaled": ExponentialFeatureMap.factory(scale=2.0),
    "exp, softmax": ExponentialFeatureMap.factory(softmax=True),
    "lln": LogNormal,
    "lln, heads": LogNormal.factory(heads=2, learned=True),
    "dpfp": DPFP.factory(nu=2),
    "taylor": TaylorFeatureMap,
    "taylor, first order": TaylorFeatureMap.factory(order=1, softmax_temp=0.1),
    "poly": PolynomialFeatureMap,
    "poly, degree 4": PolynomialFeatureMap.factory(degree=4),
    "rebased": ReBased,
    "rebased, tied": ReBased.factory(tied=True, beta=1.0),
    "polysketch": PolySketch.factory(sketch=6),
    "polysketch, simplex": PolySketch.factory(sketch=6, projection="simplex"),
    # its mean takes a far larger sketch to see, see test_means_and_variances.py
    "polysketch, degree 8": PolySketch.factory(sketch=6, degree=8, projection="sorf"),
    "t2r": T2R.factory(n_dims=24),
    "t2r, heads": T2R.factory(heads=2, tied=False),
    "hedgehog": Hedgehog,
    "hedgehog, joint": Hedgehog.factory(normalize="joint", tied=True),
    "hedgehog, heads": Hedgehog.factory(normalize="none", heads=2, bias=False),
    "oprf": OptimalPositiveFeatures.factory(n_dims=40),
    "oprf, heads": OptimalPositiveFeatures.factory(n_dims=40, heads=2, projection="simplex"),
    "oprf, learned": OptimalPositiveFeatures.factory(n_dims=40, learned=True),
    "sderf": DenseExponentialFeatures.factory(n_dims=40, mode="sderf"),
    "saderf": DenseExponentialFeatures.factory(n_dims=40, mode="saderf", projection="sorf"),
    "aderf": DenseExponentialFeatures.factory(n_dims=40, mode="aderf", projection="qmc"),
    "aligned": DenseExponentialFeatures.factory(n_dims=40),
    "aligned, heads": DenseExponentialFeatures.factory(n_dims=40, heads=2),
    "normalized": Normalized.factory(elu_feature_map, "l1"),
    "normalized exponentials": Normalized.factory(Favor.factory(n_dims=32), "rms"),
    "normalized inputs": Normalized.factory(RandomFourierFeatures, of="inputs"),
    "projected": Projected.factory(TaylorFeatureMap, 5),
    "projected, heads": Projected.factory(Favor.factory(n_dims=32), 5, heads=2),
    "projected, of a user's": Projected.factory(Asymmetric, 5),
    "concat": Concat.factory([elu_feature_map, DPFP], [0.3, 0.7]),
    "concat exponentials": Concat.factory([Favor.factory(n_dims=32), OptimalPositiveFeatures]),
    "centered": Centered.factory(Favor.factory(n_dims=32)),
    "centered taylor": Centered.factory(TaylorFeatureMap, heads=2, learned=True),
    "centered aligned": Centered.factory(
        DenseExponentialFeatures.factory(n_dims=40, heads=2), heads=2
    ),
    "cos": CosReweight.factory(relu, max_length=40),
    "cos of exponentials": CosReweight.factory(Centered.factory(Favor), max_length=40),
}
# every random map with every way to draw its directions
PROJECTED = {
    f"{name}, {projection}": cls.factory(projection=projection, **options)
    for name, (cls, options) in {
        "favor": (Favor, {"n_dims": 32}),
        "rff": (RandomFourierFeatures, {"n_dims": 64}),
        "smoothed": (SmoothedRandomFourierFeatures, {"n_dims": 65}),
        "generalized": (GeneralizedRandomFeatures, {"n_dims": 40}),
        "oprf": (OptimalPositiveFeatures, {"n_dims": 40}),
        "derf": (DenseExponentialFeatures, {"n_dims": 40}),
        "polysketch": (PolySketch, {"sketch": 6}),
    }.items()
    for projection in PROJECTIONS
}
ALL = {**BUILT_IN, "asymmetric": Asymmetric}
