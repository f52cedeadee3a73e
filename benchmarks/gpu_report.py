"""Tables and figures of a run on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .contenders import ELU, FAVOR
from .figures import draw_panels
from .log import Record, select
from .tables import ms, number, spread, table

SECTIONS = {"causal": "Causal", "full": "Full"}
PASSES = ("forward", "forward+backward")
MIB = 2**20


def report(records: list[Record]) -> str:
    """All the tables there are records for."""
    parts = [_machine(records)]
    for section in SECTIONS:
        parts += [_times(records, section, which) for which in PASSES]
        parts.append(_host(records, section))
    parts += [_memory(records, section) for section in SECTIONS]
    parts += [_decode(records), _model(records), _compile(records), _wrong(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(records: list[Record]) -> str:
    (it,) = select(records, "machine")
    ceilings = "".join(
        f" It copies {r['copy'] / 1e12:.2f} TB/s, read and written, and multiplies matrices at "
        f"{r['product'] / 1e12:.0f} TFLOP/s (8192 x 8192, bfloat16)."
        for r in select(records, "ceilings")
    )
    return (
        f"{it['date'][:16].replace('T', ' ')}, {it['card']}, driver {it['driver']}, CUDA "
        f"{it['cuda']}, torch {it['torch']}, triton {it['triton']}, flash-linear-attention "
        f"{it['fla'] or '-'}, Python {it['python']}.{ceilings}\n\n"
        "bfloat16, 16 heads of 64, 65,536 tokens in all. Medians of the time on the "
        "device, ± half of the range of the middle readings. Ours: [what it moves at least, as a "
        "fraction of the rate of a copy / operations, as a fraction of the rate of a product]; "
        "the others: (ratio to ours with the same map). - is not measured."
    )


def _percent(record: Record) -> str:
    parts = [f"{record[key]:.0%}" for key in ("of copy", "of product") if key in record]
    return f" [{' / '.join(parts)}]" if parts else ""


def _cell(record: Record | None, ours: Record | None) -> str:
    if record is None or "seconds" not in record:
        return "-"
    text = ms(record) + _percent(record)
    if ours is None or "seconds" not in ours or record is ours:
        return text
    return f"{text} ({record['seconds'] / ours['seconds']:.2f}x)"


def _times(records: list[Record], section: str, which: str) -> str:
    here = [r for r in select(records, section) if r.get("pass") == which]
    lengths = sorted({r["length"] for r in here})
    rows = []
    for map in (ELU, FAVOR):
        found = {(r["contender"], r["length"]): r for r in here if r["map"] in (map, None)}
        for name in dict.fromkeys(name for name, _ in found):
            cells = [_cell(found.get((name, n)), found.get((f"ours, {map}", n))) for n in lengths]
            rows.append([name, *cells])
    headers = ["", *(f"N={n:,}" for n in lengths)]
    return table(headers, rows, f"{SECTIONS[section]}, {which}, ms") if rows else ""


def _host(records: list[Record], section: str) -> str:
    """At the shortest length: what the device waits for, if it has nothing else to do."""
    here = [r for r in select(records, section) if "host" in r]
    length = min((r["length"] for r in here), default=0)
    found = {(r["contender"], r["pass"]): r["host"] for r in here if r["length"] == length}
    names = dict.fromkeys(r["contender"] for r in here)
    rows = [
        [name, *(number(1e3 * found[name, p]) if (name, p) in found else "-" for p in PASSES)]
        for name in names
    ]
    title = f"{SECTIONS[section]}, until the call returns to the host, ms"
    return table(["", *PASSES], rows, title) if rows else ""


def _memory(records: list[Record], section: str) -> str:
    here = [r for r in select(records, section) if "bytes" in r]
    lengths = sorted({r["length"] for r in here})
    found = {(r["contender"], r["length"]): f"{r['bytes'] / MIB:,.0f}" for r in here}
    names = dict.fromkeys(r["contender"] for r in here)
    rows = [[name, *(found.get((name, n), "-") for n in lengths)] for name in names]
    title = f"{SECTIONS[section]}, extra peak memory of forward+backward, MiB"
    return table(["", *(f"N={n:,}" for n in lengths)], rows, title) if rows else ""


def _decode(records: list[Record]) -> str:
    here = [r for r in select(records, "decode") if "seconds" in r]
    rows = [
        [r["contender"], f"{1e6 * r['seconds']:.1f} {spread(r)}", f"{r['of copy']:.0%}"]
        for r in here
    ]
    headers = ["", "microseconds", "of the rate of a copy"]
    title = f"One token of {here[0]['batch']} sequences, in a CUDA graph" if here else ""
    return table(headers, rows, title) if here else ""


def _compile(records: list[Record]) -> str:
    names = ("forward", "backward", "another length")
    rows = [
        [f"{r['map']}, {r['form']}", r["cache"], *(f"{r[name]:.2f}" for name in names)]
        for r in select(records, "compile")
        if "forward" in r
    ]
    return table(["", "cache", *names], rows, "First calls, s") if rows else ""


def _model(records: list[Record]) -> str:
    here = select(records, "model")
    if not here:
        return ""
    rows: list[list[Any]] = []
    for r in here:
        if "seconds" in r:
            cells = [ms(r), f"{r['tokens per second']:,.0f}", f"{r['bytes'] / MIB:,.0f}"]
        else:
            cells = [r.get("skipped", "wrong"), "-", "-"]
        rows.append([r["contender"], *cells])
    one = here[0]
    title = (
        f"A training step of a causal transformer: {one['layers']} layers of 1,024, "
        f"{one['batch']} x {one['length']:,} tokens, torch.compile, AdamW"
    )
    return table(["", "ms", "tokens/s", "extra peak MiB"], rows, title)


def _wrong(records: list[Record]) -> str:
    lines = [f"* WRONG: {line}" for r in records for line in r.get("wrong", ())]
    lines += [
        f"* {r['contender']}, {r['section']}: {r['skipped']}" for r in records if "skipped" in r
    ]
    return "\n".join(dict.fromkeys(lines))


def draw(records: list[Record], stem: Path) -> list[Path]:
    """Write ``<stem>-time.png`` and ``<stem>-memory.png``; returns what was written."""
    times, memory = [], []
    for section, title in SECTIONS.items():
        for which in PASSES:
            here = [r for r in select(records, section) if r.get("pass") == which]
            here = [r for r in here if "seconds" in r]
            if here:
                times.append((f"{title}, {which}, 65,536 tokens", here))
        here = [r for r in select(records, section) if "bytes" in r]
        if here:
            memory.append((f"{title}, forward+backward, 65,536 tokens", here))
    written = [
        draw_panels(times, "seconds", 1e3, "ms", Path(f"{stem}-time.png")),
        draw_panels(memory, "bytes", 1 / MIB, "extra peak MiB", Path(f"{stem}-memory.png")),
    ]
    return [path for path in written if path is not None]
