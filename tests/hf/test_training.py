import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fast_transformers.diagnostics import capture
from fast_transformers.hf import FastTransformerConfig, FastTransformerForCausalLM
from fast_transformers.hf import training as training_module
from fast_transformers.hf.callbacks import StopOnRequest
from fast_transformers.hf.data import make_task
from fast_transformers.hf.recipe import Recipe, find_device, make_recipe
from fast_transformers.hf.runs import load_model, newest_checkpoint
from fast_transformers.hf.training import Interrupted, bits_per_dimension, count_nats, train


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    """Copying tasks with 64 sequences an epoch."""
    from fast_transformers.hf import data

    draw = data._draw_copies
    monkeypatch.setattr(data, "_draw_copies", lambda n, *args: draw(64, *args))


CENTERED = "centered:inner='derf:n_dims=8'"


def tiny(**options):
    sizes = {"length": 9, "layers": 1, "heads": 2, "dim": 16, "feed_forward": 16}
    return make_recipe(
        "copy", device="cpu", **{**sizes, "epochs": 3, "batch_size": 16, "dropout": 0.1, **options}
    )


def weights(run):
    return load_file(run / "model.safetensors")


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def rows(run):
    with (run / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


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


def test_bad_recipe_leaves_no_folder(tmp_path):
    for options in ({"attention": "linear"}, {"feature_map": "favor:n_dims=3"}, {"rotary": True}):
        with pytest.raises(ValueError, match=r"linear|even"):
            train(tiny(heads=2, dim=10, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["bf16"])
def test_precisions(precision, tmp_path):
    train(tiny(epochs=1, precision=precision), tmp_path)
    assert all(w.dtype == torch.float32 for w in weights(tmp_path).values())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs must be"),
        ({"batch_size": -1}, "batch_size must be"),
        ({"lr": math.nan}, "lr must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"seed": -1}, "seed must be"),
        ({"length": 2.5}, "length must be"),
        ({"device": "tpu"}, "device must be"),
        ({"precision": "int8"}, "precision must be"),
        ({"calibrate": "yes"}, "calibrate must be"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        make_recipe("copy", **options)


def test_devices():
    assert find_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="fp16 needs"):
        find_device("cpu", "fp16")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"data": "copy", "colour": 3}', '{"data": 3}'])
def test_bad_recipe_file(text, tmp_path):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ValueError, match=r"recipe|data must"):
        Recipe.load(tmp_path)


def test_recipe_file(tmp_path):
    recipe = replace(tiny(), feature_map="favor")
    recipe.save(tmp_path)
    assert Recipe.load(tmp_path) == recipe


@pytest.fixture
def saved(tmp_path):
    task = {"kind": "copy", "symbols": 10, "most": 4}
    config = FastTransformerConfig(
        vocab_size=12, n_positions=9, n_layers=1, n_heads=2, d_model=16, task=task
    )
    FastTransformerForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("config.json", None, "config.json is missing"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("config.json", b"{", "not JSON"),
        ("config.json", b"[" * 100_000, "not JSON"),
        ("config.json", b"3", "must hold a JSON object"),
        ("config.json", {"model_type": "gpt2"}, "type 'gpt2'"),
        ("config.json", {"n_layers": 2}, "lacks weight"),
        ("config.json", {"rotary": True}, "has the unknown weight"),
        ("config.json", {"feed_forward": 8}, "must have shape"),
        ("config.json", {"attention": "x"}, "unknown attention"),
        ("config.json", {"n_layers": "x"}, "n_layers must be"),
        ("config.json", {"d_model": 1e300}, "d_model must be"),
        ("config.json", {"task": None}, "task must be"),
        ("model.safetensors", b"", "damaged"),
        ("model.safetensors", b"\xff" * 64, "damaged"),
    ],
)
def test_bad_model_folder(saved, file, change, text):
    if change is None:
        (saved / file).unlink()
    elif isinstance(change, dict):
        options = json.loads((saved / file).read_text())
        (saved / file).write_text(json.dumps({**options, **change}))
    else:
        (saved / file).write_bytes(change)
    with pytest.raises((ValueError, OSError), match=text):
        load_model(saved)


def test_good_model_folder(saved):
    load_model(saved)


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
