"""Small models trained on associative recall, one for each map."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from fast_transformers import recall
from fast_transformers.cli import main
from fast_transformers.hf.recipe import DEFAULTS

SMALL = {
    "batch_size": 800, "layers": 1, "heads": 2, "dim": 16, "feed_forward": 16, "device": "cpu",
}  # fmt: skip


def test_every_map_is_trained_from_the_same_start(capsys) -> None:
    seen = []
    report = recall.recall_report(
        ["elu", "dpfp:nu=2", "elu"], length=8, epochs=1, tick=seen.append, **SMALL
    )
    assert seen == ["exact softmax", "elu", "dpfp:nu=2", "elu"]
    assert [row.features for row in report.rows] == [None, 8, 32, 8]
    assert report.rows[1] == report.rows[3] != report.rows[2]
    assert all(0 <= row.accuracy <= 1 and 0 < row.bits < 8 for row in report.rows)
    assert capsys.readouterr().out == ""


def test_the_command(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(DEFAULTS["mqar"], "epochs", 1)
    flags = ["--length", "8", "--feature-map", "relu", "--out", str(tmp_path)]
    assert main(["compare", "mqar", *flags]) == 0
    printed = capsys.readouterr().out
    assert "\nexact softmax" in printed
    assert "\nrelu " in printed
    assert "recall of 2 pairs" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fit", "3"], "--fit and --draws have no meaning for mqar"),
        (["--dims", "3"], "--dims is for synthetic inputs alone"),
        (["--calibrate-on", "x"], "--calibrate-on is for files and runs"),
        (["--length", "999"], "length from 4 to 128"),
    ],
)
def test_mistakes(capsys, tmp_path, flags, message) -> None:
    assert main(["compare", "mqar", "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
