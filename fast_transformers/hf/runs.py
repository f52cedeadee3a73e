"""The folder of a run: what may be in it, its newest complete checkpoint, its model."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model as load_weights
from transformers import GenerationConfig

from .configuration import FastTransformerConfig
from .data import NEVER, check_description
from .modeling import FastTransformerForCausalLM
from .recipe import RECIPE_FILE

METRICS_FILE = "metrics.csv"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",  # written last
)


def prepare_folder(run: Path, *, overwrite: bool) -> None:
    """Make sure that a new run may write into the folder.

    Args:
        run: made if it does not exist.
        overwrite: remove what an earlier run wrote, and nothing else.

    Raises:
        ValueError: if there is something in the folder and ``overwrite`` is not set.
        OSError: if the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise OSError(
            f"out {run}: must be a folder that can be written: {error}; name another"
        ) from error
    if any(run.iterdir()) and not overwrite:
        raise ValueError(
            f"{run} is not empty; pass --resume to go on, or --overwrite to start anew"
        )
    if overwrite:
        for name in (RECIPE_FILE, METRICS_FILE, *MODEL_FILES):
            (run / name).unlink(missing_ok=True)
        for folder in checkpoints(run):
            shutil.rmtree(folder)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, the newest first."""
    found = [
        (int(match[1]), path)
        for path in run.iterdir()
        if (match := CHECKPOINT.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def steps_in(checkpoint: Path) -> int | None:
    """The number of steps that a complete checkpoint holds; None if it is not complete."""
    if not all((checkpoint / name).is_file() for name in CHECKPOINT_FILES):
        return None
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        ValueError: if there is none.
    """
    for checkpoint in checkpoints(run) if run.is_dir() else []:
        if steps_in(checkpoint) is not None:
            return checkpoint
    raise ValueError(f"{run} holds no complete checkpoint; start anew with --overwrite")


def drop_oldest(run: Path, keep: int = 2) -> None:
    """Remove all but the newest complete checkpoints; the Trainer would go by their mtime."""
    complete = [c for c in checkpoints(run) if steps_in(c) is not None]
    for checkpoint in complete[keep:]:
        shutil.rmtree(checkpoint)


def drop_incomplete(run: Path) -> None:
    """Remove the checkpoints that an interrupted run did not finish writing."""
    for checkpoint in checkpoints(run):
        if steps_in(checkpoint) is None:
            shutil.rmtree(checkpoint)


def load_model(run: Path) -> FastTransformerForCausalLM:
    """The model in the folder of a run, ready to generate.

    Nothing in the folder is executed: weights are safetensors, the rest is JSON.

    Raises:
        OSError: for a file that is missing.
        ValueError: for a model of another kind, or files that do not belong together.
    """
    for name in ("config.json", "model.safetensors"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} holds no trained model: {name} is missing")
    config = load_config(run / "config.json")
    kind = check_description(config.task or {}, config.vocab_size)
    _check_weights(run / "model.safetensors", config)
    model = FastTransformerForCausalLM(config)
    load_weights(model, run / "model.safetensors")
    model.generation_config = generation_defaults(config, NEVER[kind])
    return model.eval()


def generation_defaults(config: FastTransformerConfig, never: Sequence[int]) -> GenerationConfig:
    """What ``generate`` does unless told otherwise; ``never`` are tokens that do not come out."""
    return GenerationConfig(
        max_new_tokens=config.n_positions - 1,  # after the first token of a sequence
        suppress_tokens=list(never),
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
    )


def load_config(file: Path) -> FastTransformerConfig:
    """The configuration in a file; ValueError if it is none of this package's."""
    options = _read_json(file)
    kind = options.get("model_type")
    if kind != FastTransformerConfig.model_type:
        raise ValueError(
            f"{file} is for a model of type {kind!r}, not {FastTransformerConfig.model_type!r}"
        )
    own = FastTransformerConfig.__annotations__
    try:
        return FastTransformerConfig(**{n: v for n, v in options.items() if n in own})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not valid: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _check_weights(file: Path, config: FastTransformerConfig) -> None:
    """ValueError unless the file has exactly the weights of the configuration."""
    with torch.device("meta"):
        wanted = FastTransformerForCausalLM(config).state_dict()
    try:
        with safe_open(file, "pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    for name in sorted(wanted.keys() ^ shapes.keys()):
        where = "lacks" if name in wanted else "has the unknown"
        raise ValueError(f"{file} does not fit its config.json: it {where} weight {name!r}")
    for name, tensor in wanted.items():
        if list(tensor.shape) != list(shapes[name]):
            raise ValueError(
                f"{file} does not fit its config.json: {name!r} must have shape "
                f"{tuple(tensor.shape)}, got {tuple(shapes[name])}"
            )
