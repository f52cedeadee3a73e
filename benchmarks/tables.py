"""Tables of whole-sequence attention from the records of a log, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .contenders import CONTENDERS, ELU, FAVOR, OURS, SDPA
from .log import Record, select

SECTIONS = {"causal": "Causal", "full": "Full"}
KEYS = ("pass", "batch", "threads")


def table(headers: Sequence[str], rows: list[list[Any]], title: str = "") -> str:
    """A Markdown table below a bold title."""
    text = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
    return f"**{title}**\n\n{text}" if title else text


def replace_block(page: Path, name: str, block: str) -> None:
    """Put what a command found between the two lines of a page that bear its name.

    Raises:
        ValueError: for a page without them.
    """
    begin, end = f"<!-- {name}: written by the command -->", f"<!-- end of {name} -->"
    text = page.read_text()
    head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    page.write_text(f"{head}\n\n{block}\n\n{tail}")


def spread(record: Record) -> str:
    """Half of the range of the readings, in percent of their median."""
    return f"±{50 * (record['high'] - record['low']) / record['seconds']:.0f}%"


def number(value: float) -> str:
    """Three digits, and no exponent for what is large."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def ms(record: Record) -> str:
    """Milliseconds and their spread."""
    return f"{number(1e3 * record['seconds'])} {spread(record)}"


def attention(records: list[Record], first: bool = False) -> list[str]:
    """Milliseconds and ratios to ours: a table for each pass, batch and number of threads.

    Args:
        records: of a log.
        first: only the smallest batch and number of threads.
    """
    tables = []
    for section, title in SECTIONS.items():
        every = cases(records, section)
        for case in every:
            if first and any(case[key] != every[0][key] for key in ("batch", "threads")):
                continue
            here = [r for r in select(records, section, **case) if "length" in r]
            lengths = sorted({r["length"] for r in here})
            rows = [
                [name, *(_cell(here, name, ours, n) for n in lengths)]
                for name, ours in _rows({r["contender"] for r in here})
            ]
            head = f"{title}, {describe(case)}, ms"
            tables.append(table(["", *(f"N={n:,}" for n in lengths)], rows, head))
    return tables


def cases(records: list[Record], section: str) -> list[dict[str, Any]]:
    """The passes, batches and numbers of threads there are, one thread first."""
    found = {tuple(r[key] for key in KEYS) for r in select(records, section) if "seconds" in r}
    order = sorted(found, key=lambda case: (case[2], case[1], len(case[0])))
    return [dict(zip(KEYS, case, strict=True)) for case in order]


def describe(case: dict[str, Any]) -> str:
    """A case in words."""
    threads = f"{case['threads']} thread{'s' if case['threads'] > 1 else ''}"
    return f"{case['pass']}, B={case['batch']}, {threads}"


def _rows(present: set[str]) -> list[tuple[str, str]]:
    """For each map ours, then the others, each with the name of ours."""
    names = [
        (contender.name, OURS[map])
        for map in (ELU, FAVOR)
        for contender in CONTENDERS
        if contender.map in (map, None)
    ]
    return [pair for pair in names if pair[0] in present]


def _cell(here: list[Record], name: str, ours: str, length: int) -> str:
    found = {r["contender"]: r for r in here if r["length"] == length}
    record = found.get(name)
    if record is None or "skipped" in record:
        return "-"
    if "wrong" in record:
        return "wrong"
    text = ms(record)
    base = found.get(ours, {}).get("seconds")
    return text if base is None or name == ours else f"{text} ({record['seconds'] / base:.2f}x)"


def crossovers(records: list[Record]) -> str:
    """The first length from which ours is ahead of causal SDPA at every longer one, too."""
    rows = []
    for case in cases(records, "causal"):
        here = [r for r in select(records, "causal", **case) if "seconds" in r]
        seconds = {(r["contender"], r["length"]): r["seconds"] for r in here}
        both = [n for name, n in seconds if name == SDPA]
        rows.append([describe(case), *(_crossover(seconds, both, OURS[m]) for m in OURS)])
    title = "Length from which ours is ahead of causal SDPA"
    measured = any(r["contender"] == SDPA for r in select(records, "causal") if "seconds" in r)
    return table(["", *OURS.values()], rows, title) if measured else ""


def _crossover(seconds: dict[tuple[str, int], float], lengths: list[int], ours: str) -> str:
    lengths = sorted(n for n in lengths if (ours, n) in seconds)
    behind = [n for n in lengths if seconds[ours, n] >= seconds[SDPA, n]]
    ahead = [n for n in lengths if n > max(behind, default=0)]
    if not lengths:
        return "-"
    if not ahead:
        return f"not up to {lengths[-1]:,}"
    return f"{ahead[0]:,}" + (" (the shortest measured)" if ahead[0] == lengths[0] else "")
