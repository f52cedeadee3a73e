"""The command ``compare``: a report on feature maps, as pictures and one HTML page."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .diagnostics.comparison import DEFAULT, Comparison
from .diagnostics.page import Section, page, png
from .diagnostics.sources import Source, from_file, synthetic
from .specs import parse_feature_map

SYNTHETIC, MINILM, MQAR = "synthetic", "minilm", "mqar"
DRAWN = ("dims", "length", "heads", "logit_std", "seed")
EXTRA = "pip install fast-transformers[compare]"


def compare(args: argparse.Namespace) -> int:
    """Run the command; ``args`` as :func:`fast_transformers.cli.make_parser` parses them.

    Raises:
        ValueError: for flags that do not fit each other, or inputs that cannot be compared.
        OSError: for a file that cannot be read or written.
        ImportError: if an extra is missing, with the command that installs it.
    """
    specs = check_specs(args.feature_map)
    if args.source == MINILM:
        from .diagnostics.catalogue import TOKENS, minilm_page

        _only(args, ("length",))
        _calibrates_itself(args)
        title, sections = minilm_page(
            specs, draws=args.draws or 3, tokens=args.length or TOKENS, steps=args.fit,
            progress=progress,
        )  # fmt: skip
    elif args.source == MQAR:
        from .recall import mqar_page

        _only(args, ("length",))
        _calibrates_itself(args)
        if args.fit or args.draws:
            raise ValueError("--fit and --draws have no meaning for mqar, which trains the models")
        title, sections = mqar_page(specs, length=args.length, progress=progress)
    else:
        for name in ("matplotlib", "tqdm"):
            _needs(name)
        comparison = Comparison(
            _source(args), specs or DEFAULT, args.draws or 3, args.error, args.fit
        )
        title = comparison.source.title
        with progress(comparison.steps) as tick:
            sections = comparison.sections(tick)
    written = write(args.out or Path("compare"), title, sections)
    for section in sections:
        for report in section.reports:
            print(f"{section.title}\n{report}\n")
    for path in written:
        print(f"wrote {path}")
    return 0


def check_specs(texts: Sequence[str] | None) -> tuple[str, ...]:
    """The specs, each of which has been read; ValueError for one that cannot be."""
    for text in texts or ():
        parse_feature_map(text)
    return tuple(dict.fromkeys(texts or ()))


def write(folder: Path, title: str, sections: Sequence[Section]) -> list[Path]:
    """Write the pictures and the page into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for section in sections:
        for name, figure in section.figures:
            path = folder / f"{name}.png"
            path.write_bytes(png(figure))
            written.append(path)
    path = folder / "index.html"
    path.write_text(page("Feature maps compared", f"On {title}.", sections), encoding="utf-8")
    return [*written, path]


@contextmanager
def progress(steps: int) -> Iterator[Callable[[str], object]]:
    """A progress bar on a terminal's stderr; nothing elsewhere. Its function takes one step."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    form = "{percentage:3.0f}% |{bar}| {elapsed} (about {remaining} left) {desc}"
    with tqdm(total=steps, disable=hidden, bar_format=form, file=sys.stderr) as bar:

        def tick(what: str) -> None:
            bar.set_description_str(what, refresh=False)
            bar.update()

        yield tick


def _source(args: argparse.Namespace) -> Source:
    """What the argument SOURCE names, with what maps are calibrated on."""
    if args.source == SYNTHETIC:
        _calibrates_itself(args)
        given = {name: getattr(args, name) for name in DRAWN}
        return synthetic(**{name: value for name, value in given.items() if value is not None})
    _only(args, ())
    path = Path(os.fspath(args.source))
    if path.is_dir():
        from .hf.inspection import from_run

        source = from_run(path)
        return source if args.calibrate_on is None else _on_data(source, path, args.calibrate_on)
    _needs("safetensors")
    return from_file(path, None if args.calibrate_on is None else Path(args.calibrate_on))


def _on_data(source: Source, run: Path, data: str) -> Source:
    """A run's queries and keys, with those of other data to calibrate on."""
    from .diagnostics.capture import capture
    from .diagnostics.sources import LONGEST, MOST_ROWS
    from .hf.data import make_task
    from .hf.recipe import Recipe
    from .hf.runs import load_model

    model, recipe = load_model(run), Recipe.load(run)
    task = make_task(data, length=recipe.length, seed=recipe.seed)
    if task.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"--calibrate-on {data} has {task.vocab_size} tokens, the model in {run} "
            f"{model.config.vocab_size}; take data of the kind that it was trained on"
        )
    found = capture(model, task.train.tokens[:MOST_ROWS, :LONGEST])
    return source.calibrated_on(Source(f"sequences of {data}", found.layers, found.layers))


def _calibrates_itself(args: argparse.Namespace) -> None:
    """ValueError for a flag that is for files and runs."""
    if args.calibrate_on is not None:
        raise ValueError(
            f"--calibrate-on is for files and runs; {args.source} has other inputs of its own to "
            "calibrate on"
        )


def _only(args: argparse.Namespace, allowed: tuple[str, ...]) -> None:
    """ValueError for a flag that is for synthetic inputs."""
    for name in DRAWN:
        if name not in allowed and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for synthetic inputs alone")


def _needs(name: str) -> None:
    """Say now, not after the work, that a package is missing."""
    try:
        __import__(name)
    except ImportError as error:
        raise ImportError(f"compare needs {name}; {EXTRA}") from error
