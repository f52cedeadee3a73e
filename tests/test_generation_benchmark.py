"""The commands that measure generation, with models and prompts that are small and quick."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

pytest.importorskip("tabulate")
from benchmarks import generation, images, streaming, tables
from benchmarks.__main__ import main

FORM = "graph" if torch.cuda.is_available() else "plain"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Images of 26 pixels, prompts of 700 tokens."""
    for name, shape in images.SHAPES.items():
        tiny = images.Shape(1, 26, shape.throughput, shape.latency)
        monkeypatch.setitem(images.SHAPES, name, tiny)
    for key in generation.BATCHES:
        monkeypatch.setitem(generation.BATCHES, key, [40])
    monkeypatch.setattr(streaming, "PROMPT", 700)
    monkeypatch.setattr(streaming, "STEPS", 8)


def command(monkeypatch, capsys, *flags):
    """Status, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, flags)])
    status = main()
    return status, *capsys.readouterr()


def records_of(folder, pattern):
    (path,) = folder.glob(pattern)
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def test_images(monkeypatch, capsys, tmp_path) -> None:
    flags = ["--forms", FORM, "--batches", 40, "--out", tmp_path]
    status, out, err = command(monkeypatch, capsys, "generation", *flags)
    assert status == 0, err
    path, (about, *found) = records_of(tmp_path, "*-generation-*.jsonl")
    assert about["torch"] == torch.__version__
    rates = [r for r in found if r["section"] == "images"]
    assert len(rates) == 2 * 2 * 2  # shapes, attentions, batches
    assert all(0 < r["low"] <= r["seconds"] <= r["high"] for r in rates)
    assert all(r["rate"] == pytest.approx(r["batch"] / r["seconds"]) for r in rates)
    assert {r["ran"] for r in rates} == {FORM}
    assert [r["disagreement"] for r in found if r["section"] == "answers"] == [""] * 4
    table = path.with_suffix(".md").read_text()
    assert table in out
    for row in ("linear (elu+1), ours", "softmax with a cache, here", "linear, paper"):
        assert table.count(f"| {row} ") == 2
    best = max(r["rate"] for r in rates if (r["shape"], r["attention"]) == ("MNIST", "linear"))
    assert f"| {tables.number(best)} [" in table
    path.with_suffix(".md").unlink()
    assert command(monkeypatch, capsys, "report", path)[0] == 0
    assert path.with_suffix(".md").read_text() == table


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_page_shows_what_was_measured(kind, monkeypatch, capsys, tmp_path) -> None:
    """Writing the tables of its log again changes nothing."""
    page, written = generation.PAGE.read_text(), tmp_path / "page.md"
    monkeypatch.undo()  # the real images
    link = re.search(rf"results/(\S+-generation-{kind}\S*\.jsonl)\)", page)
    if link is None:
        assert f"images on a {kind.upper()}: written by the command -->\n\n<!--" in page
        return
    newest = generation.RESULTS / link[1]
    written.write_text(page)
    monkeypatch.setattr(generation, "PAGE", written)
    log = tmp_path / newest.name
    log.write_text(newest.read_text())
    monkeypatch.setattr(generation, "RESULTS", tmp_path.resolve())
    assert command(monkeypatch, capsys, "report", log, "--docs")[0] == 0
    assert written.read_text() == page


def test_what_is_not_measured_is_said(monkeypatch, capsys) -> None:
    other = "plain" if FORM == "graph" else "graph"
    flags = ["--shapes", "MNIST", "--attentions", "linear", "--minutes", 0, "--forms", other]
    status, out, _ = command(monkeypatch, capsys, "generation", *flags)
    assert status == 0
    assert f"* MNIST, linear, batch 1, {other}: not begun within 0 minutes" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_a_form_that_there_is_not(monkeypatch, capsys) -> None:
    flags = ["--shapes", "MNIST", "--attentions", "linear", "--forms", "graph"]
    status, out, _ = command(monkeypatch, capsys, "generation", *flags)
    assert status == 0
    assert re.search(r"batch 1, graph: RuntimeError: no graph step can be taken: the tensors", out)


def test_wrong_answers_have_no_speed(monkeypatch, capsys) -> None:
    step = images.Pixels.step

    def wrong(self, token, state):
        logits, state = step(self, token, state)
        return logits * 1.01, state

    monkeypatch.setattr(images.Pixels, "step", wrong)
    flags = ["--shapes", "CIFAR", "--attentions", "softmax", "--forms", FORM, "--batches", 3]
    status, out, _ = command(monkeypatch, capsys, "generation", *flags)
    assert status == 1
    assert re.search(rf"WRONG: CIFAR, softmax, {FORM}: relative error \S+, allowed \S+", out)
    assert "images/s, " not in out


def test_streaming(monkeypatch, capsys, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(streaming, "LEAST", 1e-3)
    flags = ["--last", 300, "--layers", 1, "--out", tmp_path, "--plot", tmp_path / "it.png"]
    status, out, err = command(monkeypatch, capsys, "streaming", *flags)
    assert status == 0, err
    assert re.match(r"700 tokens read at once and 8 steps: .*x: as fast as it has to be\n", out)
    path, (_, prompt, *found) = records_of(tmp_path, "*-streaming-*.jsonl")
    assert 0 < prompt["error"] <= prompt["budget"]
    linear = [r for r in found if r["attention"] == "linear"]
    assert [r["length"] for r in linear] == [1, 3, 10, 30, 100, 300]
    assert len({r["bytes"] for r in linear}) == 1
    softmax = [r["bytes"] for r in found if r["attention"] == "softmax"]
    assert softmax == sorted(softmax)
    assert softmax[0] < softmax[-1]
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    assert command(monkeypatch, capsys, "report", path)[0] == 0
    assert path.with_suffix(".png").is_file()


def test_a_prompt_that_is_read_too_slowly(monkeypatch, capsys) -> None:
    monkeypatch.setattr(streaming, "LEAST", 1e6)
    status, out, _ = command(monkeypatch, capsys, "streaming", "--last", 1, "--layers", 1)
    assert status == 1
    assert "too slow, by 1e+06x" in out
