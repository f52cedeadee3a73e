"""Recipes, and the folders that models are loaded from, as hostile input."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from fast_transformers.hf import FastTransformerConfig, FastTransformerForCausalLM
from fast_transformers.hf.recipe import Recipe, find_device, make_recipe
from fast_transformers.hf.runs import load_model
from tests.hf.runs import tiny


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
