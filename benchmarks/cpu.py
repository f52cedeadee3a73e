"""Speed and memory on a CPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import figures, machine
from .contenders import CONTENDERS, Contender
from .environments import DEFAULT as PEERS
from .log import Log, unused
from .processes import WorkerError
from .report import report, write_readme
from .sections import attention, decode, host, memory, training
from .session import Session, Settings

SECTIONS: dict[str, Callable[[Session], None]] = {
    "causal": attention.causal,
    "full": attention.full,
    "memory": memory.memory,
    "decode": decode.decode,
    "products": host.products,
    "neighbour": host.neighbour,
    "redraw": training.redraw,
    "model": training.model,
    "idle-workers": host.idle_workers,
}


def _short(contender: Contender) -> str:
    return contender.name.split(",")[0].split()[0]


NAMES = list(dict.fromkeys(map(_short, CONTENDERS)))
PASSES = ["forward", "forward+backward"]
LENGTHS = [2**n for n in range(9, 17)]
QUICK_LENGTHS = [512, 4096]
LARGEST = 2**16  # tokens of a batch
RESULTS = Path(__file__).parent / "results"


def count(text: str) -> int:
    """A number for an option that counts."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks cpu``."""
    parser.add_argument("--quick", action="store_true", help="two lengths and few rounds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION",
                        help=f"what to measure; of {', '.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N",
                        help="length of the sequences; 512 to 65,536 by default")  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="1 and 4 by default")
    parser.add_argument("--threads", nargs="+", type=int, metavar="T", help="1 and 2 by default")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=NAMES,
                        help="who takes part in whole sequences; all by default")  # fmt: skip
    parser.add_argument("--limit", type=float, metavar="SECONDS",
                        help="skip longer calls; 4 by default, 1 if quick")  # fmt: skip
    parser.add_argument("--repeat", type=count, default=1, metavar="K",
                        help="K times as many measurements, for a machine whose speed changes "
                        "from one second to the next")  # fmt: skip
    parser.add_argument("--peers", type=Path, default=PEERS, metavar="ENVIRONMENT",
                        help="made by the command older-library (%(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="where the log, the tables and the figures go; a complete run "
                        f"writes to {RESULTS} by default, another one nowhere")  # fmt: skip
    parser.add_argument("--readme", action="store_true",
                        help="make this the latest measurement of the README")  # fmt: skip


def settings(args: argparse.Namespace) -> Settings:
    """What the options ask for."""
    quick = args.quick
    return Settings(
        lengths=sorted(args.lengths or (QUICK_LENGTHS if quick else LENGTHS)),
        batches=args.batch or ([1] if quick else [1, 4]),
        threads=args.threads or ([1] if quick else [1, 2]),
        passes=args.passes,
        limit=args.limit or (1.0 if quick else 4.0),
        minutes=(3.0 if quick else 25.0) * args.repeat,
        largest=LARGEST,
        quick=quick,
        repeat=args.repeat,
        peers=args.peers,
        contenders=[c for c in CONTENDERS if _short(c) in args.contenders],
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; what there is when it is interrupted, too.

    Returns:
        0, or 1 if an answer was wrong, or 130 if it was interrupted.
    """
    torch.set_num_threads(1)  # this process only checks answers
    about = machine.describe()
    folder = args.out
    if folder is None and complete(args):
        folder = RESULTS
    log = Log(folder and unused(folder / f"{machine.log_name(about)}.jsonl"))
    log.add("machine", **about)
    load = about["load average"][0]
    if load > 0.5:
        print(f"The load average is {load:.1f}: is something else running?", file=sys.stderr)
    interrupted = False
    with Session(settings(args), log) as session:
        try:
            for name in args.only or SECTIONS:
                try:
                    SECTIONS[name](session)
                except WorkerError as error:
                    session.fail(name, [f"{name} could not be finished: {error}"])
                    session.close_workers()
        except KeyboardInterrupt:
            interrupted = True
            log.add("interrupted")
    publish(log, args.readme)
    for line in session.failures:
        print(f"WRONG: {line}")
    return 130 if interrupted else 1 if session.failures else 0


def complete(args: argparse.Namespace) -> bool:
    """Whether nothing was left out."""
    fewer = (args.quick, args.only, args.lengths, args.batch, args.threads)
    return not any(fewer) and (args.passes, args.contenders) == (PASSES, NAMES)


def publish(log: Log, readme: bool) -> None:
    """Print the tables; write them, and the figures, beside the log if it is a file."""
    text = report(log.records)
    print(text)
    if log.path is None:
        return
    page = log.path.with_suffix(".md")
    page.write_text(text)
    pictures = figures.draw(log.records, log.path.with_suffix(""))
    for path in (log.path, page, *pictures):
        print(f"wrote {path}")
    if readme:
        write_readme(log.records, log.path, pictures)
