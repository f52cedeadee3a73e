"""All reports and plots on one set of queries and keys, in the order of a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from . import plots
from .attention_report import UNIFORM, AttentionReport, join_reports, report_of
from .capacity import capacity
from .curves import error_curves, has_size, kernel_curves, variance_curves
from .kernel_report import kernel_report
from .measures import median
from .page import Section
from .sample import MapLike, Sample, instances, merge_heads, with_fits
from .scale import ScaleReport, scale_of
from .sources import Source
from .suggest import suggest_of
from .table import Cell, Report
from .weights import linear_weights, softmax_weights, uniform_weights

DEFAULT = (
    "elu",
    "relu",
    "dpfp:nu=2",
    "hedgehog",
    "taylor",
    "centered:inner=taylor",
    "generalized:n_dims=128",
    "favor:n_dims=128",
    "oprf:n_dims=128",
    "derf:n_dims=128",
    "centered:inner='derf:n_dims=128'",
)
SIZES = (32, 64, 128, 256, 512)
MOST_HEADS = 2  # of the layer that the sweeps over n_dims look at
MOST_MATRICES = 15
CORNER = 64  # queries and keys of a matrix that are shown
SUM_NORM = 2.0  # |x + y|^2 at which some hundred draws show the variance of positive features

Tick = Callable[[str], object]  # called with what comes next


@dataclass(frozen=True)
class Scales(Report):
    """Medians over the heads of a :class:`ScaleReport` of each layer."""

    layers: dict[str, ScaleReport]

    def cells(self) -> tuple[list[str], list[list[Cell]]]:
        head, rows = [], []
        for name, report in self.layers.items():
            head, cells = report.cells()
            rows.append([name, *cells[-1][1:]])
        return ["layer", *head[1:]], rows


@dataclass(frozen=True)
class Layers(Report):
    """The median KL divergence over the heads of each layer, map by map."""

    layers: dict[str, AttentionReport]

    def cells(self) -> tuple[list[str], list[list[Cell]]]:
        first = next(iter(self.layers.values()))
        rows: list[list[Cell]] = [
            [row.name, *(median(r.rows[i].measures.kl) for r in self.layers.values())]
            for i, row in enumerate(first.rows)
        ]
        return ["KL, median head", *self.layers], rows


@dataclass(frozen=True)
class Comparison:
    """What to compare, on what.

    Attributes:
        source: queries and keys.
        specs: of the maps.
        draws: of each random map.
        error: what :func:`suggest` is asked for.
        fit_steps: of gradient descent on the examples; 0 measures no fitted maps.
    """

    source: Source
    specs: Sequence[str] = DEFAULT
    draws: int = 3
    error: float = 0.3
    fit_steps: int = 0

    @property
    def steps(self) -> int:
        """How often :meth:`sections` calls its ``tick``."""
        maps = len(self._maps) + bool(self.source.own)
        heads = sum(sample.q.shape[2] for sample in self.source.samples.values())
        sweeps = len(SIZES) * len(self._sized) * self._few(self._middle).q.shape[2]
        return maps * heads + sweeps + 6

    def sections(self, tick: Tick = lambda _: None) -> list[Section]:
        """Everything, computed."""
        tick("scale")
        scale = self._scale()
        attention = self._attention(tick)
        matrices = self._matrices()
        found = [scale, attention, matrices, self._sizes(tick)]
        tick("suggestion")
        found.insert(1, self._suggestion())
        tick("kernel")
        found.append(self._kernel())
        tick("variance")
        found.append(self._variance())
        tick("kernel curves")
        found.append(self._curves())
        tick("capacity")
        found.append(self._capacity())
        return found

    @cached_property
    def _maps(self) -> dict[str, MapLike]:
        """What the first table has: every map, and fitted beside it if that is asked for."""
        dims = self.source.samples[self._middle].q.shape[-1]
        return with_fits(self.specs, dims, self.fit_steps)

    @property
    def _sized(self) -> list[str]:
        return [spec for spec in self.specs if has_size(spec)]

    @property
    def _colours(self) -> dict[str, str]:
        return plots.palette(self.specs)

    @property
    def _middle(self) -> str:
        """The layer that plots are of."""
        names = list(self.source.samples)
        return names[len(names) // 2]

    def _few(self, name: str, of_examples: bool = False) -> Sample:
        """Some heads and sequences of a layer, for what takes long."""
        sample = (self.source.examples if of_examples else self.source.samples)[name]
        few = [sample.head(i) for i in range(min(MOST_HEADS, sample.q.shape[2]))]
        return merge_heads([head.sequences(slice(0, 2)) for head in few])

    def _scale(self) -> Section:
        reports = {name: scale_of(sample) for name, sample in self.source.samples.items()}
        tables: list[Report] = [Scales(reports)] if len(reports) > 1 else [*reports.values()]
        return Section(
            "How large queries and keys are",
            "x and y are queries and keys times the root of the softmax temperature, z = x.y. "
            "Positive random features have a variance that grows like exp(|x + y|^2), Fourier "
            "features one like exp(|x - y|^2); the Taylor series is sound where z > -1. "
            "centred: |x + y|^2 after the means of queries and of keys are taken off. eff. rank: "
            "in how many dimensions z varies. entropy: of the exact weights, in nats, and what "
            "it is at most.",
            tables,
        )

    def _attention(self, tick: Tick) -> Section:
        reports = {}
        for index, (name, sample) in enumerate(self.source.samples.items()):
            maps = dict(self._maps)
            if name in self.source.own:
                maps["the model's own"] = self.source.own[name]
            reports[name] = report_of(
                maps, sample, self.source.examples[name], draws=self.draws, seed=1000 * index,
                tick=lambda name=name: tick(f"attention: {name}"),
            )  # fmt: skip
        tables: list[Report] = [join_reports(list(reports.values()))]
        if len(reports) > 1:
            tables.append(Layers(reports))
        heads = sum(report.heads for report in reports.values())
        return Section(
            "Attention",
            f"Beside exact softmax attention; medians over {heads} heads, random maps drawn "
            f"{self.draws} times. F: features. KL: divergence of the exact weights from the "
            "map's, in nats. Frobenius: relative error of the matrix of weights; output: of what "
            "comes out. top-1: queries whose largest weight is at the right key. denom.: 1 is "
            "sound, near 0 the denominator vanishes. < 0: share of negative weights. entropy and "
            "largest: of a query's weights, in nats and as a share. rank corr.: of weights with "
            "logits. eff. rank: of the matrix. A map with a KL above that of uniform attention "
            "tells less about the keys than nothing at all. " + self._calibration(),
            tables,
        )

    def _calibration(self) -> str:
        """On what maps with statistics were calibrated, and fitted."""
        what = "Maps with statistics were calibrated"
        if self.fit_steps:
            what += (
                f", and those called fitted moved in {self.fit_steps} steps of gradient descent,"
            )
        if self.source.separate:
            return f"{what} on other inputs than those measured."
        return f"{what} on the very inputs that were measured, for want of others, which flatters."

    def _suggestion(self) -> Section:
        samples = self._few(self._middle), self._few(self._middle, True)
        found = suggest_of(*samples, self.error, draws=2)
        text = (
            f" By the first heads of {self._middle}. would need: features for the error asked "
            "for, by the decrease of the measured error with their number; by variance: in "
            "closed form, for a median pair."
        )
        return Section("Suggestion", found.verdict + text, [found])

    def _matrices(self) -> Section:
        sample, examples = self._few(self._middle).head(0), self._few(self._middle, True).head(0)
        shown = {"exact softmax": softmax_weights(sample), UNIFORM: uniform_weights(sample)}
        for spec in self.specs[: MOST_MATRICES - 2]:
            made = next(instances(spec, sample.q.shape[-1], examples=examples))
            shown[spec] = linear_weights(made, sample)
        corner = (0, 0, slice(-CORNER, None), slice(-CORNER, None))
        figure = plots.matrix_plot({name: weights[corner] for name, weights in shown.items()})
        return Section(
            "Attention matrices",
            f"The last {CORNER} tokens of one sequence in the first head of {self._middle}: rows "
            "are queries, columns keys. One scale of colours for all.",
            figures=[("matrices", figure)],
        )

    def _sizes(self, tick: Tick) -> Section:
        sample, examples = self._few(self._middle), self._few(self._middle, True)
        fixed: dict[str, MapLike] = {s: s for s in self.specs if not has_size(s)}
        other = report_of(fixed, sample, examples, draws=2)
        by_size = error_curves(
            self._sized, sample, examples, SIZES, draws=2, tick=lambda: tick("sizes")
        )
        figures = [
            (f"{measure}-over-features", plots.error_plot(by_size, other, measure, self._colours))
            for measure in ("kl", "frobenius")
        ]
        return Section(
            "Error over the number of features",
            f"The first heads of {self._middle}. Maps that come in one size are diamonds.",
            figures=figures,
        )

    def _kernel(self) -> Section:
        sample = self._few(self._middle)
        report = kernel_report(
            list(self.specs), sample.q, sample.k, softmax_temp=sample.softmax_temp, pairs=60,
            draws=100,
        )  # fmt: skip
        return Section(
            "Kernel",
            "phi(q).phi(k) beside the kernel that each map is to estimate, over redraws: bias, "
            "its size in standard errors (about 1 if there is none), relative variance, and what "
            "the closed form says of it for independent directions; root of the relative variance "
            "for the pairs with the largest and smallest kernel. misfit: distance of one draw "
            "from exp(z) after the best common factor. Where a measured variance is far below "
            "a large predicted one the draws missed the tail, and standard errors mean nothing.",
            [report],
        )

    def _variance(self) -> Section:
        sample = self._few(self._middle)
        factor = min(1.0, SUM_NORM / float(scale_of(sample).sum_norm.median())) ** 0.5
        q, k = factor * sample.q, factor * sample.k
        curves = variance_curves(self._sized, q, k, SIZES, draws=100)
        figures = [("variance", plots.variance_plot(curves, self._colours))] if curves else []
        return Section(
            "Variance over the number of features",
            "Points are measured, for the directions that the map draws (orthogonal, unless it "
            "says otherwise); lines are the closed form for independent ones. Queries and keys "
            f"are those above times {factor:.2g}, so that |x + y|^2 is at most {SUM_NORM:g}: far "
            "above that the variance lies in a tail that no number of draws shows.",
            figures=figures,
        )

    def _curves(self) -> Section:
        sample = self._few(self._middle)
        curves = kernel_curves(list(self.specs), sample.q.shape[-1])
        return Section(
            "Kernel curves",
            "phi(x).phi(y) of pairs with |x| = |y| = 1.5 at every angle, scaled to fit exp(z): "
            "mean and middle 80 % over pairs and draws. A map whose curve falls anywhere cannot "
            "rank keys as softmax does.",
            figures=[("kernel", plots.kernel_plot(curves, self._colours))],
        )

    def _capacity(self) -> Section:
        dims = self.source.samples[self._middle].q.shape[-1]
        report = capacity(list(self.specs), dims=dims, trials=4)
        return Section(
            "Capacity",
            f"S pairs of random keys ({dims} dimensions, unit variance) and values are stored; "
            "the share of values that come back when their key is asked for. No training.",
            [report],
            [("capacity", plots.capacity_plot(report, self._colours))],
        )
