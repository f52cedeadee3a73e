"""A map and a size for given queries and keys, or the advice not to take a random one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..specs import parse_feature_map
from .attention_report import SOFTMAX, UNIFORM, report_of
from .kernel_report import claims, some_pairs
from .measures import median
from .sample import MapLike, Sample, halves, instances, is_random, make_sample
from .scale import ScaleReport, scale_of
from .table import Cell, Report

SIZES = (64, 256)  # features that random maps are tried with before the size is chosen
RANDOM = (
    "favor:n_dims={n}",
    "oprf:n_dims={n}",
    "centered:inner='derf:n_dims={n}'",
    "generalized:n_dims={n}",
)
FIXED = ("elu", "relu", "dpfp:nu=2", "hedgehog", "taylor", "centered:inner=taylor")
HEAD = (
    "feature map", "F", "Frobenius", "KL", "would need", "by variance", "good enough",
)  # fmt: skip


class Trial(NamedTuple):
    """A map that was tried.

    Attributes:
        spec: of the map. features: F.
        error: median over the heads of |W - P| / |P|. kl: the median KL divergence.
        needed: features at which the error would be the one asked for, by the decrease of the
            measured error from 64 to 256 features; infinite if it does not decrease. None for
            maps whose size is fixed.
        by_variance: features at which the relative standard deviation of a median pair would be
            the error asked for, in closed form; NaN if it is not known.
    """

    spec: str
    features: int
    error: float
    kl: float
    needed: float | None
    by_variance: float


@dataclass(frozen=True)
class Suggestion(Report):
    """What :func:`suggest` returns; prints as a verdict and the numbers behind it.

    Attributes:
        feature_map: spec of the map to take, or None if none is good enough.
        features: F of that map, or None.
        verdict: what to do, in a sentence or two.
        error: the error asked for.
        uniform, uniform_kl: error and KL divergence of uniform attention.
        trials: what was tried.
        scale: of the queries and keys.
    """

    feature_map: str | None
    features: int | None
    verdict: str
    error: float
    uniform: float
    uniform_kl: float
    trials: tuple[Trial, ...]
    scale: ScaleReport

    def cells(self) -> tuple[list[str], list[list[Cell]]]:
        """Head and rows of the table."""
        rows: list[list[Cell]] = [
            [SOFTMAX, None, 0.0, 0.0, None, None, ""],
            [UNIFORM, None, self.uniform, self.uniform_kl, None, None, ""],
        ]
        for trial in self.trials:
            fits = "yes" if trial.error <= self.error else "no"
            rows.append([*trial[:4], _whole(trial.needed), _whole(trial.by_variance), fits])
        return list(HEAD), rows

    def markdown(self) -> str:
        return f"{self.verdict}\n\n{super().markdown()}"

    def __str__(self) -> str:
        return f"{self.verdict}\n\n{super().__str__()}"


def suggest(
    q: Tensor,
    k: Tensor,
    error: float = 0.3,
    *,
    most: int = 1024,
    attn_mask: Any = None,
    key_lengths: Any = None,
    softmax_temp: float | None = None,
    draws: int = 4,
    seed: int = 0,
) -> Suggestion:
    """The smallest map whose attention is within ``error`` of softmax attention on q and k.

    Random maps are measured at 64 and 256 features; where the decrease says that the error is
    reached by at most ``most`` features they are measured there, too. The smallest map that was
    measured to be good enough is suggested, and nothing else is.

    Maps with statistics are calibrated on the second half of the sequences and all are measured
    on the first; a single sequence has to serve for both, which flatters those maps.

    Args:
        q: (N, L, H, E). k: (N, S, H, E).
        error: |W - P| / |P| of the matrices of weights, as a median over the heads.
        most: features that are affordable. (F features cost about as much as softmax attention
            to sequences of 4 F tokens.)
        attn_mask, key_lengths, softmax_temp, draws, seed: see
            :func:`~fast_transformers.diagnostics.attention_report`.

    Raises:
        ValueError: for an ``error`` that is not positive, or shapes that do not fit.
    """
    sample = make_sample(
        q, k, attn_mask=attn_mask, key_lengths=key_lengths, softmax_temp=softmax_temp
    )
    return suggest_of(*halves(sample), error, most=most, draws=draws, seed=seed)


def suggest_of(
    sample: Sample,
    examples: Sample,
    error: float = 0.3,
    *,
    most: int = 1024,
    draws: int = 4,
    seed: int = 0,
) -> Suggestion:
    """:func:`suggest` of samples: one to measure on, and one to calibrate on."""
    if not error > 0 or most < 1:
        raise ValueError(f"error and most must be positive, got {error} and {most}")
    search = _Search(sample, examples, error, draws, seed)
    for spec in FIXED:
        search.add({spec: None})
    for template in RANDOM:
        search.add_sizes(template, most)
    fitting = [t for t in search.trials if t.error <= error and t.features <= most]
    best = min(fitting, key=lambda t: (t.features, t.error), default=None)
    scale = scale_of(sample)
    found = (None, None) if best is None else (best.spec, best.features)
    verdict = _verdict(best, search, error, most, scale)
    uniform = search.uniform, search.uniform_kl
    return Suggestion(*found, verdict, error, *uniform, tuple(search.trials), scale)


class _Search:
    """The maps tried so far."""

    def __init__(
        self, sample: Sample, examples: Sample, error: float, draws: int, seed: int
    ) -> None:
        self.sample, self.examples, self.error = sample, examples, error
        self._draws, self._seed = draws, seed
        self.trials: list[Trial] = []
        self.uniform = self.uniform_kl = math.nan

    def add(self, specs: dict[str, float | None]) -> list[Trial]:
        """Measure maps, each beside what it is known to need."""
        maps: dict[str, MapLike] = {spec: spec for spec in specs}
        report = report_of(maps, self.sample, self.examples, draws=self._draws, seed=self._seed)
        uniform = report[UNIFORM]
        self.uniform, self.uniform_kl = (median(x) for x in (uniform.frobenius, uniform.kl))
        new = []
        for row in report.rows[2:]:
            error, kl = (median(x) for x in (row.measures.frobenius, row.measures.kl))
            variance = self._by_variance(row.name)
            new.append(Trial(row.name, row.features or 0, error, kl, specs[row.name], variance))
        self.trials += new
        return new

    def add_sizes(self, template: str, most: int) -> None:
        """Measure a random map at the usual sizes, and at the one that should do."""
        sizes = [n for n in SIZES if n <= most] or [most]
        new = self.add({template.format(n=n): math.inf for n in sizes})
        needed = _needed(new, self.error)
        self.trials[-len(new) :] = [t._replace(needed=needed) for t in new]
        enough = 2 ** math.ceil(math.log2(needed)) if needed < 2**30 else most + 1
        if sizes[-1] < enough <= most:
            self.add({template.format(n=enough): needed})

    def _by_variance(self, spec: str) -> float:
        """F for which the closed-form variance of a median pair is error^2."""
        made = next(
            instances(parse_feature_map(spec), self.sample.q.shape[-1], examples=self.examples)
        )
        if not is_random(made) or getattr(made, "estimates", "") != "softmax":
            return math.nan
        predicted = claims(made, *some_pairs(self.sample, 200, 0))[1]
        return made.feature_dims * float(predicted.median()) / self.error**2


def _needed(trials: list[Trial], error: float) -> float:
    """Features for the error, by the power law through two measurements (no faster than 1/2)."""
    last = trials[-1]
    if last.error <= error:
        return float(next(t.features for t in trials if t.error <= error))
    if len(trials) < 2 or last.error >= trials[0].error:
        return math.inf
    rate = math.log(trials[0].error / last.error) / math.log(last.features / trials[0].features)
    steps = math.log2(last.error / error) / min(rate, 0.5)
    return last.features * 2**steps if steps < 100 else math.inf


def _verdict(
    best: Trial | None, search: _Search, error: float, most: int, scale: ScaleReport
) -> str:
    uniform = search.uniform
    if uniform <= error:
        return (
            f"Any map will do, and none is needed: uniform attention has an error of "
            f"{uniform:.2g}, of at most {error:g}; these queries hardly tell keys apart."
        )
    keys = search.sample.k.shape[1]
    if best is not None:
        text = (
            f"Take {best.spec}: {best.features} features, error {best.error:.2g} of at most "
            f"{error:g} (uniform attention: {uniform:.2g})."
        )
        if 4 * best.features > keys:
            text += (
                f" At {keys} keys softmax attention costs no more than that; linear attention "
                f"pays from about {4 * best.features} on."
            )
        return text
    closest = min(search.trials, key=lambda t: t.error)
    needs = min((t.needed for t in search.trials if t.needed is not None), default=math.inf)
    size = "no number of features" if needs == math.inf else f"about {needs:.0e} features"
    if any(t.by_variance == t.by_variance for t in search.trials):
        least = min(t.by_variance for t in search.trials if t.by_variance == t.by_variance)
        size += f" by measurement and {least:.0e} by variance"
    return (
        f"No random map of at most {most} features will do: error {error:g} takes {size}, with "
        f"|x + y|^2 = {float(scale.sum_norm.median()):.3g} "
        f"({float(scale.centred_sum_norm.median()):.3g} centred). The closest is {closest.spec} "
        f"with {closest.error:.2g}, uniform attention has {uniform:.2g}. Use softmax attention "
        "(full) as it is, or train the model with the map it is to have: a trained map (t2r, "
        "hedgehog) learns what a random one cannot estimate."
    )


def _whole(x: float | None) -> Cell:
    if x is None or math.isnan(x):
        return None
    return "never" if math.isinf(x) else float(math.ceil(x))
