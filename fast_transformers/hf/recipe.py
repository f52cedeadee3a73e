"""The options of a training run: defaults for each kind of data, checks, and their file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .configuration import FastTransformerConfig
from .data import Task

RECIPE_FILE = "recipe.json"
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Recipe:
    """How to train a model; :func:`make_recipe` fills in what suits the data.

    Attributes:
        data: see :func:`~.data.make_task`.
        attention, feature_map: see :class:`~.configuration.FastTransformerConfig`.
        epochs: passes over the training sequences.
        batch_size: sequences in a step.
        lr: highest learning rate; a tenth of the steps lead up to it, a cosine down to 0.
        layers, heads, dim, feed_forward, dropout, rotary, norm_first: of the model.
        length: see :func:`~.data.make_task`; None is the data's own.
        weight_decay: of AdamW, for matrices.
        calibrate: whether feature maps that have statistics take them from training sequences,
            see :class:`~.callbacks.Calibrates`.
        seed: of the weights, the order and everything that is drawn.
        device: "auto" takes a GPU if there is one.
        precision: "bf16" and "fp16" are mixed with float32.
    """

    data: str
    attention: str = "causal-linear"
    feature_map: str = "elu"
    epochs: int = 10
    batch_size: int = 16
    lr: float = 1e-3
    layers: int = 4
    heads: int = 6
    dim: int = 96
    feed_forward: int = 192
    dropout: float = 0.0
    rotary: bool = False
    norm_first: bool = False
    length: int | None = None
    weight_decay: float = 0.1
    calibrate: bool = True
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"

    def save(self, run: Path) -> None:
        """Write the recipe into the folder of a run."""
        (run / RECIPE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(run: Path) -> Recipe:
        """Read the recipe of a run.

        Raises:
            OSError: if the folder holds none.
            ValueError: if it is no recipe.
        """
        text = (run / RECIPE_FILE).read_text(errors="replace")
        try:
            options = json.loads(text)
            if not isinstance(options, dict):
                raise TypeError("it must be an object")
            recipe = Recipe(**options)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{run / RECIPE_FILE} is not a recipe: {error}") from error
        recipe.check()
        return recipe

    def check(self) -> None:
        """Raise ValueError, naming the option, for a value that cannot be used."""
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not _whole(value) or not 1 <= value <= 2**20:
                raise ValueError(f"{name} must be a whole number from 1 to {2**20}, got {value!r}")
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if not _whole(self.seed) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {self.seed!r}")
        if self.length is not None and not _whole(self.length):
            raise ValueError(f"length must be a whole number, got {self.length!r}")
        if not isinstance(self.calibrate, bool):
            raise ValueError(f"calibrate must be True or False, got {self.calibrate!r}")
        if not isinstance(self.data, str):
            raise ValueError(f"data must be a name or a path, got {self.data!r}")
        for name, choices in (("device", DEVICES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )

    def configuration(self, task: Task) -> FastTransformerConfig:
        """The configuration of a model for the task; ValueError if there is no such model."""
        special: dict[str, Any] = task.special
        return FastTransformerConfig(
            vocab_size=task.vocab_size,
            n_positions=task.length,
            n_layers=self.layers,
            n_heads=self.heads,
            d_model=self.dim,
            feed_forward=self.feed_forward,
            attention=self.attention,
            feature_map=self.feature_map,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            rotary=self.rotary,
            norm_first=self.norm_first,
            task=task.description,
            **special,
        )


# What each kind of data needs beyond the defaults above. Found by experiment on two CPU cores.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 12, "lr": 4e-3},
    "copy": {"epochs": 12, "batch_size": 32, "lr": 4e-3},
    "mqar": {
        "feature_map": "dpfp:nu=2",  # elu and random features do not learn it in 10 epochs
        "batch_size": 64,
        "lr": 5e-3,
        "layers": 2,
        "heads": 2,
        "norm_first": True,
    },
    "bytes": {"epochs": 5, "lr": 4e-3, "feed_forward": 384, "rotary": True},
}
OPTIONS = tuple(f.name for f in fields(Recipe))


def make_recipe(data: str, **options: Any) -> Recipe:
    """The recipe for the data; options that are None keep the default for this kind of data.

    Raises:
        ValueError: for an option that cannot be used.
    """
    given = {name: value for name, value in options.items() if value is not None}
    recipe = Recipe(data=data, **{**DEFAULTS.get(data, DEFAULTS["bytes"]), **given})
    recipe.check()
    return recipe


def find_device(device: str, precision: str = "fp32") -> str:
    """The device that "auto" means, or the one named.

    Raises:
        ValueError: for a device that is not here, or a precision that it does not have.
    """
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if here[name])
    if not here.get(device):
        raise ValueError(f"device {device!r} is not available here; pass auto or cpu")
    if precision == "fp16" and device != "cuda":
        raise ValueError(f"precision fp16 needs the device cuda, got {device}; pass bf16 or fp32")
    return device


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
