"""Runs that take a second, and what they leave in their folder."""

from __future__ import annotations

import csv

import torch
from safetensors.torch import load_file

from fast_transformers.hf.recipe import make_recipe

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
