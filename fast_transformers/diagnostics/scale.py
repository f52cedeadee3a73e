"""How large queries and keys are: what decides whether features can stand for softmax."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .measures import median
from .sample import Sample, make_sample
from .table import Cell, Report
from .weights import logits_of, softmax_weights

HEAD = (
    "head", "logit std", "logit max", "|x|^2", "|y|^2", "|x+y|^2", "centred", "|x-y|^2",
    "eff. rank", "z < -1", "entropy", "at most",
)  # fmt: skip


@dataclass(frozen=True)
class ScaleReport(Report):
    """Of every head, (H,) each, with x = sqrt(softmax_temp) q and y = sqrt(softmax_temp) k.

    Attributes:
        logit_std: standard deviation of z = x.y within a query's keys.
        logit_max: largest |z|.
        query_norm, key_norm: mean |x|^2 and |y|^2.
        sum_norm: mean |x + y|^2 over all pairs: the variance of positive features grows like its
            exponential.
        centred_sum_norm: the same after the means of queries and of keys are taken off, which
            changes no weight.
        difference_norm: mean |x - y|^2, on which the variance of Fourier features depends.
        effective_rank: participation ratio of the eigenvalues of M_x^(1/2) M_y M_x^(1/2), M the
            second moments: in how many dimensions the logits vary.
        below: share of z < -1, where the Taylor series 1 + z + z^2/2 is no longer monotonic.
        entropy: of the exact weights, in nats, and ``most``, its largest possible value.
    """

    logit_std: Tensor
    logit_max: Tensor
    query_norm: Tensor
    key_norm: Tensor
    sum_norm: Tensor
    centred_sum_norm: Tensor
    difference_norm: Tensor
    effective_rank: Tensor
    below: Tensor
    entropy: Tensor
    most: Tensor

    def cells(self) -> tuple[list[str], list[list[Cell]]]:
        """Head and rows of the table; the last row has the medians."""
        columns = [getattr(self, field.name) for field in fields(self)]
        rows: list[list[Cell]] = [
            [str(index), *(float(x) for x in values)]
            for index, values in enumerate(zip(*columns, strict=True))
        ]
        rows.append(["median", *(median(x) for x in columns)])
        return list(HEAD), rows


def scale_report(
    q: Tensor,
    k: Tensor,
    *,
    attn_mask: Any = None,
    key_lengths: Any = None,
    softmax_temp: float | None = None,
) -> ScaleReport:
    """Norms, spread and rank of queries and keys, head by head.

    Args: see :func:`~fast_transformers.diagnostics.attention_report`.

    Raises:
        ValueError: for shapes that do not fit each other, or inputs that are not finite.
    """
    return scale_of(
        make_sample(q, k, attn_mask=attn_mask, key_lengths=key_lengths, softmax_temp=softmax_temp)
    )


def scale_of(sample: Sample) -> ScaleReport:
    """:func:`scale_report` of a sample."""
    logits, weights = logits_of(sample), softmax_weights(sample)
    shown = sample.shown().expand(logits.shape)
    counts = shown.sum(-1, keepdim=True).clamp(min=1)
    spread = ((logits - (logits * shown).sum(-1, keepdim=True) / counts) * shown).square()
    total = shown.sum((0, 2, 3)).clamp(min=1)
    temp = sample.temperature**0.5
    x, y = (temp * t.double().transpose(1, 2) for t in (sample.q, sample.k))  # (N, H, L, E)
    seen = shown.any(2).double()[..., None]  # padded keys count nowhere
    seeing = shown.any(3).double()[..., None]
    number_x, number_y = seeing.sum((0, 2)), seen.sum((0, 2))  # (H, 1)
    mean_x, mean_y = (x * seeing).sum((0, 2)) / number_x, (y * seen).sum((0, 2)) / number_y
    norm_x = (x.square() * seeing).sum((0, 2, 3)) / number_x[:, 0]
    norm_y = (y.square() * seen).sum((0, 2, 3)) / number_y[:, 0]
    cross = 2 * (mean_x * mean_y).sum(-1)
    moment_x = torch.einsum("nhle,nhlf->hef", x * seeing, x) / number_x[..., None]
    moment_y = torch.einsum("nhle,nhlf->hef", y * seen, y) / number_y[..., None]
    eigenvalues = torch.linalg.eigvals(moment_x @ moment_y).real.clamp(min=0)
    return ScaleReport(
        logit_std=(spread.sum((0, 2, 3)) / total).sqrt(),
        logit_max=(logits.abs() * shown).amax((0, 2, 3)),
        query_norm=norm_x,
        key_norm=norm_y,
        sum_norm=norm_x + norm_y + cross,
        centred_sum_norm=norm_x + norm_y - (mean_x.square() + mean_y.square()).sum(-1),
        difference_norm=norm_x + norm_y - cross,
        effective_rank=eigenvalues.sum(-1).square() / eigenvalues.square().sum(-1).clamp(1e-300),
        below=((logits < -1) & shown).sum((0, 2, 3)) / total,
        entropy=_per_query(-torch.xlogy(weights, weights).sum(-1), shown),
        most=_per_query(counts[..., 0].double().log(), shown),
    )


def _per_query(x: Tensor, shown: Tensor) -> Tensor:
    rows = shown.any(-1)
    return (x * rows).sum((0, 2)) / rows.sum((0, 2)).clamp(min=1)
