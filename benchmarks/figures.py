"""Time and memory over the length, log-log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .log import Record, select
from .tables import SECTIONS, cases, describe

# one colour per implementation, one line style per map
COLOURS = {"ours": "C0", "older library": "C1", "performer-pytorch": "C2", "SDPA": "black"}
COLOURS |= {"fla": "C3", "einsum": "C4"}  # on a GPU
STYLES = {"elu+1": "-", "Favor 256": "--", None: ":"}
MARKERS = {"elu+1": "o", "Favor 256": "s", None: "^"}


def draw(records: list[Record], stem: Path) -> list[Path]:
    """Write ``<stem>-time.png`` and ``<stem>-memory.png``; returns what was written."""
    return [path for path in (_time(records, stem), _memory(records, stem)) if path]


def _time(records: list[Record], stem: Path) -> Path | None:
    panels = [
        (f"{title}, {describe(case)}", [r for r in select(records, s, **case) if "seconds" in r])
        for s, title in SECTIONS.items()
        for case in cases(records, s)
    ]
    return draw_panels(panels, "seconds", 1e3, "ms", Path(f"{stem}-time.png"))


def _memory(records: list[Record], stem: Path) -> Path | None:
    panels = []
    for causal, title in ((True, "Causal"), (False, "Full")):
        for which in ("forward", "forward+backward"):
            here = select(records, "memory", **{"causal": causal, "pass": which})
            here = [r for r in here if "bytes" in r and r["map"] in STYLES]
            if here:
                panels.append((f"{title}, {which}, B=1", here))
    return draw_panels(panels, "bytes", 2**-20, "extra peak MiB", Path(f"{stem}-memory.png"))


def draw_panels(
    panels: list[tuple[str, list[Record]]], field: str, scale: float, label: str, path: Path
) -> Path | None:
    """Write a figure of ``scale`` times a field of the records over their lengths, if any."""
    if not panels:
        return None
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 3.1 * rows + 0.7), sharey=True, squeeze=False
    )
    lines: dict[str, Any] = {}
    for axes, (title, here) in zip(grid.flat, panels, strict=False):
        for name in dict.fromkeys(r["contender"] for r in here):
            mine = sorted((r for r in here if r["contender"] == name), key=lambda r: r["length"])
            map, x = mine[0]["map"], [r["length"] for r in mine]
            (lines[name],) = axes.plot(
                x, [scale * r[field] for r in mine], label=name, color=COLOURS[name.split(",")[0]],
                linestyle=STYLES[map], marker=MARKERS[map], markersize=3.5, linewidth=1.3,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8, which="both")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel(label, fontsize=9)
        plain = ticker.StrMethodFormatter("{x:,g}")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain if high < 10 * low else ticker.NullFormatter())
    figure.supxlabel("length N", fontsize=9)
    figure.legend(lines.values(), lines, loc="upper center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / (3.1 * rows + 0.7)))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
