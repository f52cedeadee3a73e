"""Compare this library with others; refuse the speed of whoever answers wrongly."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import cpu, environments, gpu
from .log import Log


def main() -> int:
    """Read the command line and run what it asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser

    here = add("cpu", help="measure", description=cpu.__doc__)
    cpu.add_arguments(here)
    here.set_defaults(run=cpu.run)

    here = add("gpu", help="measure on a CUDA device", description=gpu.__doc__)
    gpu.add_arguments(here)
    here.set_defaults(run=gpu.run)

    here = add("older-library", help="the environment of the libraries it is compared with")
    environments.add_arguments(here)
    here.set_defaults(run=environments.run)

    here = add("report", help="tables and figures of an earlier run")
    here.add_argument("log", type=Path, help="a .jsonl file that cpu or gpu wrote")
    here.add_argument("--readme", action="store_true", help="make it the README's latest (cpu)")
    here.set_defaults(run=report)

    args = parser.parse_args()
    return args.run(args)


def report(args: argparse.Namespace) -> int:
    """Write the tables and figures of a log again."""
    log = Log.open(args.log)
    if "card" in log.records[0]:
        gpu.publish(log)
    else:
        cpu.publish(log, args.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
