"""Pictures of the reports; needs matplotlib (the extra "compare").

Each function takes results and returns a ``matplotlib.figure.Figure``; ``figure.savefig(path)``
writes it. Nothing here opens a window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .attention_report import SOFTMAX, UNIFORM, AttentionReport
from .capacity import CapacityReport
from .curves import KernelCurve, VarianceCurve, without_size
from .measures import median

WIDTH, HEIGHT = 7.2, 4.2  # inches
COLOURS = (
    "#4269d0", "#e8833a", "#3ca951", "#d4519b", "#8a63d2", "#8c6b46", "#2aa6b8", "#c9a227",
    "#6c7a89", "#e15759", "#7fa650", "#a05195",
)  # fmt: skip
GREY, INK = "#9a9a9a", "#1c1e26"
LONGEST = 34  # characters of a name in a legend

Colours = Mapping[str, str] | None  # of palette(); None gives every plot its own


def palette(specs: Sequence[str]) -> dict[str, str]:
    """A colour for each map, whatever its size, so that it has the same one in every plot."""
    names = dict.fromkeys(without_size(spec) for spec in specs)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _colour(name: str, among: Sequence[str], colours: Colours) -> str:
    known = palette(among) if colours is None else colours
    return known.get(without_size(name), GREY)


def variance_plot(curves: Mapping[str, VarianceCurve], colours: Colours = None) -> Any:
    """Measured relative variance over n_dims as points, the closed form of iid draws as lines."""
    figure, axes = _axes("n_dims", "relative variance of a median pair")
    for index, (name, curve) in enumerate(curves.items()):
        colour, size = _colour(name, list(curves), colours), _nested(index, len(curves), 8, 4)
        axes.plot(curve.sizes, curve.measured, "o", color=colour, label=_short(name), ms=size)
        if not any(math.isnan(x) for x in curve.predicted):
            axes.plot(curve.sizes, curve.predicted, "-", color=colour, lw=1.2, alpha=0.8)
    axes.plot([], [], "o", color=GREY, label="measured over draws", ms=5)
    axes.plot([], [], "-", color=GREY, label="closed form, iid directions")
    _logarithmic(axes)
    _sizes(axes, [size for curve in curves.values() for size in curve.sizes])
    return _finish(figure, axes)


def error_plot(
    reports: Mapping[int, AttentionReport],
    fixed: AttentionReport,
    measure: str = "kl",
    colours: Colours = None,
) -> Any:
    """A measure over n_dims, one line a map; maps of one size are points, uniform a dashed line.

    Args:
        reports: by n_dims, with the same maps under the same names.
        fixed: of the maps that come in one size.
        measure: a field of :class:`~fast_transformers.diagnostics.Measures`.
    """
    label = {"kl": "KL divergence (nats)", "frobenius": "relative Frobenius error"}
    figure, axes = _axes("features", f"{label.get(measure, measure)}, median head")
    sizes = sorted(reports)
    names = [row.name for row in reports[sizes[0]].rows[2:]] if sizes else []
    among = [*names, *(row.name for row in fixed.rows[2:])]
    for name in names:
        values = [median(getattr(reports[size][name], measure)) for size in sizes]
        colour = _colour(name, among, colours)
        axes.plot(sizes, values, "o-", color=colour, label=_short(name), ms=4, lw=1.4)
    for index, row in enumerate(fixed.rows[2:]):
        axes.plot(
            [row.features], [median(getattr(row.measures, measure))], "D",
            color=_colour(row.name, among, colours), label=_short(row.name),
            ms=_nested(index, len(fixed.rows) - 2, 9, 4),
        )  # fmt: skip
    level = median(getattr(fixed[UNIFORM], measure))
    axes.axhline(level, color=INK, ls="--", lw=1.2, label="uniform attention")
    _logarithmic(axes)
    _sizes(axes, [*sizes, *(row.features for row in fixed.rows[2:] if row.features)])
    return _finish(figure, axes)


def kernel_plot(curves: Mapping[str, KernelCurve], colours: Colours = None) -> Any:
    """phi(x).phi(y) over z = x.y, scaled to be as close to exp(z) as can be.

    The line is the mean over draws and pairs, the band the middle 80 %. Softmax attention is
    exp(z) itself, uniform attention a constant.
    """
    figure, axes = _axes("z = softmax_temp q.k", "kernel, scaled to fit exp(z)")
    highest = 1.0
    for index, (name, curve) in enumerate(curves.items()):
        colour, width = _colour(name, list(curves), colours), _nested(index, len(curves), 3.0, 1.2)
        z = curve.z.tolist()
        axes.plot(z, curve.mean.tolist(), color=colour, lw=width, label=_short(name))
        axes.fill_between(
            z, curve.low.tolist(), curve.high.tolist(), color=colour, alpha=0.09, lw=0
        )
        highest = max(highest, math.exp(max(z)))
    z = next(iter(curves.values())).z
    axes.plot(z.tolist(), z.exp().tolist(), color=INK, ls="--", lw=1.5, label="exp(z), softmax")
    axes.axhline(float(z.exp().mean()), color=INK, ls=":", lw=1.2, label="uniform attention")
    axes.fill_between([], [], [], color=GREY, alpha=0.3, lw=0, label="middle 80 %")
    axes.set_ylim(-0.1 * highest, 1.35 * highest)
    axes.axhline(0, color=GREY, lw=0.6)
    return _finish(figure, axes)


def matrix_plot(matrices: Mapping[str, Tensor]) -> Any:
    """Attention matrices (L, S) side by side, on one scale of colours, the exact one first."""
    from matplotlib.figure import Figure

    columns = min(len(matrices), 5)
    rows = math.ceil(len(matrices) / columns)
    figure = Figure(figsize=(2.3 * columns, 2.55 * rows), layout="constrained", dpi=130)
    grid = figure.subplots(rows, columns, squeeze=False)
    exact = next(iter(matrices.values()))
    top = float(exact.flatten().quantile(0.995)) or 1.0
    image: Any = None
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (name, matrix) in enumerate(matrices.items()):
        axes = grid.flat[index]
        axes.set_axis_on()
        image = axes.imshow(matrix.cpu().numpy(), vmin=0, vmax=top, cmap="magma_r")
        axes.set_title(_short(name), fontsize=7)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("keys" if index + columns >= len(matrices) else "", fontsize=7)
        axes.set_ylabel("" if index % columns else "queries", fontsize=7)
    bar = figure.colorbar(image, ax=grid, shrink=0.7, pad=0.01, extend="both")
    bar.set_label("weight", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def capacity_plot(report: CapacityReport, colours: Colours = None) -> Any:
    """The share of stored values that come back, over how many were stored."""
    figure, axes = _axes("pairs stored", "share decoded")
    among = [name for name in report.decoded if name != SOFTMAX]
    for index, name in enumerate([*among, SOFTMAX]):
        exact = name == SOFTMAX
        colour, width = INK if exact else _colour(name, among, colours), 1.2 if exact else 1.4
        axes.plot(
            report.counts, report.decoded[name], "--" if exact else "o-", color=colour,
            label=_short(name), ms=_nested(index, len(among), 8, 4), lw=width,
        )  # fmt: skip
    axes.set(xscale="log", ylim=(-0.03, 1.05))
    _sizes(axes, report.counts)
    return _finish(figure, axes)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", dpi=130)
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, which="major", color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Any, axes: Any) -> Any:
    axes.legend(
        fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5),
        handlelength=1.6,
    )  # fmt: skip
    return figure


def _nested(index: int, count: int, first: float, last: float) -> float:
    """A size that falls from ``first`` to ``last``, so that what coincides shows around itself."""
    return first + (last - first) * index / max(count - 1, 1)


def _logarithmic(axes: Any) -> None:
    """Both axes, the upright one with numbers such as 0.5 and 2 rather than powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _sizes(axes: Any, sizes: Sequence[int]) -> None:
    """Mark the sizes that were measured on a logarithmic axis, but no two that collide."""
    kept: list[int] = []
    for size in sorted(set(sizes)):
        if not kept or size >= 1.35 * kept[-1]:
            kept.append(size)
    axes.set_xticks(kept, [str(size) for size in kept])
    axes.set_xticks([], minor=True)


def _short(name: str, most: int = LONGEST) -> str:
    """A name for a legend; dollars would start a formula."""
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return name.replace("$", r"\$")
