"""How many values an attention can store and find again, without any training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attention_report import SOFTMAX
from .sample import MapLike, MapsLike, Sample, instances, named
from .table import Cell, Report
from .weights import linear_weights, softmax_weights


@dataclass(frozen=True)
class CapacityReport(Report):
    """What :func:`capacity` returns; prints as a table.

    Attributes:
        counts: how many pairs were stored.
        decoded: by name, the share of values found, one for each count.
        features: by name, F, or None.
    """

    counts: tuple[int, ...]
    decoded: dict[str, tuple[float, ...]]
    features: dict[str, int | None]

    def cells(self) -> tuple[list[str], list[list[Cell]]]:
        """Head and rows of the table."""
        rows = [[name, self.features[name], *shares] for name, shares in self.decoded.items()]
        return ["feature map", "F", *(f"S = {count}" for count in self.counts)], rows


def capacity(
    feature_maps: MapsLike,
    *,
    dims: int = 64,
    counts: Sequence[int] = (64, 128, 256, 512),
    trials: int = 8,
    seed: int = 0,
) -> CapacityReport:
    """Store S pairs of random keys and values, ask for each key, and count what comes back.

    Keys are N(0, I) of ``dims`` dimensions and serve as queries; values are codes N(0, I) of as
    many dimensions, less their mean. An answer is right if its own value has the largest cosine
    with it. After setting 1 of Schlag et al. 2021 (arXiv:2102.11174), section 6.1, where the
    projections are trained.

    Args:
        feature_maps: specs, factories, ready maps, one or several, or a dictionary from names.
        dims: E.
        counts: numbers of pairs S.
        trials: sets of pairs, each with a draw of its own.
        seed: of everything that is drawn.

    Raises:
        ValueError: for a count, a trial or dimensions below 1.
    """
    if min(*counts, trials, dims) < 1:
        raise ValueError(f"counts, trials and dims must be at least 1, got {counts}, {trials}")
    trial = [_Trial(dims, max(counts), seed * 1009 + t) for t in range(trials)]
    exact = [softmax_weights] * trials
    decoded = {SOFTMAX: tuple(_share(exact, trial, count) for count in counts)}
    features: dict[str, int | None] = {SOFTMAX: None}
    for name, source in named(feature_maps).items():
        made = [_made(source, t) for t in trial]
        weigh = [partial(linear_weights, m) for m in made]
        decoded[name] = tuple(_share(weigh, trial, count) for count in counts)
        features[name] = getattr(made[0], "feature_dims", None)
    return CapacityReport(tuple(counts), decoded, features)


class _Trial:
    """One set of pairs."""

    def __init__(self, dims: int, most: int, seed: int) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.keys = torch.randn(1, most, 1, dims, generator=generator)
        self.values = torch.randn(most, dims, generator=generator, dtype=torch.float64)

    def sample(self, count: int) -> Sample:
        return Sample(self.keys[:, :count], self.keys[:, :count])

    def decoded(self, weights: Tensor, count: int) -> float:
        """The share of values that weights (1, 1, S, S) bring back."""
        values = self.values[:count] - self.values[:count].mean(0)
        out = torch.nn.functional.normalize(weights[0, 0] @ values, dim=-1)
        codes = torch.nn.functional.normalize(values, dim=-1)
        right = (out @ codes.mT).argmax(-1) == torch.arange(count)
        return float(right.double().mean())


def _made(source: MapLike, trial: _Trial) -> Any:
    """The draw of a map for a trial; a ready map is the same in all of them."""
    sample = trial.sample(trial.keys.shape[1])
    return next(instances(source, sample.q.shape[-1], seed=trial.seed, examples=sample))


def _share(
    weigh: Sequence[Callable[[Sample], Tensor]], trials: Sequence[_Trial], count: int
) -> float:
    found = [t.decoded(w(t.sample(count)), count) for w, t in zip(weigh, trials, strict=True)]
    return sum(found) / len(found)
