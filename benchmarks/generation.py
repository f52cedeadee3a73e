"""Images drawn pixel by pixel, linear against softmax attention, beside the paper's figures."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import machine
from .images import ATTENTIONS, SHAPES, Drawing, disagreement, make, timed
from .log import Log, first_line, select, unused

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parent.parent / "docs" / "generation.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCHES = {  # beside single images, on a GPU
    ("MNIST", "linear"): [16384],
    ("MNIST", "softmax"): [2048],
    ("CIFAR", "linear"): [8192],
    ("CIFAR", "softmax"): [512],
}
FORMS = ("graph", "plain", "compiled")  # of a step, in the order of the measurements
WARM = 8  # pixels that are drawn first, which compiles what there is to compile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks generation``."""
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE",
        help="of MNIST and CIFAR; both by default")  # fmt: skip
    add("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), metavar="KIND",
        help="of linear and softmax; both by default")  # fmt: skip
    add("--batches", nargs="+", type=int, metavar="N",
        help="images at once, the best of which counts; by default those that were best on an "
        "H200, none on a CPU; an image alone is always drawn")  # fmt: skip
    add("--forms", nargs="+", choices=FORMS, metavar="FORM",
        help="of a step: graph, plain, and compiled (a graph of compiled kernels on a GPU); "
        "by default graph and compiled on a GPU, plain and compiled on a CPU")  # fmt: skip
    add("--dtype", choices=DTYPES, help="bfloat16 by default on a GPU, float32 on a CPU")
    add("--seconds", type=float, default=60.0, help="for each number at most, about; default 60")
    add("--minutes", type=float, default=60.0,
        help="begin no measurement after so many; graphs come first; default 60")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="where the log and the tables go; default no")
    add("--docs", action="store_true", help="put the tables into docs/generation.md")


@dataclass(frozen=True)
class Case:
    """A model, how many images it draws at once, and the form of its steps."""

    shape: str
    attention: str
    batch: int
    form: str


def run(args: argparse.Namespace) -> int:
    """Measure, print and write.

    Returns:
        0, or 1 if an answer was wrong.
    """
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine.describe()
    if device == "cuda":
        from .gpu_measure import describe

        about = describe()
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    name = f"{about['date'][:10]}-generation-{'gpu' if device == 'cuda' else 'cpu'}.jsonl"
    log = Log(args.out and unused(args.out / name))
    log.add("machine", **about, dtype=dtype, threads=torch.get_num_threads())
    wrong = set()
    for case in cases(args, device):
        found: dict[str, Any] = asdict(case)
        kind = (case.shape, case.attention, case.form)
        if time.monotonic() - began > 60 * args.minutes:
            found["skipped"] = f"not begun within {args.minutes:g} minutes"
        elif kind in wrong:
            continue
        elif error := _disagreement(log, kind, device, DTYPES[dtype]):
            found["wrong"] = [f"{case.shape}, {error}"]
            wrong.add(kind)
        else:
            found |= _measure(case, device, DTYPES[dtype], args.seconds)
        log.add("images", **found)
        say(line(found))
    publish(log, args.docs)
    return 1 if wrong else 0


def cases(args: argparse.Namespace, device: str) -> list[Case]:
    """What is measured, the most important first."""
    usual = FORMS if args.forms else ("graph", "compiled") if device == "cuda" else FORMS[1:]
    found = []
    for form in (form for form in FORMS if form in (args.forms or usual)):
        for attention in args.attentions:
            for shape in args.shapes:
                some = BATCHES[shape, attention] if device == "cuda" else []
                for n in dict.fromkeys([1, *(args.batches or some)]):
                    found.append(Case(shape, attention, n, form))
    return found


def _disagreement(log: Log, kind: tuple[str, str, str], device: str, dtype: torch.dtype) -> str:
    """What is wrong with the answers of a model in a form; looked at once."""
    shape, attention, form = kind
    case = {"shape": shape, "attention": attention, "form": form}
    if select(log.records, "answers", **case):
        return ""
    reset()
    try:
        found = disagreement(SHAPES[shape], attention, device, dtype, form)
    except RuntimeError as error:  # of a form that there is not: the measurement says so
        found, case["cannot"] = "", first_line(error)
    log.add("answers", **case, disagreement=found)
    say(f"{shape}, {attention}, {form}: {found or case.get('cannot', 'the answers are right')}")
    return found


def _measure(case: Case, device: str, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Median seconds of complete batches, or why there are none."""
    shape = SHAPES[case.shape]
    reset()
    try:
        _, model = make(shape, case.attention, device, dtype)
        drawing = Drawing(model, shape, case.batch, case.form, fresh=case.batch > 1)
        start = time.perf_counter()
        grows = case.form == "compiled" and case.attention == "softmax"  # is compiled twice
        drawing(None if grows else WARM)
        first = time.perf_counter() - start
        readings = [timed(drawing)]
        while len(readings) < 3 and sum(readings) + readings[0] < seconds:
            readings.append(timed(drawing))
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except Exception as error:  # one way fails, others go on
        return {"skipped": first_line(error)}
    assert drawing.stepper is not None
    median = statistics.median(readings)
    found = {"seconds": median, "low": min(readings), "high": max(readings)}
    return {**found, "rate": case.batch / median, "ran": drawing.stepper.form, "first": first}


def reset() -> None:
    """Let go of what was compiled and allocated for another case."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def line(r: dict[str, Any]) -> str:
    """A result in a line."""
    way = f"{r['shape']}, {r['attention']}, batch {r['batch']:,}, {r['form']}"
    if "rate" not in r:
        return f"{way}: {r.get('skipped') or r['wrong'][0]}"
    return f"{way}: {r['rate']:,.2f} images/s, {r['seconds']:.3f} s, first {r['first']:.1f} s"


def publish(log: Log, docs: bool = False) -> None:
    """Print the tables; write them beside the log, if that is a file, and into the page.

    Raises:
        ValueError: for a log that the page cannot show.
    """
    if find_spec("tabulate") is None:
        say("no table: pip install tabulate")
        return
    from .generation_report import report
    from .tables import replace_block

    text = report(log.records)
    print(text)
    if log.path is not None:
        log.path.with_suffix(".md").write_text(text)
        print(f"wrote {log.path} and {log.path.with_suffix('.md').name}")
    if docs:
        if log.path is None or not log.path.resolve().is_relative_to(RESULTS):
            raise ValueError(f"docs/generation.md shows logs in {RESULTS}, got {log.path}")
        link = f"[{log.path.name}](../benchmarks/results/{log.path.name})"
        name = "images on a GPU" if "card" in log.records[0] else "images on a CPU"
        replace_block(PAGE, name, f"{text.strip()}\n\nAll readings: {link}.")


def best(records: list[dict[str, Any]], shape: str, attention: str, alone: bool) -> Any:
    """The fastest way to draw images, one alone or many at once; None if there is none."""
    found = [
        r
        for r in select(records, "images", shape=shape, attention=attention)
        if "rate" in r and (r["batch"] == 1 or not alone)
    ]
    return max(found, key=lambda r: r["rate"], default=None)
