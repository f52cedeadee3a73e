"""Training runs: a recipe in, a folder with a model, its metrics and its checkpoints out."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from .callbacks import Calibrates, Epochs, Schedules, StopOnRequest
from .data import IGNORED, NEVER, Task, make_task
from .modeling import FastTransformerForCausalLM
from .recipe import Recipe, find_device
from .runs import drop_incomplete, generation_defaults, newest_checkpoint, prepare_folder

# what loading a checkpoint raises if its files are damaged
UNREADABLE = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
)


class Interrupted(Exception):
    """The run was stopped by Ctrl-C, after it saved a checkpoint."""


def train(
    recipe: Recipe, run: Path, *, resume: bool = False, overwrite: bool = False, bar: bool = True
) -> FastTransformerForCausalLM:
    """Train a model and leave it in a folder that ``from_pretrained`` reads.

    Every epoch ends with a line on the console, a row in ``metrics.csv`` and a checkpoint, of
    which the two newest are kept. The first Ctrl-C stops after the step in progress and saves a
    checkpoint, too.

    Args:
        recipe: what to train, on what, and how.
        run: the folder; it must be empty or new unless one of the next two is set.
        resume: go on from the newest complete checkpoint in the folder. The same weights come
            out as without the interruption.
        overwrite: remove an earlier run from the folder first.
        bar: show a progress bar.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        ValueError: for a recipe that does not work, or a folder that is not ready.
        OSError: for data that cannot be read, or a folder that cannot be written.
        Interrupted: after Ctrl-C.
    """
    recipe.check()
    device = find_device(recipe.device, recipe.precision)
    task = make_task(recipe.data, length=recipe.length, seed=recipe.seed)
    set_seed(recipe.seed)
    model = FastTransformerForCausalLM(recipe.configuration(task))
    model.generation_config = generation_defaults(model.config, NEVER[task.description["kind"]])
    check_causal(model)
    checkpoint = newest_checkpoint(run) if resume else None
    arguments = _arguments(recipe, run, device, bar)
    if arguments.process_index == 0:
        if resume:
            drop_incomplete(run)
        else:
            prepare_folder(run, overwrite=overwrite)
            recipe.save(run)
    logging.disable_progress_bar()  # of loading and saving: they take no time
    trainer = BitsTrainer(run, task, bar, recipe.calibrate, arguments, model=model)
    with _stop_requests(trainer.stop):
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except UNREADABLE as error:
            if checkpoint is None or trainer.stop.stepped:
                raise
            raise ValueError(f"{checkpoint} cannot be resumed from: {error}") from error
    if trainer.stop.requested:
        raise Interrupted(f"stopped after step {trainer.state.global_step}")
    if arguments.process_index == 0:
        model.save_pretrained(run)
    return model.eval()


@torch.no_grad()
def check_causal(model: FastTransformerForCausalLM) -> None:
    """Raise ValueError for an attention that cannot be told to see the past alone."""
    try:
        model.eval()(torch.zeros(1, 2, dtype=torch.long))
    except RuntimeError as error:
        raise ValueError(
            f"attention {model.config.attention!r} cannot predict one token after another: {error}"
        ) from error


class BitsTrainer(Trainer):
    """The Trainer of transformers, with the callbacks of a run."""

    def __init__(
        self, run: Path, task: Task, bar: bool, calibrate: bool, args: TrainingArguments, **kw: Any
    ) -> None:
        self.stop = StopOnRequest()
        callbacks: list[Any] = [Epochs(run, task.unit, bar)] if args.process_index == 0 else []
        callbacks += [Schedules(), *([Calibrates()] if calibrate else []), self.stop]
        super().__init__(
            args=args,
            train_dataset=task.train,
            eval_dataset=task.held_out,
            callbacks=callbacks,
            data_collator=whole_batch,
            preprocess_logits_for_metrics=count_nats,
            compute_metrics=bits_per_dimension,
            **kw,
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)


def _arguments(recipe: Recipe, run: Path, device: str, bar: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=max(recipe.batch_size, 60),
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=recipe.seed,
        use_cpu=device == "cpu",
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=not bar,
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cache=True,  # a note for config.json; training has no cache
    )


def whole_batch(batch: Any) -> Any:
    """The collator: :class:`~.data.Sequences` hands out whole batches."""
    return batch


@torch.no_grad()
def count_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, L, V) and (N, L) to (N, 3): each sequence's nats, predicted tokens, and right ones."""
    labels, logits = labels[:, 1:], logits[:, :-1].float()
    counted = labels != IGNORED
    nats = torch.nn.functional.cross_entropy(
        logits.mT, labels, ignore_index=IGNORED, reduction="none"
    )
    right = (logits.argmax(-1) == labels) & counted
    return torch.stack([nats.double().sum(1), counted.sum(1), right.sum(1)], 1)


def bits_per_dimension(prediction: Any) -> dict[str, float]:
    """Bits per predicted token, and the share predicted right, from :func:`count_nats`."""
    nats, tokens, right = prediction.predictions.sum(0)
    return {
        "bits_per_dim": float(nats / tokens / torch.tensor(2.0).log()),
        "accuracy": right / tokens,
    }


@contextmanager
def _stop_requests(stop: StopOnRequest) -> Iterator[None]:
    """Within, the first Ctrl-C asks ``stop`` to stop, a second one interrupts at once."""

    def handle(number: int, frame: Any) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, previous)

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread, where Ctrl-C does not arrive anyway
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
