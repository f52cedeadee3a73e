"""A prompt read at once and continued, and what a token costs after up to a million others."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast_transformers.builders import RecurrentEncoderBuilder, TransformerEncoderBuilder
from fast_transformers.state import State
from fast_transformers.stepper import Stepper
from fast_transformers.utils import make_mirror

from . import machine
from .log import Log, select, unused

HEADS, DIM, SEED = 4, 32, 0
PROMPT, STEPS, LEAST = 16_384, 256, 10.0  # tokens, and how often as fast it has to be
LAST = 1_000_000
LONGEST_CACHE = 2**15  # tokens that softmax attention is followed up to
CHUNK, WINDOW = 4096, 33  # tokens read at once, steps that are measured at a position
ATTENTIONS = {"linear": "causal-linear", "softmax": "full"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks streaming``."""
    add = parser.add_argument
    add("--last", type=int, default=LAST, metavar="TOKENS", help="how far to go (%(default)s)")
    add("--layers", type=int, default=2, help="of the model, 4 heads x 32 (%(default)s)")
    add("--out", type=Path, metavar="FOLDER", help="where the log goes; default nowhere")
    add("--plot", type=Path, metavar="FILE", help="a PNG; default none")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write.

    Returns:
        0, or 1 if an answer was wrong or the prompt was read too slowly.
    """
    about = machine.describe()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = args.out and args.out / f"{about['date'][:10]}-streaming-{device}.jsonl"
    log = Log(path and unused(path))
    name = torch.cuda.get_device_name() if device == "cuda" else about["cpu"]
    log.add("machine", **about, device=name, layers=args.layers, threads=torch.get_num_threads())
    with torch.inference_mode():
        right = _prompt(log, args.layers, device)
        for attention in ATTENTIONS:
            last = args.last if attention == "linear" else min(args.last, LONGEST_CACHE)
            _follow(log, attention, args.layers, device, last)
    if args.plot is not None and find_spec("matplotlib") is not None:
        draw(log.records, args.plot)
        print(f"wrote {args.plot}")
    return 0 if right else 1


def make(attention: str, layers: int, device: str) -> tuple[Any, Any]:
    """A model with rotary positions, which never end, and its recurrent twin."""
    torch.manual_seed(SEED)
    options = {"attention_type": ATTENTIONS[attention], "n_layers": layers, "n_heads": HEADS}
    options |= {"query_dimensions": DIM, "value_dimensions": DIM, "rotary": True}
    options |= {"feed_forward_dimensions": 4 * HEADS * DIM}
    builders = (TransformerEncoderBuilder, RecurrentEncoderBuilder)
    batch, twin = (b.from_kwargs(**options).get().eval() for b in builders)
    make_mirror(batch, twin)
    return batch.to(device), twin.to(device)


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _prompt(log: Log, layers: int, device: str) -> bool:
    """Read a prompt at once and go on, and step through all of it: the same, how much faster?"""
    batch, twin = make("linear", layers, device)
    x = torch.randn(1, PROMPT + STEPS, HEADS * DIM, device=device)
    for first in (PROMPT, 1):  # kernels are compiled before it counts
        _read(batch, twin, x[:, : first + 3], first)
    start = now()
    fast = _read(batch, twin, x, PROMPT)
    middle = now()
    say(f"{PROMPT:,} tokens at once and {STEPS} steps: {middle - start:.2f} s; now in steps")
    slow = _read(batch, twin, x, 1)
    seconds = middle - start, now() - middle
    error = float((fast - slow).norm() / slow.norm())
    budget = 2 * relative_error(batch, x[:, :512])
    ratio = seconds[1] / seconds[0]
    log.add("prompt", seconds=seconds, ratio=ratio, error=error, budget=budget)
    verdict = "as fast as it has to be" if ratio >= LEAST else f"too slow, by {LEAST:g}x"
    say(f"the last {STEPS} outputs agree up to {error:.1e}, allowed {budget:.1e}")
    print(
        f"{PROMPT:,} tokens read at once and {STEPS} steps: {seconds[0]:.2f} s; all of them "
        f"step by step: {seconds[1]:.2f} s, {ratio:.1f}x: {verdict}",
        flush=True,
    )
    return error <= budget and ratio >= LEAST


def relative_error(batch: Any, x: Tensor) -> float:
    """What float32 loses over a short sequence, by float64; the most that we allow of that."""
    y, _ = batch(x, return_state=True)
    exact, _ = batch.double()(x.double(), return_state=True)
    batch.float()
    return float((y - exact).norm() / exact.norm()) + torch.finfo(torch.float32).eps


def _read(batch: Any, twin: Any, x: Tensor, first: int) -> Tensor:
    """The last STEPS outputs (at most), after the first tokens at once and the rest in steps."""
    _, state = batch(x[:, :first], return_state=True)
    stepper, outputs = Stepper(twin, state), []
    for i in range(first, x.shape[1]):
        outputs.append(stepper(x[:, i]))
    return torch.stack(outputs[-STEPS:], 1)


def _follow(log: Log, attention: str, layers: int, device: str, last: int) -> None:
    """Seconds of a token and bytes of the state at positions from 1 to ``last``."""
    batch, twin = make(attention, layers, device)
    state, at = State(), 0
    positions = [n for e in range(7) for n in (10**e, 3 * 10**e) if n <= last]
    for position in dict.fromkeys([*positions, last]):
        while at < position:
            size = min(CHUNK, position - at)
            x = torch.randn(1, size, HEADS * DIM, device=device)
            _, state = batch(x, state=state, return_state=True)
            at += size
        seconds = _steps(twin, state, device)
        log.add("token", attention=attention, length=position, seconds=seconds,
                bytes=state.nbytes)  # fmt: skip
        say(f"{attention}, token {position:>9,}: {1e6 * seconds:7.0f} us, {state.nbytes:,} bytes")


def _steps(twin: Any, state: State, device: str) -> float:
    """Median seconds of a step from a state, which stays as it is."""
    stepper, x = Stepper(twin, state), torch.randn(1, HEADS * DIM, device=device)
    times = []
    for _ in range(WINDOW):
        start = now()
        stepper(x)
        times.append(now() - start)
    return statistics.median(times[2:])  # of which the first make the graph


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def publish(log: Log) -> None:
    """Draw the plot of an earlier run."""
    assert log.path is not None
    draw(log.records, log.path.with_suffix(".png"))


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Time of a token and memory over the position, log-log, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    (it,) = select(records, "machine")
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4))
    labels = {"linear": ("linear (elu+1)", "C0", "o-"), "softmax": ("softmax", "black", "^:")}
    for axes, key, scale, label in (
        (panels[0], "seconds", 1e3, "ms a token"),
        (panels[1], "bytes", 2**-10, "KiB that are remembered"),
    ):
        for attention, (name, colour, style) in labels.items():
            here = select(records, "token", attention=attention)
            values = [scale * r[key] for r in here]
            axes.plot([r["length"] for r in here], values, style, color=colour, label=name, ms=4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("tokens before")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(min(low, high / 30), high)
    panels[0].legend(frameon=False)
    figure.suptitle(f"{it['layers']} layers of 4 heads x 32, one sequence, {it['device']}", size=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
