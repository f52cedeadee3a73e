"""Whether the features of a map estimate the kernel that it claims, and how well."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..feature_maps import FeatureMap
from .attention_report import SOFTMAX, UNIFORM
from .sample import MapsLike, Sample, instances, is_random, make_sample, named
from .table import Cell, Report, row_named
from .weights import input_dtype

HEAD = (
    "feature map", "F", "bias", "std. errors", "rel. variance", "closed form", "ratio",
    "top tenth", "bottom tenth", "misfit",
)  # fmt: skip


class KernelRow(NamedTuple):
    """What is found of one map over many pairs of a query and a key.

    Attributes:
        name: of the map. features: F, or None.
        bias: mean of phi(q).phi(k) / kernel(q, k) - 1 over pairs and draws.
        standard_errors: root mean square over the pairs of the bias in units of its standard
            error over the draws: about 1 for an unbiased map; NaN without draws.
        variance: median over pairs of Var[phi(q).phi(k)] / kernel^2, over the draws.
        predicted: the same from ``relative_variance``, for independent directions; NaN if the
            map does not know it.
        ratio: median over pairs of the measured variance over the predicted one.
        top, bottom: root of the median relative variance of the tenth of pairs with the largest
            kernel, and with the smallest.
        misfit: sqrt(1 - cos^2) of one draw's phi(q).phi(k) and exp(softmax_temp q.k), as vectors
            over the pairs: the relative error after the best common factor.
    """

    name: str
    features: int | None
    bias: float
    standard_errors: float
    variance: float
    predicted: float
    ratio: float
    top: float
    bottom: float
    misfit: float


EMPTY = KernelRow(
    name="", features=None, bias=math.nan, standard_errors=math.nan, variance=math.nan,
    predicted=math.nan, ratio=math.nan, top=math.nan, bottom=math.nan, misfit=math.nan,
)  # fmt: skip


@dataclass(frozen=True)
class KernelReport(Report):
    """What :func:`kernel_report` returns; prints as a table."""

    rows: tuple[KernelRow, ...]
    pairs: int
    draws: int

    def __getitem__(self, name: str) -> KernelRow:
        """A row, by its name."""
        return row_named(self.rows, name)

    def cells(self) -> tuple[list[str], list[list[Cell]]]:
        """Head and rows of the table."""
        return list(HEAD), [list(row) for row in self.rows]


def kernel_report(
    feature_maps: MapsLike,
    q: Tensor,
    k: Tensor,
    *,
    softmax_temp: float | None = None,
    pairs: int = 100,
    draws: int = 400,
    seed: int = 0,
) -> KernelReport:
    """Compare phi(q).phi(k) with the kernel it is to estimate, over redraws of the map.

    Bias and variance refer to ``feature_map.kernel``, the misfit to exp(softmax_temp q.k). The
    variance of some maps has a tail so heavy that hundreds of draws do not show it: a ratio below
    1 beside a predicted variance far above 1 says that.

    Args:
        feature_maps: specs, factories, ready maps, one or several, or a dictionary from names.
        q: (N, L, H, E). k: (N, S, H, E). Pairs are taken at random within sequences and heads.
        softmax_temp: of the exponential, default 1/sqrt(E).
        pairs: how many pairs.
        draws: of each random map.
        seed: of pairs and draws.

    Raises:
        ValueError: for shapes that do not fit, or fewer than 10 pairs or 2 draws.
    """
    if pairs < 10 or draws < 2:
        raise ValueError(f"10 pairs and 2 draws are the least, got {pairs} and {draws}")
    sample = make_sample(q, k, softmax_temp=softmax_temp)
    x, y = some_pairs(sample, pairs, seed)
    target = (sample.temperature * (x * y).sum(-1)).exp()
    rows = [
        EMPTY._replace(
            name=SOFTMAX, bias=0.0, variance=0.0, predicted=0.0, top=0.0, bottom=0.0, misfit=0.0
        ),
        _row_of_uniform(target),
    ]
    for name, source in named(feature_maps).items():
        made, found = None, []
        for made in instances(source, x.shape[-1], draws=draws, seed=seed, examples=sample):
            found.append(estimate(made, x, y))
        rows.append(_row(name, made, torch.stack(found), x, y, target))
    return KernelReport(tuple(rows), pairs, draws)


def some_pairs(sample: Sample, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys (count, E) of the same sequence and head, in float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k = sample.q.transpose(1, 2).flatten(0, 1), sample.k.transpose(1, 2).flatten(0, 1)
    group, i, j = (
        torch.randint(size, (count,), generator=generator).to(q.device)
        for size in (q.shape[0], q.shape[1], k.shape[1])
    )
    return q[group, i].double(), k[group, j].double()


@torch.no_grad()
def estimate(feature_map: Any, x: Tensor, y: Tensor) -> Tensor:
    """phi(x).phi(y) of pairs (count, E), in float64, by logarithms if the map has them."""
    x, y = (t[None, :, None].to(input_dtype(feature_map)) for t in (x, y))
    if getattr(feature_map, "positional", False):
        x, y = feature_map.add_positions(x), feature_map.add_positions(y)
    if getattr(feature_map, "exponential", False):
        logs = feature_map.log_queries(x).double() + feature_map.log_keys(y).double()
        if isinstance(feature_map, FeatureMap):
            logs = logs + feature_map.query_offset(x)
        return logs.logsumexp(-1).exp()[0, :, 0]
    phi = feature_map.forward_queries(x).double() * feature_map.forward_keys(y).double()
    return phi.sum(-1)[0, :, 0]


def misfit(found: Tensor, target: Tensor) -> float:
    """sqrt(1 - cos^2) of two vectors."""
    cosine = torch.nn.functional.cosine_similarity(found, target, dim=0)
    return float((1 - cosine.square()).clamp(min=0).sqrt())


def _row(name: str, made: Any, found: Tensor, x: Tensor, y: Tensor, target: Tensor) -> KernelRow:
    kernel, predicted = claims(made, x, y)
    features = getattr(made, "feature_dims", None)
    relative = found / kernel
    bias = relative.mean(0) - 1
    row = EMPTY._replace(
        name=name, features=features, bias=float(bias.mean()), misfit=misfit(found[0], target)
    )
    if not is_random(made):
        return row._replace(variance=0.0, predicted=0.0, top=0.0, bottom=0.0)
    variance = relative.var(0)
    errors = bias / (variance / len(found)).sqrt().clamp(min=1e-12)
    order, tenth = kernel.argsort(), max(len(kernel) // 10, 1)
    return row._replace(
        standard_errors=float(errors.square().mean().sqrt()),
        variance=float(variance.median()),
        predicted=float(predicted.median()),
        ratio=float((variance / predicted).median()),
        top=float(variance[order[-tenth:]].median().sqrt()),
        bottom=float(variance[order[:tenth]].median().sqrt()),
    )


@torch.no_grad()
def claims(made: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel and the relative variance that a map says it has; NaN where it does not say."""
    unknown = torch.full(x.shape[:1], torch.nan, dtype=torch.float64, device=x.device)
    claims = []
    for method in ("kernel", "relative_variance"):
        try:
            dtype = input_dtype(made)
            claims.append(getattr(made, method)(x.to(dtype), y.to(dtype)).double())
        except (AttributeError, NotImplementedError):
            claims.append(unknown)
    return claims[0], claims[1]


def _row_of_uniform(target: Tensor) -> KernelRow:
    far = misfit(torch.ones_like(target), target)
    return EMPTY._replace(name=UNIFORM, misfit=far)
