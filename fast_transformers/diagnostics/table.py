"""Reports as tables: text that lines up, and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

Cell = str | int | float | None


class Report:
    """Base of what the diagnostics return: its ``str`` is a table."""

    def cells(self) -> tuple[list[str], list[list[Cell]]]:
        """Head and rows of the table."""
        raise NotImplementedError

    def markdown(self) -> str:
        """The table for a page of Markdown."""
        return markdown(*self.cells())

    def __str__(self) -> str:
        return table(*self.cells())


Row = TypeVar("Row")


def row_named(rows: Sequence[Row], name: str) -> Row:
    """The row of that name; KeyError, which lists the names, if there is none."""
    names = [getattr(row, "name", None) for row in rows]
    if name not in names:
        raise KeyError(f"no row {name!r}; there are {', '.join(map(str, names))}")
    return rows[names.index(name)]


def cell(value: Cell) -> str:
    """A number with three digits that count, "-" for none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value)
    if abs(value) < 1e-12:  # what rounding leaves
        return "0.000"
    if 1e-3 <= abs(value) < 1e4:
        digits = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Columns of text: the first one to the left, the others to the right."""
    texts = [list(head), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(head))]
    lines = []
    for row in texts:
        rest = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The same as a table of Markdown."""
    texts = [list(head), ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join(
        f"| {' | '.join(t.replace('|', chr(92) + '|') for t in row)} |" for row in texts
    )
