"""Small models trained on associative recall, one for each feature map; for ``compare mqar``."""

from __future__ import annotations

import contextlib
import csv
import io
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .diagnostics.attention_report import SOFTMAX
from .diagnostics.page import Section
from .diagnostics.table import Cell, Report
from .specs import parse_feature_map

MAPS = (
    "elu",
    "relu",
    "favor:n_dims=96",
    "t2r:n_dims=96",
    "exp",
    "projected:inner=taylor, dim=16",
    "hedgehog",
    "dpfp:nu=2",
)

Progress = Callable[[int], AbstractContextManager[Callable[[str], object]]]


class RecallRow(NamedTuple):
    """A map after training.

    Attributes:
        name, features: of the map; softmax attention has none of the latter.
        accuracy: share of held-out values that are recalled.
        bits: cross-entropy of a held-out value.
    """

    name: str
    features: int | None
    accuracy: float
    bits: float


@dataclass(frozen=True)
class RecallReport(Report):
    """What :func:`recall_report` returns; prints as a table.

    Attributes:
        rows: softmax attention and every map.
        pairs: how many are to be recalled.
        epochs, lr: of the training.
    """

    rows: tuple[RecallRow, ...]
    pairs: int
    epochs: int
    lr: float

    def cells(self) -> tuple[list[str], list[list[Cell]]]:
        """Head and rows of the table."""
        return ["feature map", "F", "accuracy", "bits"], [list(row) for row in self.rows]


def recall_report(
    specs: Sequence[str],
    *,
    tick: Callable[[str], object] = lambda _: None,
    **options: Any,
) -> RecallReport:
    """Train the model of ``train --data mqar`` with softmax attention and with every map.

    Args:
        specs: of the maps.
        tick: called with the map before it is trained.
        options: of ``train``, see ``fast_transformers.hf.recipe.Recipe``; None is its default for
            this task, after which maps have come apart.

    Raises:
        ValueError: for an option or a map that cannot be used.
        KeyboardInterrupt: on Ctrl-C.
    """
    from .hf.data import make_task
    from .hf.recipe import make_recipe

    exact = make_recipe("mqar", attention="full", **options)
    pairs = make_task("mqar", length=exact.length).description["most"]
    recipes = [(SOFTMAX, None, exact)]
    for spec in specs:
        recipe = make_recipe("mqar", feature_map=spec, **options)
        features = parse_feature_map(spec)(recipe.dim // recipe.heads).feature_dims
        recipes.append((spec, features, recipe))
    rows = []
    for name, features, recipe in recipes:
        tick(name)
        rows.append(RecallRow(name, features, *_trained(recipe)))
    return RecallReport(tuple(rows), pairs, exact.epochs, exact.lr)


def _trained(recipe: Any) -> tuple[float, float]:
    """Accuracy and bits on held-out sequences after a run, of which nothing is kept."""
    from .hf.runs import METRICS_FILE
    from .hf.training import Interrupted, train

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # a line for every epoch
                train(recipe, run, bar=False)
        except Interrupted:
            raise KeyboardInterrupt from None
        with (run / METRICS_FILE).open(newline="") as stream:
            last = list(csv.DictReader(stream))[-1]
    return float(last["held_out_accuracy"]), float(last["held_out_bits_per_dim"])


def mqar_page(
    specs: Sequence[str], *, length: int | None, progress: Progress
) -> tuple[str, list[Section]]:
    """Title and sections of a page on :func:`recall_report`; no specs means a selection."""
    specs = specs or MAPS
    with progress(len(specs) + 1) as tick:
        report = recall_report(specs, length=length, tick=tick)
    title = f"multi-query associative recall of {report.pairs} pairs"
    section = Section(
        "Learning to recall",
        "Models of two layers with two heads each, trained from the same start on the same "
        f"sequences: {report.pairs} pairs of 32 keys and 32 values, then every key again, whose "
        f"value is to be told; {report.epochs} epochs of 50 steps. accuracy: of held-out values; "
        f"guessing among those in the sequence has 1/{report.pairs}. bits: cross-entropy of a "
        "value.",
        [report],
    )
    return title, [section]
