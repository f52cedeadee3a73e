"""What a call is asked for, apart from its tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .encode import Encoder
from .features import Features
from .formula import Formula, Kind
from .kinds import KINDS


class Settings(NamedTuple):
    """Constants of one call of a pass.

    Attributes:
        kind: name of the feature map in :data:`~.kinds.KINDS`, "" for a user's functions.
        numbers: of the kind, see there.
        chunk: tokens per chunk; 0 lets the passes choose.
        eps: added to the denominator of features that are no exponentials.
        normalised: whether the values are divided by the sum of their weights.
        keep: whether a backward pass may follow.
    """

    kind: str = ""
    numbers: tuple[float, ...] = ()
    chunk: int = 0
    eps: float = 0.0
    normalised: bool = True
    keep: bool = False


class Call(NamedTuple):
    """The settings with the feature map itself, its formula if it has one, the dtype of the sums
    and of the output, and the tokens per chunk (0 lets the pass choose)."""

    settings: Settings
    features: Features
    kind: Kind | None
    dtype: torch.dtype
    chunk: int

    @classmethod
    def of(
        cls,
        settings: Settings,
        features: Features | None,
        projection: Tensor | None,
        dtype: torch.dtype,
        chunk: int,
    ) -> Call:
        """``features`` are the user's functions, None for a map that has a name."""
        kind = None
        if features is None:
            formula = Formula(settings.kind, projection, settings.numbers)
            kind = KINDS[formula.kind](formula, dtype)
            kind.in_blocks = True
            features = Features(exponential=kind.exponential, any_heads=True, formula=formula)
        return cls(settings, features, kind, dtype, settings.chunk or chunk)

    def encoder(self, x: Tensor, **options: Any) -> Encoder:
        again = self.settings.keep
        return Encoder(self.features, self.kind, self.dtype, x, again=again, **options)

    def lift(self, seen: bool) -> tuple[float, bool]:
        """What is added to denominators, and whether they are known to exceed 0 then.

        ``seen`` says that every query is known to see a key.
        """
        eps = 0.0 if self.features.exponential else self.settings.eps
        positive = self.kind is not None and self.kind.positive
        return eps, positive and (eps > 0 or (seen and self.features.exponential))

    @property
    def whole(self) -> bool:
        """Whether the heads of a sequence must stay together: a user's map may tell them apart."""
        return not self.features.any_heads
