"""Compare this library with others; refuse the speed of whoever answers wrongly."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from .log import Log

COMMANDS = {  # in modules of their own: each needs packages that others do not
    "cpu": ("cpu", "attention, one token, models"),
    "gpu": ("gpu", "the same on a CUDA device"),
    "generation": ("generation", "images pixel by pixel, beside the paper's figures"),
    "streaming": ("streaming", "a long prompt, and the millionth token"),
    "older-library": ("environments", "the environment of the libraries it is compared with"),
}


def main() -> int:
    """Read the command line and run what it asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser
    for name, (module, summary) in COMMANDS.items():
        if name not in sys.argv[1:2]:
            add(name, help=summary)
            continue
        found = import_module(f".{module}", __package__)
        here = add(name, help=summary, description=found.__doc__)
        found.add_arguments(here)
        here.set_defaults(run=found.run)

    here = add("report", help="tables and figures of an earlier run")
    here.add_argument("log", type=Path, help="a .jsonl file that one of these wrote")
    here.add_argument("--readme", action="store_true", help="make it the README's latest (cpu)")
    here.add_argument("--docs", action="store_true", help="show it in docs/ (generation)")
    here.set_defaults(run=report)

    args = parser.parse_args()
    return args.run(args)


def report(args: argparse.Namespace) -> int:
    """Write the tables and figures of a log again."""
    log = Log.open(args.log)
    about = log.records[0]
    kinds = (("layers", "streaming"), ("dtype", "generation"), ("card", "gpu"))
    name = next((name for field, name in kinds if field in about), "cpu")
    more: Any = {"cpu": (args.readme,), "generation": (args.docs,)}.get(name, ())
    import_module(f".{name}", __package__).publish(log, *more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
