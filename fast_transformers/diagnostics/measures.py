"""Numbers that compare one matrix of weights with another, for every head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-12  # smallest weight in a KL divergence: without it one zero makes all infinite


class Measures(NamedTuple):
    """Of an attention beside the exact one. Each is (H,), a mean over sequences and queries.

    Attributes:
        kl: sum_j P_ij log(P_ij / W_ij) in nats, P the exact weights. Weights below 0 count as 0,
            rows are normalised, and nothing counts as less than 1e-12.
        frobenius: |W - P| / |P|, of the whole matrix.
        output_error: |Wv - Pv| / |Pv|, of all outputs; NaN without values.
        top1: share of queries whose largest weight is at the right key.
        denominator: smallest |sum_j W_ij| / max(sum_j |W_ij|, 1) of all rows: 1 for positive
            weights, near 0 if signs cancel or ``eps`` outweighs the sum.
        negative: share of weights below 0.
        entropy: -sum_j W_ij log W_ij in nats, of weights as for ``kl``.
        largest: largest weight of a row, of weights as for ``kl``.
        rank_correlation: Spearman's, of a row's weights and logits: 1 if the weights are a
            monotonic function of q.k; of the first sequence only.
        effective_rank: exp of the entropy of W's normalised singular values; of the first
            sequence only.
    """

    kl: Tensor
    frobenius: Tensor
    output_error: Tensor
    top1: Tensor
    denominator: Tensor
    negative: Tensor
    entropy: Tensor
    largest: Tensor
    rank_correlation: Tensor
    effective_rank: Tensor


class Exact(NamedTuple):
    """What weights are compared with, computed once: (N, H, L, S) each.

    Attributes:
        weights: of softmax attention. shown: where a query sees a key.
        ranks: of the logits of the first sequence in their rows, centred, of norm 1.
        values: (N, H, S, M), or None.
    """

    weights: Tensor
    shown: Tensor
    ranks: Tensor
    values: Tensor | None


def exact(weights: Tensor, logits: Tensor, shown: Tensor, values: Tensor | None) -> Exact:
    """Prepare a comparison; ``values`` are (N, S, H, M)."""
    shown = shown.expand(weights.shape)
    values = None if values is None else values.transpose(1, 2).double()
    return Exact(weights, shown, ranks_of(logits[:1], shown[:1]), values)


def measure(w: Tensor, of: Exact) -> Measures:
    """Compare weights (N, H, L, S) with the exact ones."""
    p, shown = of.weights, of.shown
    rows = shown.any(-1)  # a query that sees no key does not count
    ranked = shown[:1].sum(-1) > 1  # a single key has no rank
    clamped = w.clamp(min=0)
    clamped = clamped / clamped.sum(-1, keepdim=True).clamp(min=1e-300)
    total, size = w.sum(-1).abs(), w.abs().sum(-1)
    output_error = torch.full_like(p[0, :, 0, 0], torch.nan)
    if of.values is not None:
        out, expected = w @ of.values, p @ of.values
        output_error = _relative(out, expected)
    return Measures(
        kl=_mean((torch.xlogy(p, p) - p * clamped.clamp(min=FLOOR).log()).sum(-1), rows),
        frobenius=_relative(w, p),
        output_error=output_error,
        top1=_mean((w.argmax(-1) == p.argmax(-1)).double(), rows),
        denominator=(total / size.clamp(min=1)).masked_fill(~rows, 1).amin((0, 2)),
        negative=_mean((w < 0).double(), shown, (0, 2, 3)),
        entropy=_mean(-torch.xlogy(clamped, clamped).sum(-1), rows),
        largest=_mean(clamped.amax(-1), rows),
        rank_correlation=_mean((ranks_of(w[:1], shown[:1]) * of.ranks).sum(-1), ranked),
        effective_rank=effective_rank(w[0]),
    )


def ranks_of(x: Tensor, shown: Tensor) -> Tensor:
    """Ranks in the rows of (..., S), ties sharing one, less their mean, divided by their norm."""
    hidden = x.masked_fill(~shown, torch.inf)  # behind all that count
    order = hidden.sort(-1).values.contiguous()
    hidden = hidden.contiguous()
    first = torch.searchsorted(order, hidden)
    last = torch.searchsorted(order, hidden, right=True)
    ranks = (first + last).double() / 2
    ranks = ranks - (ranks * shown).sum(-1, keepdim=True) / shown.sum(-1, keepdim=True).clamp(1)
    ranks = ranks * shown
    return ranks / ranks.norm(dim=-1, keepdim=True).clamp(min=1e-300)


def effective_rank(matrices: Tensor) -> Tensor:
    """exp of the entropy of the singular values of (..., L, S), which are scaled to add up to 1.

    Roy and Vetterli 2007, "The effective rank", definition 1.
    """
    values = torch.linalg.svdvals(matrices)
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-300)
    return (-torch.xlogy(share, share).sum(-1)).exp()


def median(x: Tensor) -> float:
    """Over the heads; of an even number the mean of the two in the middle."""
    return float(x.double().quantile(0.5))


def mean_of(measures: list[Measures]) -> Measures:
    """The mean over draws; of the denominator the smallest."""
    stacked = [torch.stack(parts) for parts in zip(*measures, strict=True)]
    means = Measures(*(part.mean(0) for part in stacked))
    return means._replace(denominator=stacked[Measures._fields.index("denominator")].amin(0))


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    """|found - expected| / |expected| of (N, H, ...), the mean over N."""
    error = (found - expected).flatten(2).norm(dim=-1)
    return (error / expected.flatten(2).norm(dim=-1).clamp(min=1e-300)).mean(0)


def _mean(x: Tensor, counted: Tensor, dims: tuple[int, ...] = (0, 2)) -> Tensor:
    """The mean of what counts, over all dimensions but the heads'."""
    return (x * counted).sum(dims) / counted.sum(dims).clamp(min=1)
