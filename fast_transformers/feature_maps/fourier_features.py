"""The older library's path of the random maps; the maps live in files of their own."""

from .favor import Favor
from .fourier import RandomFourierFeatures, SmoothedRandomFourierFeatures
from .generalized import GeneralizedRandomFeatures
from .projections import orthogonal_random_matrix_

__all__ = [
    "Favor",
    "GeneralizedRandomFeatures",
    "RandomFourierFeatures",
    "SmoothedRandomFourierFeatures",
    "orthogonal_random_matrix_",
]
