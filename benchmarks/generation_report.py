"""The table of the command ``generation``."""

from __future__ import annotations

from typing import Any

from .generation import best, line
from .images import SHAPES
from .log import Record, select
from .tables import number, table

NAMES = {"linear": "linear (elu+1), ours", "softmax": "softmax with a cache, here"}


def report(records: list[Record]) -> str:
    """Images a second and seconds of one image, for both shapes, the paper's below."""
    (it,) = select(records, "machine")
    where = it.get("card") or f"{it['cpu']}, {it['threads']} threads"
    parts = [
        f"{it['date'][:16].replace('T', ' ')}, {where}, torch {it['torch']}, {it['dtype']}, sums "
        "in float32. Random weights; complete images, pixel by pixel, with drawing. [Images at "
        'once and form.] The paper is "Transformers are RNNs" (tables 1, 2 and 5), on a GPU of '
        "its time, the latency also on a CPU."
    ]
    for name, shape in SHAPES.items():
        rows = [_row(records, name, attention) for attention in NAMES]
        if not any(cell != "-" for row in rows for cell in row[1:]):
            continue
        for method, rate in shape.throughput.items():
            cpu, gpu = shape.latency[method]
            rows.append([f"{method}, paper", f"{rate:g}", f"{gpu:g}; CPU {cpu:g}"])
        title = f"{name} shape: {shape.layers} layers, 8 heads x 32, {shape.pixels:,} pixels"
        parts.append(table(["", "images/s", "one image alone, s"], rows, title))
    wrong = [f"* WRONG: {line}" for r in records for line in r.get("wrong", ())]
    skipped = [f"* {line(r)}" for r in records if "skipped" in r]
    return "\n\n".join([*parts, "\n".join([*wrong, *skipped])]).rstrip() + "\n"


def _row(records: list[Record], shape: str, attention: str) -> list[Any]:
    many, one = (best(records, shape, attention, alone) for alone in (False, True))
    cells = ["-" if r is None else f"{number(r[key])} [{_way(r)}]" for r, key in
             ((many, "rate"), (one, "seconds"))]  # fmt: skip
    return [NAMES[attention], *cells]


def _way(r: Record) -> str:
    return f"{r['batch']:,}, {r['ran']}"
