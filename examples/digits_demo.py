"""Linear against softmax attention on scanned digits: train both, draw, complete, compare.

    python examples/digits_demo.py --out demo

writes ``digits.png``, a figure, and ``table.md``, and keeps both models in the folder. Takes a few
minutes on two CPU cores. Needs ``pip install fast-transformers[hf]``.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate
from torch import Tensor

from fast_transformers.hf.generation import PIXELS, Sampling, complete_digits, draw_digits
from fast_transformers.hf.images import paint
from fast_transformers.hf.modeling import FastTransformerForCausalLM
from fast_transformers.hf.recipe import make_recipe
from fast_transformers.hf.runs import METRICS_FILE
from fast_transformers.hf.training import train

COLOURS = {"linear": "#2563a8", "softmax": "#d2691e"}
GREY = "#6b6b6b"
DRAWN_EACH = 5  # images of each class in the figure
TIMED = 200  # images that a speed is measured with


@dataclass
class Result:
    """A trained model and what is known of it."""

    model: FastTransformerForCausalLM
    bits: list[float]  # held-out bits per pixel after each epoch
    seconds: float


def train_model(attention: str, run: Path, epochs: int | None) -> Result:
    """Train with the package's recipe for digits."""
    recipe = make_recipe("digits", attention=attention, epochs=epochs)
    model = train(recipe, run, overwrite=True)
    with (run / METRICS_FILE).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    bits = [float(row["held_out_bits_per_dim"]) for row in rows]
    return Result(model, bits, float(rows[-1]["seconds"]))


def images_per_second(model: FastTransformerForCausalLM, use_cache: bool) -> float:
    """Speed of drawing a batch of images, the best of a few times."""
    classes, sampling = torch.arange(TIMED) % 10, Sampling(use_cache=use_cache)
    times = [draw_digits(model, classes, sampling).seconds for _ in range(5 if use_cache else 2)]
    return TIMED / min(times)


def table(results: dict[str, Result], speeds: dict[tuple[str, bool], float]) -> str:
    """Both models side by side, in Markdown."""
    rows = [
        ["held-out bits/pixel", *(f"{r.bits[-1]:.3f}" for r in results.values())],
        ["parameters", *(f"{r.model.num_parameters():,}" for r in results.values())],
        ["training, s", *(f"{r.seconds:.0f}" for r in results.values())],
        ["images/s, as RNN or with cache", *(f"{speeds[name, True]:.0f}" for name in results)],
        ["images/s, recomputed", *(f"{speeds[name, False]:.0f}" for name in results)],
    ]
    return tabulate(rows, headers=["", *results], tablefmt="pipe", disable_numparse=True)


def mosaic(rows: list[Tensor]) -> Any:
    """Rows of tiles (n, 8, 8, 3) as one white-gapped picture of numbers from 0 to 1."""
    padded = [torch.nn.functional.pad(row, (0, 0, 0, 1, 0, 1), value=255) for row in rows]
    return torch.cat([row.transpose(0, 1).flatten(1, 2) for row in padded]).numpy()[:-1, :-1] / 255


def figure(results: dict[str, Result], speeds: dict[tuple[str, bool], float], path: Path) -> None:
    """Drawn digits, completed digits, learning curves and speeds."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    width, height = 13.6, 7.6
    fig = plt.figure(figsize=(width, height))

    def place(left: float, bottom: float, wide: float, high: float) -> Any:  # in inches
        return fig.add_axes((left / width, bottom / height, wide / width, high / height))

    _draw_digits(place(1.1, 2.9, 7.6, 3.76), results["linear"].model)
    _draw_completed(place(1.1, 0.35, 7.6, 1.45), results["linear"].model)
    _draw_curves(place(9.6, 3.3, 3.7, 3.36), results)
    _draw_bars(place(9.6, 0.35, 3.7, 1.45), speeds)
    fig.savefig(path, dpi=150, facecolor="white")
    plt.close(fig)


def _title(axes: Any, text: str, subtitle: str) -> None:
    axes.annotate(
        text, (0, 1), (0, 40), "axes fraction", "offset points", weight="bold", size=13, va="top"
    )
    axes.annotate(
        subtitle, (0, 1), (0, 22), "axes fraction", "offset points", color=GREY, size=10, va="top"
    )


def _draw_digits(axes: Any, model: FastTransformerForCausalLM) -> None:
    classes = torch.arange(10).repeat_interleave(DRAWN_EACH)
    drawn = draw_digits(model, classes, Sampling(temperature=0.8, seed=2)).tokens
    tiles = paint(drawn).unflatten(0, (10, DRAWN_EACH)).transpose(0, 1)
    axes.imshow(mosaic(list(tiles)))
    axes.set_yticks([])
    axes.set_xticks([9 * i + 3.5 for i in range(10)], [str(i) for i in range(10)])
    axes.tick_params(length=0, labelcolor=GREY)
    axes.spines[:].set_visible(False)
    _title(axes, "Drawn pixel by pixel", "by the linear model, given the class below each column")


def _draw_completed(axes: Any, model: FastTransformerForCausalLM) -> None:
    completed, originals, _ = complete_digits(model, 10, Sampling(temperature=0.7))
    axes.imshow(mosaic([paint(completed, PIXELS // 2), paint(originals)]))
    axes.set_xticks([])
    axes.set_yticks([3.5, 12.5], ["completed", "original"])
    axes.tick_params(length=0, labelcolor=GREY)
    axes.spines[:].set_visible(False)
    _title(
        axes, "Held-out digits, completed", "the linear model saw the blue half and drew the rest"
    )


def _draw_curves(axes: Any, results: dict[str, Result]) -> None:
    best = min(results, key=lambda name: results[name].bits[-1])
    for name, result in results.items():
        last = len(result.bits)
        axes.plot(range(1, last + 1), result.bits, "o-", color=COLOURS[name], ms=4, lw=2)
        axes.annotate(
            f"{name} {result.bits[-1]:.3f}",
            (last, result.bits[-1]),
            (0, -16 if name == best else 16),
            textcoords="offset points",
            color=COLOURS[name],
            ha="right",
            va="center",
            weight="bold",
        )
    low = min(min(result.bits) for result in results.values())
    high = max(max(result.bits) for result in results.values())
    axes.set_ylim(low - 0.13 * (high - low), high + 0.05 * (high - low))
    axes.set_xlabel("epoch", color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY)
    axes.spines[:].set_color("#bdbdbd")
    _title(axes, "Learning", "bits per pixel of held-out digits, lower is better")


def _draw_bars(axes: Any, speeds: dict[tuple[str, bool], float]) -> None:
    rows = [
        ("linear, as a recurrent network", "linear", True),
        ("softmax, with a cache of keys and values", "softmax", True),
        ("softmax, recomputed for every pixel", "softmax", False),
    ]
    values = [speeds[name, use_cache] for _, name, use_cache in rows]
    colours = [COLOURS[name] for _, name, _ in rows]
    bars = axes.barh(range(len(rows)), values, color=colours, height=0.42)
    axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=5, weight="bold")
    for place, (label, _, _) in enumerate(rows):
        axes.annotate(label, (0, place), (0, 12), textcoords="offset points", color=GREY, size=9.5)
    axes.set_ylim(len(rows) - 0.6, -0.75)
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_axis_off()
    _title(axes, "Images a second", f"in one batch of {TIMED}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    args = parser.parse_args()
    start = time.monotonic()
    results = {}
    for name, attention in (("linear", "causal-linear"), ("softmax", "full")):
        print(f"training with {name} attention", flush=True)
        results[name] = train_model(attention, args.out / name, args.epochs)
    speeds = {}
    for name, result in results.items():
        for use_cache in (True, False):
            how = "token by token" if use_cache else "recomputing"
            print(f"drawing {TIMED} images with {name} attention, {how}", flush=True)
            speeds[name, use_cache] = images_per_second(result.model, use_cache)
    figure(results, speeds, args.out / "digits.png")
    text = table(results, speeds)
    (args.out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\nwrote {args.out / 'digits.png'} and table.md", end=" ")
    print(f"after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
