"""Runs that stop, fail or go on; nothing that was saved is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from fast_transformers.hf import training as training_module
from fast_transformers.hf.callbacks import StopOnRequest
from fast_transformers.hf.runs import newest_checkpoint
from fast_transformers.hf.training import Interrupted, train
from tests.hf.runs import CENTERED, assert_same_weights, rows, tiny, weights

pytestmark = pytest.mark.usefixtures("few_copies")


def stop_at(monkeypatch, step):
    """Have Ctrl-C arrive during a step."""
    begin = StopOnRequest.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StopOnRequest, "on_step_begin", on_step_begin)


@pytest.mark.parametrize("feature_map", ["elu", "favor:n_dims=8,redraw=3", CENTERED])
@pytest.mark.parametrize("step", [3, 5])
def test_resumed_run_is_the_uninterrupted_run(feature_map, step, tmp_path, monkeypatch):
    recipe = tiny(feature_map=feature_map)
    train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted, match=f"after step {step + 1}"):
            train(recipe, tmp_path / "parts")
    assert newest_checkpoint(tmp_path / "parts").name == f"checkpoint-{step + 1}"
    train(recipe, tmp_path / "parts", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    for name in ("epoch", "step", "held_out_bits_per_dim", "learning_rate"):
        assert [row[name] for row in parts] == [row[name] for row in whole]
    seconds = [float(row["seconds"]) for row in parts]
    assert seconds == sorted(seconds)


def test_half_written_checkpoint_is_passed_over(tmp_path):
    train(tiny(), tmp_path)
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text("{")
    (tmp_path / "checkpoint-99").mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-8"
    before = weights(tmp_path)
    train(tiny(), tmp_path, resume=True)
    after = weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "checkpoint-99").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_damaged_checkpoint(name, tmp_path):
    train(tiny(epochs=1), tmp_path)
    checkpoint = newest_checkpoint(tmp_path)
    (checkpoint / name).write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(ValueError, match="cannot be resumed from"):
        train(tiny(epochs=2), tmp_path, resume=True)
    assert checkpoint.exists()


def test_failed_save_keeps_the_earlier_checkpoints(tmp_path, monkeypatch):
    def fail(self, output_dir):
        if output_dir.endswith("-12"):
            raise OSError(28, "No space left on device")
        return save(self, output_dir)

    save = training_module.BitsTrainer._save_optimizer_and_scheduler
    monkeypatch.setattr(training_module.BitsTrainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(OSError, match="No space"):
        train(tiny(), tmp_path)
    assert newest_checkpoint(tmp_path).name == "checkpoint-8"


def test_folder_must_be_ready(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        train(tiny(), tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        train(tiny(), tmp_path, resume=True)
    train(tiny(epochs=1), tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    train(tiny(epochs=2), tmp_path, overwrite=True)
    assert len(rows(tmp_path)) == 2


def test_ctrl_c_in_a_process(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 8)
    command = [sys.executable, "-m", "fast_transformers", "train", "--device", "cpu"]
    command += ["--data", str(tmp_path / "text"), "--length", "16", "--epochs", "5000"]
    command += ["--dim", "16", "--heads", "2", "--layers", "1", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("run/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (line,) = err.splitlines()
    assert "stopped after step" in line
    assert "train --resume --out" in line
    step = re.search(r"step (\d+)", line)[1]
    assert newest_checkpoint(tmp_path / "run").name == f"checkpoint-{step}"
    assert "Traceback" not in out + err
