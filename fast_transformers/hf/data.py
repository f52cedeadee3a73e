"""The data that models can be trained on: digits, copying, associative recall, and any files.

A task's ``description`` goes into the model's configuration. It holds all that is needed to write
prompts for the model and to read what it generates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .files import read_bytes
from .recall import KEYS, VALUES, draw_recalls, most_pairs

IGNORED = -100  # label of a token that is not predicted

LEVELS, CLASSES, SIDE = 17, 10, 8  # of the scanned digits
HELD_OUT_DIGITS = 360
SHIFTED_DIGITS = 0.1  # share of the training images that an epoch moves by up to a pixel

SYMBOLS, SEPARATOR, PADDING = 10, 10, 11  # tokens of the copying task
BYTES, START = 256, 256  # tokens of text

NEVER = {  # tokens that are never generated, by kind of task
    "digits": tuple(range(LEVELS, LEVELS + CLASSES)),
    "copy": (SEPARATOR, PADDING),
    "mqar": tuple(range(KEYS)),
    "bytes": (START,),
}


class Sequences(Dataset):
    """Sequences that may change from epoch to epoch; batches are taken out in one go.

    Args:
        draw: makes the tokens (n, L) and labels (n, L) of an epoch from a generator.
        seed: of the generator; an epoch depends on nothing but this and its number.
    """

    def __init__(
        self, draw: Callable[[torch.Generator], tuple[Tensor, Tensor]], seed: int = 0
    ) -> None:
        self._draw, self._seed, self._epoch = draw, seed, -1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the sequences of an epoch."""
        if epoch == self._epoch:
            return
        self._epoch = epoch
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        self.tokens, self.labels = self._draw(generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return self[torch.tensor(indices)]  # type: ignore[index]


@dataclass(frozen=True)
class Task:
    """Training and held-out sequences, and what they mean.

    Attributes:
        train: sequences to learn from.
        held_out: sequences to measure with, the same for every seed.
        vocab_size: number of tokens.
        length: tokens in a sequence.
        unit: what bits are counted for: "pixel", "symbol", "value" or "byte".
        description: what a model needs to know of the task, as JSON types.
        special: ids for the model's configuration (``bos_token_id``, ``pad_token_id``).
    """

    train: Sequences
    held_out: Sequences
    vocab_size: int
    length: int
    unit: str
    description: dict[str, Any]
    special: dict[str, int] = field(default_factory=dict)


def make_task(data: str, *, length: int | None = None, seed: int = 0) -> Task:
    """The task that a name or a path stands for.

    Args:
        data: "digits", "copy", "mqar" (associative recall), "python" (the source of the running
            interpreter's standard library), or the path of a file or folder.
        length: longest sequence of the copying task (default 32 tokens) and of associative
            recall (default 16, 4 pairs), or bytes in a window of a text (default 256).
        seed: of everything that is drawn for training.

    Raises:
        ValueError: for data that is empty or too short, or a length that does not fit.
        OSError: for a path that does not exist or cannot be read.
    """
    if data == "digits":
        if length is not None:
            raise ValueError("digits are sequences of 64 pixels; leave the length out")
        return digits_task(seed)
    if data == "copy":
        return copy_task(32 if length is None else length, seed)
    if data == "mqar":
        return recall_task(16 if length is None else length, seed)
    return bytes_task(data, 256 if length is None else length, seed)


def load_digits() -> tuple[Tensor, Tensor, int]:
    """Images (1797, 64) with levels 0..16, their classes (1797,), and how many are for training.

    The first are for training, the last 360 are held out.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn; pip install fast-transformers[hf]"
        ) from error
    digits: Any = datasets.load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.data).round().long()[order]
    return images, torch.from_numpy(digits.target).long()[order], len(images) - HELD_OUT_DIGITS


def digits_task(seed: int = 0) -> Task:
    """Scanned digits, pixel by pixel after their class: [class, p0, ..., p63]."""
    images, classes, n = load_digits()
    held_out = digit_sequences(images[n:], classes[n:])

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        moved = shift_images(images[:n], SHIFTED_DIGITS, generator)
        return after_first(digit_sequences(moved, classes[:n]))

    return Task(
        train=Sequences(draw, seed),
        held_out=Sequences(lambda _: after_first(held_out)),
        vocab_size=LEVELS + CLASSES,
        length=1 + SIDE * SIDE,
        unit="pixel",
        description={"kind": "digits", "levels": LEVELS, "classes": CLASSES, "side": SIDE},
    )


def digit_sequences(images: Tensor, classes: Tensor) -> Tensor:
    """(n, 64) images and (n,) classes as tokens (n, 65)."""
    return torch.cat([classes[:, None] + LEVELS, images], 1)


def shift_images(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Move about ``share`` of the images (n, 64) by up to a pixel in both directions."""
    n = len(images)
    padded = torch.nn.functional.pad(images.view(n, SIDE, SIDE), (1, 1, 1, 1))
    moves = torch.randint(0, 3, (2, n), generator=generator)
    moves = torch.where(torch.rand(n, generator=generator) < share, moves, 1)
    rows, columns = moves[:, :, None] + torch.arange(SIDE)
    every = torch.arange(n)[:, None, None]
    return padded[every, rows[:, :, None], columns[:, None, :]].reshape(n, SIDE * SIDE)


def copy_task(length: int, seed: int = 0) -> Task:
    """Symbols, a separator, and the symbols again, of which only the copy counts.

    "Transformers are RNNs" (2020), section 4.1. Sequences have between 1 and
    ``(length - 1) // 2`` symbols out of 10, and are padded on the right.
    """
    most = (length - 1) // 2
    if most < 1 or length > 2**16:
        raise ValueError(f"the copying task needs a length from 3 to {2**16}, got {length}")
    fixed = torch.Generator().manual_seed(0)
    held_out = _draw_copies(256, most, fixed)
    return Task(
        train=Sequences(lambda generator: _draw_copies(3200, most, generator), seed + 1),
        held_out=Sequences(lambda _: held_out),
        vocab_size=SYMBOLS + 2,
        length=2 * most + 1,
        unit="symbol",
        description={"kind": "copy", "symbols": SYMBOLS, "most": most},
        special={"pad_token_id": PADDING},
    )


def _draw_copies(n: int, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    counts = torch.randint(1, most + 1, (n, 1), generator=generator)
    symbols = torch.randint(0, SYMBOLS, (n, most), generator=generator)
    place = torch.arange(2 * most + 1).expand(n, -1)
    source = torch.where(place > counts, place - counts - 1, place).clamp(max=most - 1)
    tokens = symbols.gather(1, source)
    tokens = tokens.masked_fill(place == counts, SEPARATOR)
    tokens = tokens.masked_fill(place > 2 * counts, PADDING)
    counted = (place > counts) & (place <= 2 * counts)
    return tokens, tokens.masked_fill(~counted, IGNORED)


def recall_task(length: int, seed: int = 0) -> Task:
    """Multi-query associative recall, see :mod:`.recall`; only the answers count."""
    pairs = most_pairs(length)

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens, asked = draw_recalls(n, pairs, generator)
        return tokens, tokens.masked_fill(~asked, IGNORED)

    held_out = draw(256, torch.Generator().manual_seed(0))
    return Task(
        train=Sequences(lambda generator: draw(3200, generator), seed + 1),
        held_out=Sequences(lambda _: held_out),
        vocab_size=KEYS + VALUES,
        length=4 * pairs,
        unit="value",
        description={"kind": "mqar", "keys": KEYS, "values": VALUES, "most": pairs},
    )


def bytes_task(data: str, length: int, seed: int = 0) -> Task:
    """Windows of files, byte by byte: [start, b1, ..., b_length].

    The last tenth of all bytes is held out. An epoch has as many windows as cover the rest once,
    at most 3200, at random places.
    """
    if not 1 <= length <= 2**16:
        raise ValueError(f"windows have from 1 to {2**16} bytes, got {length}")
    text = torch.frombuffer(bytearray(read_bytes(data)), dtype=torch.uint8)
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    if len(held_out) < length:
        raise ValueError(
            f"{data}: {len(text)} bytes are too few, a tenth of them must hold a window of "
            f"{length}; use more text, or a shorter length"
        )
    n = min(max(len(train) // length, 1), 3200)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(0, len(train) - length + 1, (n,), generator=generator)
        return after_first(_windows(train, starts, length))

    spread = torch.linspace(0, len(held_out) - length, min(len(held_out) // length, 320)).long()
    measured = after_first(_windows(held_out, spread, length))
    return Task(
        train=Sequences(draw, seed),
        held_out=Sequences(lambda _: measured),
        vocab_size=BYTES + 1,
        length=1 + length,
        unit="byte",
        description={"kind": "bytes"},
        special={"bos_token_id": START},
    )


def _windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    windows = text[starts[:, None] + torch.arange(length)].long()
    return torch.nn.functional.pad(windows, (1, 0), value=START)


def after_first(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``tokens`` with labels that count all of them but the first."""
    labels = tokens.clone()
    labels[:, 0] = IGNORED
    return tokens, labels


def check_description(task: Mapping[str, Any], vocab_size: int) -> str:
    """The kind of task that a model's configuration describes.

    Raises:
        ValueError: for a description that is none of this module's.
    """
    expected = {
        "digits": {"levels": LEVELS, "classes": CLASSES, "side": SIDE},
        "copy": {"symbols": SYMBOLS},
        "mqar": {"keys": KEYS, "values": VALUES},
        "bytes": {},
    }
    vocabularies = {
        "digits": LEVELS + CLASSES,
        "copy": SYMBOLS + 2,
        "mqar": KEYS + VALUES,
        "bytes": BYTES + 1,
    }
    kind = task.get("kind")
    if not isinstance(kind, str) or kind not in expected:
        raise ValueError(f"the model's task must be {', '.join(expected)}, got {kind!r}")
    fits = all(task.get(name) == value for name, value in expected[kind].items())
    most = task.get("most", 1)
    if not fits or vocabularies[kind] != vocab_size or not isinstance(most, int) or most < 1:
        raise ValueError(f"the model's task does not describe {kind!r} data: {dict(task)!r}")
    return kind
