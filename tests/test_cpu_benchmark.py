"""The benchmark command for a CPU: nothing is told of who answers wrongly."""

from __future__ import annotations

import json
import re
import sys

import pytest

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
from benchmarks.__main__ import main
from benchmarks.processes import Worker

SECTIONS = ["causal", "memory", "redraw", "model", "idle-workers"]
# a row of a table with a number in it
FIGURE = re.compile(r"^\| *(ours, (elu\+1|Favor 256)|SDPA|\d).*\| *[\d.,]+[ %]", re.MULTILINE)


def test_refuses_whoever_is_wrong(monkeypatch, capsys) -> None:
    """By a thousandth, in sections of every kind; maps that no other library has go unchecked."""
    ask = Worker.ask

    def spoilt(self: Worker, command: str, **arguments):
        found = ask(self, command, **arguments)
        if command == "results":
            found["values"] *= 1.001
        return found

    monkeypatch.setattr(Worker, "ask", spoilt)
    flags = ["--quick", "--lengths", "512", "--contenders", "ours", "SDPA", "--limit", "0.1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "cpu", *flags, "--only", *SECTIONS])
    assert main() == 1
    out = capsys.readouterr().out
    assert not FIGURE.search(out), out
    for name in ("ours, elu+1", "ours, Favor 256", "SDPA"):
        assert f"WRONG: values of {name}, causal, forward, 2 x 200" in out
    assert "WRONG: values of the model" in out


def test_repeat_multiplies_the_measurements(monkeypatch, tmp_path) -> None:
    flags = ["--quick", "--lengths", "512", "--contenders", "SDPA", "--passes", "forward"]
    flags += ["--only", "causal", "--repeat", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "cpu", *flags])
    assert main() == 0
    (log,) = tmp_path.glob("*.jsonl")
    lines = map(json.loads, log.read_text().splitlines())
    assert [len(line["cpu"]) for line in lines if "calls" in line] == [6]
