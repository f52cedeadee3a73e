"""Training: what a run leaves behind, what it learns, and what its numbers mean."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fast_transformers.diagnostics import capture
from fast_transformers.hf.data import make_task
from fast_transformers.hf.runs import load_model
from fast_transformers.hf.training import bits_per_dimension, count_nats, train
from tests.hf.runs import CENTERED, assert_same_weights, rows, tiny, weights

pytestmark = pytest.mark.usefixtures("few_copies")


@pytest.mark.parametrize("attention", ["causal-linear", "full"])
def test_run_folder(attention, tmp_path, capsys):
    run = tmp_path / "run"
    model = train(tiny(attention=attention), run)
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"recipe.json", "metrics.csv", "checkpoint-8", "checkpoint-12"} <= names
    assert "checkpoint-4" not in names
    tokens = torch.tensor([[1, 2, 3, 10]])
    for loaded in (AutoModelForCausalLM.from_pretrained(run), load_model(run)):
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    table = rows(run)
    assert [(row["epoch"], row["step"]) for row in table] == [("1", "4"), ("2", "8"), ("3", "12")]
    assert all(math.isfinite(float(value)) for row in table for value in row.values())
    out, err = capsys.readouterr()
    lines = out.splitlines() + [line for line in err.splitlines() if line]
    pattern = r"epoch \d/3  train \d\.\d+  held-out \d\.\d+ bits/symbol  \d+ s, \d+ s left"
    assert len(lines) == 3
    assert all(re.fullmatch(pattern, line) for line in lines)


def test_learns(tmp_path):
    train(tiny(epochs=40, length=3, lr=1e-2, dropout=0.0), tmp_path)
    last = rows(tmp_path)[-1]
    assert float(last["held_out_bits_per_dim"]) < 1.0  # chance is 3.3
    assert float(last["held_out_accuracy"]) > 0.7


def centers(run):
    """What the maps of the layers of a run subtract from keys."""
    return [w for name, w in weights(run).items() if name.endswith("feature_map.of_keys")]


def test_statistics_are_those_of_training_sequences(tmp_path, capsys):
    """As the model stood before the last epoch, unless they are learned or switched off."""
    recipe = tiny(feature_map=CENTERED, dropout=0.0)
    train(recipe, tmp_path / "run")
    assert "feature maps of 1 layers calibrated on 8 training sequences" in capsys.readouterr().out
    before = load_model(tmp_path / "run" / "checkpoint-8")
    task = make_task("copy", length=9)
    task.train.set_epoch(2)
    found = capture(before, task.train.tokens[:8])
    (sample,) = found.layers.values()
    (center,) = centers(tmp_path / "run")
    torch.testing.assert_close(center, sample.k.mean((0, 1, 2)))
    assert center.abs().max() > 0.1
    train(replace(recipe, calibrate=False), tmp_path / "off")
    assert not centers(tmp_path / "off")[0].any()
    assert "calibrated" not in capsys.readouterr().out


def test_learned_statistics_start_at_those_of_training_sequences(tmp_path):
    recipe = tiny(feature_map="centered:inner=taylor, learned=True", lr=0.0, epochs=2)
    model = train(recipe, tmp_path / "run")
    task = make_task("copy", length=9)
    (sample,) = capture(model, task.train.tokens[:8]).layers.values()
    torch.testing.assert_close(centers(tmp_path / "run")[0], sample.k.mean((0, 1, 2)))


def test_bits_are_those_of_the_logits():
    logits, labels = torch.zeros(2, 4, 8), torch.tensor([[1, 0, 5, -100], [-100, -100, -100, 3]])
    logits[1, 2, 3] = 50.0
    counts = count_nats(logits, labels)
    assert counts[:, 1:].tolist() == [[2, 1], [1, 1]]

    class Prediction:
        predictions = counts.numpy()

    metrics = bits_per_dimension(Prediction)
    assert metrics["bits_per_dim"] == pytest.approx(2 * 3 / 3)  # two of log2(8) bits, one of 0
    assert metrics["accuracy"] == pytest.approx(2 / 3)


def test_same_seed_same_run(tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        train(tiny(seed=seed, epochs=1, feature_map="favor:n_dims=8"), tmp_path / name)
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    assert not any(torch.equal(one[name], three[name]) for name in one if "projection" in name)


def test_bad_recipe_leaves_no_folder(tmp_path):
    for options in ({"attention": "linear"}, {"feature_map": "favor:n_dims=3"}, {"rotary": True}):
        with pytest.raises(ValueError, match=r"linear|even"):
            train(tiny(heads=2, dim=10, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["bf16"])
def test_precisions(precision, tmp_path):
    train(tiny(epochs=1, precision=precision), tmp_path)
    assert all(w.dtype == torch.float32 for w in weights(tmp_path).values())


def test_two_processes_train_one_run(tmp_path):
    """As torchrun starts them: one folder, one row an epoch, random features alike."""
    flags = ["--data", "copy", "--length", "9", "--epochs", "2", "--batch-size", "200"]
    flags += ["--layers", "1", "--dim", "16", "--heads", "2", "--device", "cpu"]
    flags += ["--feature-map", CENTERED, "--out", str(tmp_path / "run")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node=2", "-m", "fast_transformers", "train", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 1
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3
    load_model(tmp_path / "run")
