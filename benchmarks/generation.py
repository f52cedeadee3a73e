"""Images drawn pixel by pixel, linear against softmax attention, beside the paper's figures."""

from __future__ import annotations

import argparse
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import machine
from .images import ATTENTIONS, SHAPES, Drawing, Shape, disagreement, make, timed
from .log import Log, select

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCHES = {  # that are tried on a GPU
    ("MNIST", "linear"): (2048, 4096, 8192, 16384),
    ("MNIST", "softmax"): (512, 2048),
    ("CIFAR", "linear"): (2048, 4096, 8192),
    ("CIFAR", "softmax"): (128, 512),
}
WARM = 8  # pixels that are drawn first, which compiles what there is to compile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks generation``."""
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE",
        help="of MNIST and CIFAR; both by default")  # fmt: skip
    add("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), metavar="KIND",
        help="of linear and softmax; both by default")  # fmt: skip
    add("--batches", nargs="+", type=int, metavar="N",
        help="images at once, the best of which counts; 1 by default on a CPU")  # fmt: skip
    add("--compile", action="store_true", help="steps compiled by torch.compile, too")
    add("--dtype", choices=DTYPES, help="bfloat16 by default on a GPU, float32 on a CPU")
    add("--seconds", type=float, default=60.0, help="for each number at most, about; default 60")
    add("--out", type=Path, metavar="FOLDER", help="where the log and the tables go; default no")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write.

    Returns:
        0, or 1 if an answer was wrong.
    """
    cuda = torch.cuda.is_available()
    about = machine.describe()
    if cuda:
        from .gpu_measure import describe

        about = describe()
    dtype = args.dtype or ("bfloat16" if cuda else "float32")
    name = f"{about['date'][:10]}-generation-{'gpu' if cuda else 'cpu'}.jsonl"
    log = Log(args.out and args.out / name)
    log.add("machine", **about, dtype=dtype, threads=torch.get_num_threads())
    for shape in args.shapes:
        for attention in args.attentions:
            _model(log, shape, attention, args, "cuda" if cuda else "cpu", dtype)
    publish(log)
    return 1 if any("wrong" in record for record in log.records) else 0


def _model(
    log: Log, name: str, attention: str, args: argparse.Namespace, device: str, dtype: str
) -> None:
    """Check the answers of a model, then measure images a second and the latency of one."""
    shape, form = SHAPES[name], "graph" if device == "cuda" else "plain"
    case: dict[str, Any] = {"shape": name, "attention": attention}
    wrong = disagreement(shape, attention, device, DTYPES[dtype], form)
    say(f"{name}, {attention}: {wrong or 'the answers are right'}")
    if wrong:
        log.add("images", **case, wrong=[f"{name}, {wrong}"])
        return
    _, model = make(shape, attention, device, DTYPES[dtype])
    several = args.batches or BATCHES[name, attention]
    batches = [1, *several] if device == "cuda" else args.batches or [1]
    ways = [(form, False)] + [("plain", False)] * (device == "cuda")
    ways += [(form, True)] * args.compile
    for n in batches:
        for how, compiled in ways:
            if how == "plain" and device == "cuda" and attention == "linear" and n > 1:
                continue  # never ahead of the graph
            found = {**case, "batch": n, "form": how, "compiled": compiled}
            try:
                found |= _measure(model, shape, n, how, compiled, args.seconds)
            except torch.OutOfMemoryError:
                found["skipped"] = "out of memory"
            except Exception as error:  # one way fails, others go on
                found["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0]
            log.add("images", **found)
            say(f"  {line(found)}")
            if device == "cuda":
                torch.cuda.empty_cache()


def _measure(
    model: Any, shape: Shape, n: int, form: str, compiled: bool, seconds: float
) -> dict[str, Any]:
    """Median seconds of complete batches."""
    drawing = Drawing(model, shape, n, form, compiled, fresh=n > 1)
    drawing(WARM)
    readings = [timed(drawing)]
    while len(readings) < 3 and sum(readings) + readings[0] < seconds:
        readings.append(timed(drawing))
    assert drawing.stepper is not None
    chosen = drawing.stepper.explain()
    if form == "graph" and chosen["graph"] != "chosen":
        return {"skipped": chosen["graph"]}
    median = statistics.median(readings)
    return {"seconds": median, "low": min(readings), "high": max(readings), "rate": n / median}


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def line(r: dict[str, Any]) -> str:
    """A result in a line."""
    way = f"batch {r['batch']:>6,}, {r['form']}{', compiled' * r['compiled']}"
    if "skipped" in r:
        return f"{way}: {r['skipped']}"
    return f"{way}: {r['rate']:,.2f} images/s, {r['seconds']:.3f} s"


def publish(log: Log) -> None:
    """Print the table; write it beside the log, if that is a file."""
    if find_spec("tabulate") is None:
        say("no table: pip install tabulate")
        return
    from .generation_report import report

    text = report(log.records)
    if log.path is not None:
        log.path.with_suffix(".md").write_text(text)
        print(f"wrote {log.path} and {log.path.with_suffix('.md').name}")
    print(text)


def best(records: list[dict[str, Any]], shape: str, attention: str, alone: bool) -> Any:
    """The fastest way to draw images, one alone or many at once; None if there is none."""
    found = [
        r
        for r in select(records, "images", shape=shape, attention=attention)
        if "rate" in r and (r["batch"] == 1 or not alone)
    ]
    return max(found, key=lambda r: r["rate"], default=None)
