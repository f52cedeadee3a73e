"""A report as one HTML file that needs no other: text, tables and pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from .table import Cell, Report, cell

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e26; background: #fff; margin: 2rem auto;
       max-width: 76rem; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { max-width: 52rem; } .quiet { color: #6b6f7b; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: right; white-space: nowrap; }
th { border-bottom: 1.5px solid #1c1e26; font-weight: 600; vertical-align: bottom; }
td { border-bottom: 1px solid #ececec; }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-family: ui-monospace,
       monospace; font-size: 12px; }
tr.reference td { background: #f6f4ef; }
img { max-width: 100%; height: auto; display: block; }
figure { margin: .6rem 0 0; }
"""


class Section(NamedTuple):
    """A part of a page: a title, sentences, and any number of tables and pictures."""

    title: str
    text: str
    reports: Sequence[Report] = ()
    figures: Sequence[tuple[str, Any]] = ()  # file name without ending, matplotlib Figure


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page; every text is escaped, wherever it came from."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
        f'<h1>{_text(title)}</h1><p class="quiet">{_text(subtitle)}</p>',
    ]
    for section in sections:
        parts += [f"<h2>{_text(section.title)}</h2>", f"<p>{_text(section.text)}</p>"]
        parts += [_table(*report.cells()) for report in section.reports]
        parts += [_picture(name, figure) for name, figure in section.figures]
    return "\n".join([*parts, "</body></html>\n"])


def png(figure: Any) -> bytes:
    """A figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = ['<div class="wide"><table><thead><tr>', *(f"<th>{_text(h)}</th>" for h in head)]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        kind = ' class="reference"' if row[0] in ("exact softmax", "uniform") else ""
        cells = "".join(f"<td>{_text(cell(value))}</td>" for value in row)
        lines.append(f"<tr{kind}>{cells}</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def _picture(name: str, figure: Any) -> str:
    data = base64.b64encode(png(figure)).decode()
    return f'<figure><img alt="{_text(name)}" src="data:image/png;base64,{data}"></figure>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)
