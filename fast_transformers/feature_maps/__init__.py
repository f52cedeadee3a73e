"""Kernel feature maps: phi such that phi(q).phi(k) stands for softmax's exp(q.k)."""

from .adapt import build_feature_map, draw, features_of
from .base import ActivationFunctionFeatureMap, FeatureMap, elu_feature_map
from .favor import Favor
from .fourier import RandomFourierFeatures, SmoothedRandomFourierFeatures
from .generalized import GeneralizedRandomFeatures
from .projections import PROJECTIONS, orthogonal_random_matrix_
from .random import RandomFeatureMap

__all__ = [
    # the interface
    "FeatureMap",
    "RandomFeatureMap",
    # maps
    "ActivationFunctionFeatureMap",
    "Favor",
    "GeneralizedRandomFeatures",
    "RandomFourierFeatures",
    "SmoothedRandomFourierFeatures",
    "elu_feature_map",
    # what attentions do with a map
    "build_feature_map",
    "draw",
    "features_of",
    # how random maps draw their directions
    "PROJECTIONS",
    "orthogonal_random_matrix_",
]
