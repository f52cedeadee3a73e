"""Kernel feature maps: phi such that phi(q).phi(k) stands for softmax's exp(q.k)."""

from .adapt import build_feature_map, draw, features_of, with_positions
from .base import ActivationFunctionFeatureMap, FeatureMap, elu_feature_map
from .centered import Centered
from .concat import Concat
from .cosine import CosReweight
from .dense import DenseExponentialFeatures, OptimalPositiveFeatures
from .dpfp import DPFP
from .exponential import ExponentialFeatureMap, LogNormal
from .favor import Favor
from .fourier import RandomFourierFeatures, SmoothedRandomFourierFeatures
from .generalized import GeneralizedRandomFeatures
from .moments import Moments
from .polynomial import PolynomialFeatureMap, ReBased, TaylorFeatureMap
from .polysketch import PolySketch
from .projected import Projected
from .projections import PROJECTIONS, orthogonal_random_matrix_
from .random import RandomFeatureMap
from .trained import T2R, Hedgehog
from .wrappers import Normalized

__all__ = [
    # the interface
    "FeatureMap",
    "RandomFeatureMap",
    # of one function of each entry
    "ActivationFunctionFeatureMap",
    "ExponentialFeatureMap",
    "LogNormal",
    "elu_feature_map",
    # expansions
    "DPFP",
    "PolynomialFeatureMap",
    "ReBased",
    "TaylorFeatureMap",
    # random
    "DenseExponentialFeatures",
    "Favor",
    "GeneralizedRandomFeatures",
    "OptimalPositiveFeatures",
    "PolySketch",
    "RandomFourierFeatures",
    "SmoothedRandomFourierFeatures",
    # trained
    "Hedgehog",
    "T2R",
    # made of other maps
    "Centered",
    "Concat",
    "CosReweight",
    "Normalized",
    "Projected",
    # what attentions do with a map
    "build_feature_map",
    "draw",
    "features_of",
    "with_positions",
    # how random maps draw their directions, and what some are fitted to
    "Moments",
    "PROJECTIONS",
    "orthogonal_random_matrix_",
]
