"""How far the attention of feature maps is from softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .measures import Measures, exact, mean_of, measure, median
from .sample import MapLike, MapsLike, Sample, instances, make_sample, named
from .table import Cell, Report, row_named
from .weights import linear_weights, logits_of, softmax_weights, uniform_weights

COLUMNS = {
    "kl": "KL",
    "frobenius": "Frobenius",
    "output_error": "output",
    "top1": "top-1",
    "denominator": "denom.",
    "negative": "< 0",
    "entropy": "entropy",
    "largest": "largest",
    "rank_correlation": "rank corr.",
    "effective_rank": "eff. rank",
}
SOFTMAX, UNIFORM = "exact softmax", "uniform"


class AttentionRow(NamedTuple):
    """A map, the features it gives (None for the two references), and its measures by head."""

    name: str
    features: int | None
    measures: Measures


@dataclass(frozen=True)
class AttentionReport(Report):
    """What :func:`attention_report` returns; prints as a table of medians over the heads.

    Attributes:
        rows: exact softmax, uniform attention, and every map.
        heads: how many heads the medians are of.
        draws: how often a random map was drawn.
    """

    rows: tuple[AttentionRow, ...]
    heads: int
    draws: int

    def __getitem__(self, name: str) -> Measures:
        """The measures of a row, by its name."""
        return row_named(self.rows, name).measures

    def cells(self) -> tuple[list[str], list[list[Cell]]]:
        """Head and rows of the table."""
        head = ["feature map", "F", *COLUMNS.values()]
        return head, [
            [row.name, row.features, *(median(x) for x in row.measures)] for row in self.rows
        ]


def attention_report(
    feature_maps: MapsLike,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    attn_mask: Any = None,
    key_lengths: Any = None,
    softmax_temp: float | None = None,
    calibration: tuple[Tensor, Tensor] | None = None,
    draws: int = 4,
    seed: int = 0,
) -> AttentionReport:
    """Compare the weights of feature maps with those of softmax attention, head by head.

    Every head gets maps of its own, drawn by themselves. The first two rows are exact softmax
    attention and uniform attention: a map that is no better than the latter tells nothing of q.k.

    Args:
        feature_maps: specs ("favor:n_dims=64"), factories, ready maps, one or several of them,
            or a dictionary from names.
        q: (N, L, H, E). k: (N, S, H, E). v: (N, S, H, M), or None for no output error.
        attn_mask, key_lengths, softmax_temp: see
            :func:`~fast_transformers.diagnostics.attention_map`; the latter is that of the exact
            attention, default 1/sqrt(E), which is the maps' default, too.
        calibration: queries (N', L', H, E) and keys to calibrate maps on which have statistics,
            if possible from other texts; None takes q and k themselves, which flatters.
        draws: of each random map.
        seed: of the draws.

    Raises:
        ValueError: for shapes that do not fit, inputs that are not finite, or a bad spec.

    >>> q, k = torch.randn(2, 1, 64, 2, 16)
    >>> report = attention_report(["elu", "favor:n_dims=32"], q, k)
    >>> report["elu"].kl.shape  # one number a head
    torch.Size([2])
    """
    sample = make_sample(
        q, k, v, attn_mask=attn_mask, key_lengths=key_lengths, softmax_temp=softmax_temp
    )
    examples = sample if calibration is None else make_sample(*calibration)
    return report_of(named(feature_maps), sample, examples, draws=draws, seed=seed)


def report_of(
    maps: dict[str, MapLike],
    sample: Sample,
    examples: Sample,
    *,
    draws: int = 4,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
    first: Callable[[str, int, Any], object] = lambda *_: None,
) -> AttentionReport:
    """:func:`attention_report` of samples; ``tick`` is called after every map of every head.

    ``first`` is called with the name, the head, and the first draw of the map.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    found: dict[str, list[Measures]] = {name: [] for name in (SOFTMAX, UNIFORM, *maps)}
    features: dict[str, int | None] = {}
    for index in range(sample.q.shape[2]):
        head, calibrated_on = sample.head(index), examples.head(index)
        weights = softmax_weights(head)
        reference = exact(weights, logits_of(head), head.shown(), head.v)
        found[SOFTMAX].append(measure(weights, reference))
        found[UNIFORM].append(measure(uniform_weights(head), reference))
        for name, source in maps.items():
            measures = []
            made = None
            for made in instances(
                source, head.q.shape[-1], draws=draws, seed=seed + index, examples=calibrated_on
            ):
                if not measures:
                    first(name, index, made)
                measures.append(measure(linear_weights(made, head), reference))
            found[name].append(mean_of(measures))
            features[name] = getattr(made, "feature_dims", None)
            tick()
    rows = [AttentionRow(name, features.get(name), joined(heads)) for name, heads in found.items()]
    return AttentionReport(tuple(rows), sample.q.shape[2], draws)


def joined(parts: list[Measures]) -> Measures:
    """The measures of several groups of heads as one."""
    return Measures(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def join_reports(reports: list[AttentionReport]) -> AttentionReport:
    """Reports of several layers with the same rows, as one of all their heads."""
    rows = [
        AttentionRow(rows[0].name, rows[0].features, joined([row.measures for row in rows]))
        for rows in zip(*(report.rows for report in reports), strict=True)
    ]
    return AttentionReport(tuple(rows), sum(r.heads for r in reports), reports[0].draws)
