"""The command line: ``fast-transformers train``, ``generate``, ``compare`` and ``info``.

A mistake of the user's is one line on stderr and exit status 2; Ctrl-C is 130.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__

PROGRAM = "fast-transformers"
USER_ERRORS = (ValueError, OSError, ImportError, MemoryError)


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        argv: the arguments, default those of the process.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: interrupted\n")
        return 130
    except USER_ERRORS as error:
        sys.stderr.write(one_line(str(error) or type(error).__name__))
        return 2
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        sys.stderr.write(one_line(f"not enough memory: {error}"))
        return 2


def one_line(message: str) -> str:
    """An error message as one printable line."""
    text = re.sub(r"\s+", " ", message).strip()
    return f"{PROGRAM}: error: {''.join(c if c.isprintable() else '?' for c in text)[:600]}\n"


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog=PROGRAM,
        description="Train transformers with linear attention, and generate with them.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a model"))
    _add_generate(commands.add_parser("generate", help="generate with a trained model"))
    _add_compare(commands.add_parser("compare", help="compare feature maps with softmax"))
    _add_info(commands.add_parser("info", help="versions, devices, and which code would run"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        help="digits (the default), copy, mqar (associative recall), python (its standard "
        "library), or a file or folder",
    )
    add("--out", type=Path, metavar="RUN", help="folder of the run, default runs/DATA")
    add("--attention", help="default causal-linear; full is the softmax attention")
    add(
        "--feature-map",
        metavar="SPEC",
        help="NAME[:key=value,...], default elu, dpfp:nu=2 for mqar",
    )
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--lr", type=float, help="highest learning rate")
    add("--layers", type=int)
    add("--heads", type=int)
    add("--dim", type=int, help="dimensions of a token")
    add("--feed-forward", type=int, help="dimensions inside the feed-forward network")
    add("--length", type=int, help="longest sequence of copy and mqar, or bytes in a window")
    add("--dropout", type=float)
    add("--weight-decay", type=float)
    add(
        "--rotary",
        action=argparse.BooleanOptionalAction,
        help="rotary positions; a model without them has no more positions than it trained on",
    )
    add(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        help="whether feature maps that have statistics (centered, derf, oprf, lln) take them "
        "from training sequences, anew for every epoch unless they are trained, too; the default",
    )
    add("--seed", type=int)
    add("--device", choices=("auto", "cpu", "cuda", "mps"))
    add("--precision", choices=("fp32", "bf16", "fp16"))
    add("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    add("--overwrite", action="store_true", help="remove an earlier run from RUN first")
    parser.set_defaults(run=train)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="RUN", help="folder of a run")
    add("--n", type=int, help="images, copies or values, default 10")
    add("--class", dest="digit", metavar="DIGIT", help="0 to 9, or all in turn (the default)")
    add("--complete", action="store_true", help="draw the lower half of held-out digits")
    add("--prompt", help="text to continue")
    add("--prompt-file", type=Path, help="file with the text to continue")
    add("--length", type=int, help="bytes to write, symbols to copy, or pairs to recall from")
    add(
        "--temperature",
        type=float,
        help="0 takes the likeliest; default 1, for copies and values 0",
    )
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--out", type=Path, metavar="FILE", help="a PNG for digits, else text")
    add("--no-cache", action="store_true", help="recompute the sequence for every token")
    add("--compile", action="store_true", help="have torch.compile make the steps; takes a while")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.set_defaults(run=generate)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        default="synthetic",
        metavar="SOURCE",
        help="synthetic (the default), the folder of a run, a safetensors file with q and k "
        "(N, L, H, E), minilm, a pretrained encoder, or mqar, models trained to recall",
    )
    add(
        "--feature-map",
        metavar="SPEC",
        action="append",
        help="NAME[:key=value,...], as often as you like; default is a selection",
    )
    add(
        "--out", type=Path, metavar="FOLDER", help="for the pictures and the page, default compare"
    )
    add("--draws", type=_positive, help="of each random map, default 3")
    add("--error", type=float, default=0.3, help="relative error that is good enough, default 0.3")
    add(
        "--fit",
        type=_positive,
        default=0,
        metavar="STEPS",
        help="measure maps also after so many steps of gradient descent on what they are "
        "calibrated on: means, alignments, trained weights",
    )
    add(
        "--calibrate-on",
        metavar="DATA",
        help="for a file of q and k: another such file, so that the first is measured whole; for "
        "a run: data as train takes it, default other sequences of its own",
    )
    add("--dims", type=_positive, help="dimensions of synthetic inputs, default 64")
    add("--length", type=_positive, help="tokens, of synthetic inputs and of texts; default 256")
    add("--heads", type=_positive, help="heads of synthetic inputs, default 2")
    add("--logit-std", type=float, help="spread of synthetic logits, default 1")
    add("--seed", type=int, help="of synthetic inputs, default 0")
    parser.set_defaults(run=compare)


def _add_info(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", type=_shape, metavar="N,L,S,H,E,M", help="explain a call with these shapes")
    add("--causal", action="store_true")
    add("--attention", help="say whether this attention is available")
    add("--feature-map", metavar="SPEC", help="say what comes out of this feature map")
    parser.set_defaults(run=info)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:10]) < 10**6:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 999999, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 6 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected six numbers N,L,S,H,E,M, got {text!r}")
    return sizes


def train(args: argparse.Namespace) -> int:
    """The command ``train``."""
    from .hf.recipe import OPTIONS, Recipe, make_recipe
    from .hf.training import Interrupted
    from .hf.training import train as train_model

    data = args.data or "digits"
    run = args.out or Path("runs", Path(data).stem or "data")
    given = {n: v for n, v in vars(args).items() if n in OPTIONS and v is not None}
    if args.resume:
        if args.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        recipe = Recipe.load(run)
        changed = [n for n, v in given.items() if v != getattr(recipe, n)]
        if changed:
            raise ValueError(
                f"--{changed[0].replace('_', '-')} differs from that of the run in {run}; "
                "leave it out to resume"
            )
    else:
        recipe = make_recipe(**{"data": data, **given})
    try:
        train_model(recipe, run, resume=args.resume, overwrite=args.overwrite)
    except Interrupted as stop:
        sys.stderr.write(f"{PROGRAM}: {stop}; go on with: {PROGRAM} train --resume --out {run}\n")
        return 130
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(f"saved {run}; now: {PROGRAM} generate {run}")
    return 0


def generate(args: argparse.Namespace) -> int:
    """The command ``generate``."""
    from .hf.commands import generate_from

    return generate_from(args)


def compare(args: argparse.Namespace) -> int:
    """The command ``compare``."""
    from .compare import compare as compare_maps

    return compare_maps(args)


def info(args: argparse.Namespace) -> int:
    """The command ``info``."""
    from .info import report

    for line in report(args.shape, args.causal, args.attention, args.feature_map):
        print(line)
    return 0
