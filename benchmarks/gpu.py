"""Speed and memory on a CUDA device."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from fast_transformers import ops
from fast_transformers.feature_maps import features_of

from . import cpu, gpu_report
from .contenders import ELU, FAVOR
from .gpu_compile import first_calls
from .gpu_contenders import CONTENDERS, DIM, make_map
from .gpu_measure import ceilings, describe
from .gpu_sections import Session, attention, decode, model
from .log import Log, first_line, unused

SECTIONS: dict[str, Callable[[Session], None]] = {
    "attention": attention,
    "decode": decode,
    "model": model,
    "compile": first_calls,
}
SLOW = ("model", "compile")
LENGTHS = [2**10, 2**11, 2**12, 2**14, 2**16]
QUICK_LENGTHS = [2**10, 2**14]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks gpu``."""
    parser.add_argument(
        "--quick", action="store_true", help="two lengths, no whole model, no first calls"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION",
                        help=f"what to measure; of {', '.join(SECTIONS)}")  # fmt: skip
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"whose attention; of {', '.join(map(repr, names))}")  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N",
                        help="length of the sequences; 1,024 to 65,536 by default")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="where the log, the tables and the figures go; a complete run "
                        f"writes to {cpu.RESULTS} by default, another one nowhere")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure, print and write.

    Returns:
        0, or 1 if an answer was wrong, or 2 without a CUDA device.
    """
    if not torch.cuda.is_available():
        print("python -m benchmarks gpu: there is no CUDA device", file=sys.stderr)
        return 2
    about = describe()
    folder = args.out
    complete = len(args.contenders) == len(CONTENDERS)
    if folder is None and complete and not (args.quick or args.only or args.lengths):
        folder = cpu.RESULTS
    log = Log(folder and unused(folder / f"{log_name(about['date'], about['card'])}.jsonl"))
    log.add("machine", **about, forms=_forms())
    seconds = 0.1 if args.quick else 0.5
    found = ceilings(seconds)
    log.add("ceilings", **found)
    lengths = sorted(args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS))
    session = Session(log, lengths, seconds, found, args.contenders)
    sections = args.only or [name for name in SECTIONS if name not in SLOW or not args.quick]
    for name in sections:
        try:
            SECTIONS[name](session)
        except Exception as error:
            session.fail("failed", [f"{name} could not be finished: {first_line(error)}"])
    publish(log)
    return 1 if session.failures else 0


def _forms() -> dict[str, str]:
    """The form that serves our calls."""
    forms = {}
    for map in (ELU, FAVOR):
        for causal in (True, False):
            why = ops.explain(
                causal=causal,
                length=1024,
                keys=1024,
                device="cuda",
                dtype=torch.bfloat16,
                dims=(DIM, DIM),
                features=features_of(make_map(map)),
            )
            chosen = next(name for name, text in why.items() if text.startswith("chosen"))
            forms[f"{map}, {'causal' if causal else 'full'}"] = chosen
    return forms


def log_name(date: str, card: str) -> str:
    """``<date>-<card>``, fit for a file name."""
    return f"{date[:10]}-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}"


def publish(log: Log) -> None:
    """Write tables and figures beside the log, if it is a file, and print the tables last."""
    text = gpu_report.report(log.records)
    if log.path is not None:
        page = log.path.with_suffix(".md")
        page.write_text(text)
        pictures = []
        if find_spec("matplotlib") is not None:
            pictures = gpu_report.draw(log.records, log.path.with_suffix(""))
        for path in (log.path, page, *pictures):
            print(f"wrote {path}")
    print(text)
