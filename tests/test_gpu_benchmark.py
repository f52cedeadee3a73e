"""The benchmark command for a GPU: what can be said of it without one."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

pytest.importorskip("tabulate")
from benchmarks import gpu_contenders, gpu_report
from benchmarks.__main__ import main

SPEED = {"seconds": 1e-3, "low": 9e-4, "high": 1.2e-3, "host": 5e-5}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_says_that_it_needs_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "--quick"])
    assert main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"[^\n]*no CUDA device\n", err)


def make_records() -> list[dict]:
    about = dict.fromkeys(("card", "driver", "cuda", "torch", "triton", "fla", "python"), "1")
    records = [{"section": "machine", "date": "2026-01-02T03:04:05", **about}]
    records.append({"section": "ceilings", "copy": 4e12, "product": 7e14})
    for contender in gpu_contenders.CONTENDERS:
        for causal in contender.forms:
            case = {"section": "causal" if causal else "full", "contender": contender.name}
            case["map"] = contender.map
            for length in (1024, 4096):
                for which in gpu_report.PASSES:
                    more = {"bytes": 2**24} if which != "forward" else {}
                    if contender.name.startswith("ours"):
                        more |= {"of copy": 0.5, "of product": 0.25}
                    records.append({**case, "length": length, "pass": which, **SPEED, **more})
    records.append({"section": "full", "contender": "X", "map": None, "wrong": ["too large"]})
    records.append(
        {"section": "decode", "contender": "ours", "batch": 64, "of copy": 0.8, **SPEED}
    )
    case = {"section": "model", "layers": 12, "batch": 2, "length": 8192}
    records.append({**case, "contender": "SDPA", "skipped": "out of memory"})
    speed = {**SPEED, "tokens per second": 1e5, "bytes": 2**30}
    records.append({**case, "contender": "ours", **speed})
    first = {"forward": 5.25, "backward": 9.5, "another length": 0.01}
    case = {"section": "compile", "map": "elu+1", "form": "full"}
    records += [
        {**case, "cache": "cold", **first},
        {**case, "cache": "warm", "wrong": ["stopped"]},
    ]
    return records


def test_tables_and_figures(monkeypatch, capsys, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "it.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in make_records()))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "report", str(path)])
    assert main() == 0
    text = (tmp_path / "it.md").read_text()
    assert capsys.readouterr().out.endswith(text + "\n")  # the last thing that is printed
    assert "| ours, elu+1" in text
    assert "1 ±15% [50% / 25%]" in text
    assert "1 ±15% (1.00x)" in text
    assert "until the call returns to the host, ms" in text
    assert "0.05" in text
    assert "WRONG: too large" in text
    assert "100,000" in text
    assert re.search(r"elu\+1, full +\| cold +\| 5\.25 +\| 9\.50", text)
    assert "WRONG: stopped" in text
    assert "SDPA, model: out of memory" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"it-time.png", "it-memory.png"}


def test_work() -> None:
    """Per token and head: E = M = 64, and 256 features of 128 directions."""
    each = [
        gpu_contenders.least_flops(map, causal, 1, backward) // 16
        for map in ("elu+1", "Favor 256")
        for causal in (True, False)
        for backward in (False, True)
    ]
    fm, p, chunk = 256 * 64, 2 * 64 * 128, 64 * 320
    assert each[4:] == [
        3 * p + 6 * fm + 2 * chunk,
        10 * p + 18 * fm + 8 * chunk,
        2 * p + 4 * fm,
        7 * p + 12 * fm,
    ]
    assert each[0] == 6 * 64 * 64 + 2 * 64 * 128
    assert gpu_contenders.least_bytes(1, True) == 12 * 16 * 64 * 2
