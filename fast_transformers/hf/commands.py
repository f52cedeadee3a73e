"""The command ``generate``: what each kind of model is asked for, and what it is shown as."""

from __future__ import annotations

import argparse
import io
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch

from .generation import (
    PIXELS,
    Generated,
    Sampling,
    complete_digits,
    continue_text,
    copy_symbols,
    draw_digits,
    recall_values,
)
from .images import draw_images
from .modeling import FastTransformerForCausalLM
from .recipe import find_device
from .runs import load_model

DEFAULT_BYTES = 256
FLAGS = {  # that only some kinds of models have a use for
    "digits": ("n", "digit", "complete"),
    "copy": ("n", "length"),
    "mqar": ("n", "length"),
    "bytes": ("prompt", "prompt_file", "length"),
}


def generate_from(args: argparse.Namespace) -> int:
    """Run the command; ``args`` as :func:`fast_transformers.cli.make_parser` parses them.

    Raises:
        ValueError: for flags that do not fit each other or the model.
        OSError: for a file that cannot be read or written.
    """
    device = find_device(args.device)
    model: Any = load_model(args.model)
    model.to(device)
    kind = model.config.task["kind"]
    for name in sorted({name for names in FLAGS.values() for name in names} - {*FLAGS[kind]}):
        if getattr(args, name) not in (None, False):
            flag = "class" if name == "digit" else name.replace("_", "-")
            raise ValueError(f"--{flag} has no meaning for a model of {kind}")
    if args.n is not None and not 1 <= args.n <= 10_000:
        raise ValueError(f"--n must be from 1 to 10000, got {args.n}")
    temperature = args.temperature
    if temperature is None:
        temperature = 0.0 if kind in ("copy", "mqar") else 1.0
    if args.compile and args.no_cache:
        raise ValueError("--compile and --no-cache exclude each other: the latter takes no steps")
    form = "compiled" if args.compile else "auto"
    sampling = Sampling(temperature, args.top_p, args.seed, not args.no_cache, form)
    run = {"digits": _digits, "copy": _copies, "mqar": _recalls, "bytes": _text}[kind]
    return run(args, model, sampling)


def _digits(
    args: argparse.Namespace, model: FastTransformerForCausalLM, sampling: Sampling
) -> int:
    path = args.out or Path("digits.png")
    _check_writable(path)
    n, digit = args.n or 10, args.digit or "all"
    if args.complete:
        if args.digit:
            raise ValueError("--class and --complete exclude each other")
        images, originals, generated = complete_digits(model, n, sampling)
        draw_images(images, path, given=PIXELS // 2, originals=originals)
    else:
        if digit != "all" and digit not in [str(i) for i in range(10)]:
            raise ValueError(f"--class must be 0 to 9 or all, got {digit!r}")
        classes = torch.arange(n) % 10 if digit == "all" else torch.full((n,), int(digit))
        generated = draw_digits(model, classes, sampling)
        draw_images(generated.tokens, path)
    print(f"saved {path}: {generated.speed.replace('sequences', 'images')}")
    return 0


def _copies(
    args: argparse.Namespace, model: FastTransformerForCausalLM, sampling: Sampling
) -> int:
    n = args.n or 10
    length = (model.config.task or {})["most"] if args.length is None else args.length
    symbols, generated = copy_symbols(model, n, length, sampling)
    right = symbols == generated.tokens
    with _output(args.out) as out:
        for prompt, answer in zip(symbols[:10].tolist(), generated.tokens.tolist(), strict=False):
            verdict = "right" if prompt == answer else "wrong"
            out.write(f"{_digits_of(prompt)} -> {_digits_of(answer)}  {verdict}\n")
    print(
        f"{right.float().mean():.1%} of symbols right, {int(right.all(1).sum())} of {n} "
        f"copies; {generated.speed}"
    )
    return 0


def _recalls(
    args: argparse.Namespace, model: FastTransformerForCausalLM, sampling: Sampling
) -> int:
    n = args.n or 10
    pairs = (model.config.task or {})["most"] if args.length is None else args.length
    tokens, generated = recall_values(model, n, pairs, sampling)
    right = tokens[:, -1] == generated.tokens[:, 0]
    with _output(args.out) as out:
        for row, answer in zip(
            tokens[:10].tolist(), generated.tokens[:10, 0].tolist(), strict=True
        ):
            *given, key, value = row
            stored = " ".join(f"{k}:{v}" for k, v in zip(given[::2], given[1::2], strict=True))
            verdict = "right" if value == answer else "wrong"
            out.write(f"{stored}  {key}? {answer}  {verdict}\n")
    print(f"{right.float().mean():.1%} of {n} values right; {generated.speed}")
    return 0


def _text(args: argparse.Namespace, model: FastTransformerForCausalLM, sampling: Sampling) -> int:
    if args.prompt is not None and args.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file exclude each other")
    prompt = os.fsencode(args.prompt or "")
    if args.prompt_file is not None:
        with args.prompt_file.open("rb") as stream:
            prompt = stream.read(2**20)
    count = args.length
    if count is None:
        room = model.config.n_positions - 1 - len(prompt)
        count = DEFAULT_BYTES if model.config.rotary else max(min(DEFAULT_BYTES, room), 1)
    if not 1 <= count <= 2**20:
        raise ValueError(f"--length must be from 1 to {2**20}, got {count}")
    with _output(args.out) as out:
        generated = _stream(model, prompt, count, sampling, out)
    rate = generated.tokens.numel() / generated.seconds
    sys.stderr.write(f"{rate:.0f} tokens/s ({generated.how}; a token is a byte)\n")
    return 0


def _stream(
    model: FastTransformerForCausalLM, prompt: bytes, count: int, sampling: Sampling, out: TextIO
) -> Generated:
    def write(text: str) -> None:
        out.write(text)
        out.flush()

    generated = continue_text(model, prompt, count, sampling, write)
    write("\n")
    return generated


def _output(path: Path | None) -> AbstractContextManager[TextIO]:
    """The file, or standard output, as a context that leaves the latter open."""
    if path is not None:
        return path.open("w", encoding="utf-8", newline="")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of a terminal that lacks a character
    return nullcontext(sys.stdout)


def _check_writable(path: Path) -> None:
    """Find out before the work, not after it, that a file cannot be written."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; --out names a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written")


def _digits_of(symbols: list[int]) -> str:
    return "".join(str(s) if 0 <= s < 10 else "?" for s in symbols)
