"""Queries and keys of a trained run, for the command ``compare``."""

from __future__ import annotations

from pathlib import Path

from ..diagnostics.capture import capture
from ..diagnostics.sources import LONGEST, MOST_ROWS, Source
from .data import make_task
from .recipe import Recipe
from .runs import load_model


def from_run(run: Path) -> Source:
    """What the attentions of a run's model are given for held-out sequences.

    Maps are calibrated on sequences of the training data.

    Raises:
        OSError: for a folder without a run, or data that is not there any more.
        ValueError: for a run that does not fit its data.
    """
    model = load_model(run)
    recipe = Recipe.load(run)
    task = make_task(recipe.data, length=recipe.length, seed=recipe.seed)
    if task.vocab_size != model.config.vocab_size:
        raise ValueError(f"{run}: the model is not for the data {recipe.data!r} of its recipe")
    held_out, train = (part.tokens[:MOST_ROWS, :LONGEST] for part in (task.held_out, task.train))
    found, examples = capture(model, held_out), capture(model, train)
    title = f"{len(held_out)} held-out sequences of {recipe.data}, as the model in {run} sees them"
    return Source(title, found.layers, examples.layers, found.own)
