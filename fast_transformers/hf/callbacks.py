"""What happens around the steps of a training run: console lines, metrics, redraws, statistics of
feature maps, stopping."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from ..diagnostics.capture import capture
from ..diagnostics.sources import LONGEST, MOST_ROWS
from ..feature_maps import FeatureMap, RandomFeatureMap
from .runs import METRICS_FILE, drop_oldest

COLUMNS: tuple[str, ...] = (
    "epoch",
    "step",
    "seconds",
    "train_bits_per_dim",
    "held_out_bits_per_dim",
    "held_out_accuracy",
    "learning_rate",
)


class Epochs(TrainerCallback):
    """A line on the console and a row in ``metrics.csv`` for each epoch, and a progress bar.

    After a checkpoint has been saved, all but the two newest are removed.

    Args:
        run: folder of the run.
        unit: what bits are counted for.
        bar: whether to show the bar, with the time left.
    """

    def __init__(self, run: Path, unit: str, bar: bool) -> None:
        self._run, self._unit, self._bar = run, unit, bar
        self._file = run / METRICS_FILE
        self._row: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = [row for row in _read(self._file) if int(row["step"]) <= state.global_step]
        with self._file.open("w", newline="") as stream:
            writer: Any = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self._first_step = state.global_step
        self._before = float(rows[-1]["seconds"]) if rows else 0.0
        self._start = time.monotonic()
        self._progress = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            disable=None if self._bar else True,  # None: only where nobody watches
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._row = {
                "train_bits_per_dim": logs["loss"] / math.log(2),
                "learning_rate": logs["learning_rate"],
            }

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        passed = time.monotonic() - self._start
        row = {
            **self._row,
            "epoch": round(state.epoch),
            "step": state.global_step,
            "seconds": round(self._before + passed, 2),
            "held_out_bits_per_dim": metrics["eval_bits_per_dim"],
            "held_out_accuracy": metrics["eval_accuracy"],
        }
        with self._file.open("a", newline="") as stream:
            writer: Any = csv.DictWriter(stream, COLUMNS)
            writer.writerow(row)
        left = passed / (state.global_step - self._first_step)
        left *= state.max_steps - state.global_step
        self._progress.write(
            f"epoch {row['epoch']}/{round(args.num_train_epochs)}  "
            f"train {row['train_bits_per_dim']:.3f}  "
            f"held-out {row['held_out_bits_per_dim']:.3f} bits/{self._unit}  "
            f"{row['seconds']:.0f} s, {left:.0f} s left"
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        drop_oldest(self._run)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.close()


class Schedules(TrainerCallback):
    """Redraws of random features, and epochs of the data, go on where a checkpoint left them.

    Checkpoints hold the features, but not how often they were used: once a step. The data
    loader tells the data the number of the epoch, but not when an epoch starts in its middle.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        for module in model.modules():
            if isinstance(module, RandomFeatureMap):
                module.calls.fill_(state.global_step)

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        train_dataloader.dataset.set_epoch(int(state.epoch))


class Calibrates(TrainerCallback):
    """Feature maps that have statistics take them from training sequences, as the model stands.

    Before every epoch, so that they follow the model; trained weights of a map count on its
    statistics, however, so a map with some has them from before the first epoch.
    """

    def on_epoch_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        maps = [m for m in model.modules() if isinstance(m, FeatureMap) and m.has_statistics]
        if state.epoch % 1 or not maps:  # resumed within an epoch, which has begun already
            return
        tokens = train_dataloader.dataset.tokens[:MOST_ROWS, :LONGEST]
        found = capture(model, tokens.to(args.device))
        if state.global_step:
            found = found.only(*(name for name, own in found.own.items() if not own.trainable))
        layers = found.calibrate()
        if not state.global_step and state.is_world_process_zero:
            tqdm.write(
                f"feature maps of {len(layers)} layers calibrated on {len(tokens)} training "
                "sequences"
            )


class StopOnRequest(TrainerCallback):
    """Ends training after the step in which ``requested`` becomes true, with a checkpoint.

    Attributes:
        requested: set this to stop.
        stepped: whether a step has begun.
    """

    def __init__(self) -> None:
        self.requested = self.stepped = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepped = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested and state.global_step < state.max_steps:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested and state.epoch % 1:  # within an epoch, which is not over
            control.should_save = True
            control.should_evaluate = control.should_log = False


def _read(file: Path) -> list[dict[str, str]]:
    """The rows of an earlier metrics file that can be read."""
    if not file.is_file():
        return []
    with file.open(newline="", errors="replace") as stream:
        rows = csv.DictReader(stream)
        return [row for row in rows if set(row) == set(COLUMNS) and (row["step"] or "").isdigit()]
