"""Everything a log says, as Markdown, and the latest one as a block of the README."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from . import tables
from .contenders import OURS
from .log import Record, select
from .tables import ms, replace_block, spread, table

README = Path(__file__).with_name("README.md")
MIB = 2**20


def report(records: list[Record], brief: bool = False) -> str:
    """All the tables there are records for; in brief, one batch and one number of threads."""
    parts = [machine(records), *tables.attention(records, brief), tables.crossovers(records)]
    parts += [part(records) for part in PARTS]
    return "\n\n".join(part for part in parts if part) + "\n"


def machine(records: list[Record]) -> str:
    """What was measured, where and when, and how quiet it was."""
    (it,) = select(records, "machine")
    lines = [
        f"{it['date'][:16].replace('T', ' ')}, {it['cpu']}, {it['cores']} cores "
        f"({it['capability']}), torch {it['torch']}, Python {it['python']}, load average "
        f"{it['load average'][0]:.1f} at the start. float32, 8 heads of 64. Medians, ± half of "
        "the range of the readings, (ratio to ours with the same map); - is not measured."
    ]
    waits = [
        wall / cpu
        for record in records
        if record.get("clock") == "cpu"
        for wall, cpu in zip(record["wall"], record["cpu"], strict=True)
        if cpu
    ]
    if waits and statistics.median(waits) > 1.05:
        share = 1 - 1 / statistics.median(waits)
        lines.append(
            f"The machine was not idle: other processes had the core for {share:.0%} of the time. "
            "Expect times on two threads to be far too long."
        )
    return "\n\n".join(lines)


def memory(records: list[Record]) -> str:
    """Extra peak memory, causal and full."""
    parts = []
    for causal, name in ((True, "causal"), (False, "full")):
        here = select(records, "memory", causal=causal)
        columns = list(dict.fromkeys((r["pass"], r["length"]) for r in here if "bytes" in r))
        columns.sort(key=lambda c: (len(c[0]), c[1]))
        found = {(r["contender"], r["pass"], r["length"]): r.get("bytes") for r in here}
        rows = [
            [contender, *(_mib(found.get((contender, *column))) for column in columns)]
            for contender in dict.fromkeys(r["contender"] for r in here)
        ]
        headers = ["", *(f"{which} N={n:,}" for which, n in columns)]
        if rows:
            parts.append(table(headers, rows, f"Extra peak memory of one call, {name}, B=1, MiB"))
    return "\n\n".join(parts)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.0f}"


def decode(records: list[Record]) -> str:
    """Microseconds of one token."""
    here = [r for r in select(records, "decode") if "seconds" in r or "wrong" in r]
    batches = sorted({r["batch"] for r in here})
    found = {(r["contender"], r["batch"]): r for r in here}
    rows = []
    for name in dict.fromkeys(r["contender"] for r in here):
        cells = [found.get((name, batch), {}) for batch in batches]
        rows.append(
            [name, *(f"{1e6 * r['seconds']:.0f} {spread(r)}" if "seconds" in r else "wrong"
                     for r in cells)]
        )  # fmt: skip
    title = "One token of generation, 1 thread, microseconds"
    return table(["", *(f"B={b}" for b in batches)], rows, title) if rows else ""


def products(records: list[Record]) -> str:
    """Rates, and the fraction of the large product's rate."""
    here = select(records, "products")
    best = {r["threads"]: r["rate"] for r in here if r["what"].startswith("mm")}
    rows = [
        [r["what"], r["threads"], f"{r['rate'] / 1e9:.0f} {spread(r)}",
         f"{r['rate'] / best[r['threads']]:.0%}"]
        for r in here
    ]  # fmt: skip
    title = "Matrix products, and the whole causal forward pass, B=1, N=4,096"
    return table(["", "threads", "GFLOP/s", "of mm"], rows, title) if rows else ""


def neighbour(records: list[Record]) -> str:
    """Idle and busy, one thread and two."""
    here = {(r["contender"], r["busy"], r["threads"]): r for r in select(records, "neighbour")}
    rows = []
    for name in dict.fromkeys(name for name, _, _ in here):
        row, times = [name], {}
        for busy in (False, True):
            for threads in (1, 2):
                record = here.get((name, busy, threads))
                times[busy, threads] = record["seconds"] if record else float("nan")
                row.append(ms(record) if record else "-")
        row.append(f"{times[False, 1] / times[False, 2]:.2f}x")
        row += [f"{times[True, threads] / times[False, threads]:.2f}x" for threads in (1, 2)]
        rows.append(row)
    headers = ["", "idle, 1 thread", "2 threads", "busy, 1 thread", "2 threads",
               "2 threads faster by", "busy slower by, 1 thread", "2 threads"]  # fmt: skip
    title = "Beside a busy process: causal forward, B=1, N=4,096, ms on the wall"
    return table(headers, rows, title) if rows else ""


def redraw(records: list[Record]) -> str:
    """The share of a redraw in a training step."""
    rows = [
        [f"{r['length']:,}", r["threads"], f"{1e3 * r['redraw']:.2f}",
         ms(r), f"{r['share']:.2%}"]
        for r in select(records, "redraw")
    ]  # fmt: skip
    headers = ["N", "threads", "redraw, ms", "forward+backward, ms", "share"]
    title = f"Drawing the map at every step: {OURS['Favor 256']}, causal, B=1"
    return table(headers, rows, title) if rows else ""


def model(records: list[Record]) -> str:
    """A whole model against its parts."""
    rows = [
        [r["threads"], *map(ms, r["parts"].values()), f"{r['ratio']:.2f}"]
        for r in select(records, "model")
        if "ratio" in r
    ]  # fmt: skip
    headers = ["threads", "whole, ms", "without attention", "one attention", "whole / parts"]
    title = "Forward pass of 4 layers, d_model 512, 8 heads, N=2,048; at most 1.1 is wanted"
    return table(headers, rows, title) if rows else ""


def idle_workers(records: list[Record]) -> str:
    """Ours alone and beside waiting workers."""
    rows = [
        [r["threads"], "beside the others" if r["beside"] else "alone",
         ms(r)]
        for r in select(records, "idle workers")
    ]  # fmt: skip
    title = "Whether waiting workers disturb: ours, elu+1, causal forward, N=4,096"
    return table(["threads", "", "ms"], rows, title) if rows else ""


def not_measured(records: list[Record]) -> str:
    """What is missing for good, and what was wrong."""
    lines = {
        f"* {r['contender']}: not measured: {r['skipped']}"
        for r in records
        if "skipped" in r and "length" not in r
    }
    lines |= {f"* WRONG: {line}" for r in records for line in r.get("wrong", [])}
    return "\n".join(sorted(lines))


PARTS: list[Callable[[list[Record]], str]] = [
    memory, decode, products, neighbour, redraw, model, idle_workers, not_measured,
]  # fmt: skip


def write_readme(records: list[Record], log: Path, figures: list[Path]) -> None:
    """Replace the block of the latest measurements by those of a log in this folder.

    Raises:
        ValueError: if the log is elsewhere, as the README links to it.
    """
    here = README.parent
    if not log.resolve().is_relative_to(here):
        raise ValueError(f"the README can only show logs below {here}, got {log}")
    link = log.resolve().relative_to(here).with_suffix(".md").as_posix()
    pictures = [f"![{f.stem}]({f.resolve().relative_to(here).as_posix()})" for f in figures]
    block = "\n\n".join(
        [f"All tables: [`{link}`]({link}).", report(records, brief=True).strip(), *pictures]
    )
    replace_block(README, "latest", block)
