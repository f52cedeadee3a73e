"""The log of a run: one JSON object per line, written as soon as it is known."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Log:
    """Records in memory, and in a file that an interrupted run leaves readable.

    Args:
        path: a new file to write; None keeps the records in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: list[Record] = []
        self._lock = threading.Lock()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)

    @classmethod
    def open(cls, path: Path) -> Log:
        """The log of an earlier run."""
        log = cls()
        log.path = path
        log.records = [json.loads(line) for line in path.read_text().splitlines()]
        return log

    def add(self, section: str, **fields: Any) -> None:
        """Append a record."""
        record = {"section": section, **fields}
        with self._lock:
            self.records.append(record)
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps(record) + "\n")


def unused(path: Path) -> Path:
    """The path, or the first of ``<stem>-2``, ``<stem>-3``, ... that does not exist."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return candidate


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def select(records: list[Record], section: str, **fields: Any) -> list[Record]:
    """Records of a section with these values, in order."""
    return [
        record
        for record in records
        if record["section"] == section
        and all(record.get(name) == value for name, value in fields.items())
    ]
