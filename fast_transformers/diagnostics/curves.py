"""Sweeps behind the plots: over the number of features, and over the angle of a pair."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_report import AttentionReport, report_of
from .kernel_report import estimate, kernel_report
from .sample import MapLike, MapsLike, Sample, instances, named

SIZE = re.compile(r"\bn_dims=\d+")


class VarianceCurve(NamedTuple):
    """Relative variance of a median pair by n_dims: over draws, and in closed form (or NaN)."""

    sizes: tuple[int, ...]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]


class KernelCurve(NamedTuple):
    """phi(x).phi(y) over z = x.y, times the factor that brings it closest to exp(z).

    (points,) each.

    Attributes:
        z: of the pairs. mean: over pairs and draws. low, high: the 10 % and 90 % quantiles.
    """

    z: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor


def has_size(spec: MapLike) -> bool:
    """Whether a map is a spec that says ``n_dims=``, and so can be had in other sizes."""
    return isinstance(spec, str) and SIZE.search(spec) is not None


def with_size(spec: str, n_dims: int) -> str:
    """The spec with another number of features.

    >>> with_size("centered:inner='favor:n_dims=64'", 128)
    "centered:inner='favor:n_dims=128'"
    """
    return SIZE.sub(f"n_dims={n_dims}", spec)


def without_size(spec: str) -> str:
    """The spec as the name of a map of any size.

    >>> without_size("favor:n_dims=64, projection=iid")
    'favor:projection=iid'
    """
    text = re.sub(r",?\s*\bn_dims=\d+", "", spec)
    return re.sub(r":,?\s*(?=$|')", "", re.sub(r":,\s*", ":", text))


def variance_curves(
    specs: Sequence[str], q: Tensor, k: Tensor, sizes: Sequence[int], *, draws: int = 200
) -> dict[str, VarianceCurve]:
    """The relative variance of random maps for pairs of q and k (N, L, H, E), by n_dims."""
    curves = {}
    for spec in specs:
        rows = [
            kernel_report(with_size(spec, n), q, k, pairs=60, draws=draws).rows[2] for n in sizes
        ]
        measured, predicted = (
            tuple(getattr(r, f) for r in rows) for f in ("variance", "predicted")
        )
        if all(value > 0 for value in measured):
            curves[without_size(spec)] = VarianceCurve(tuple(sizes), measured, predicted)
    return curves


def error_curves(
    specs: Sequence[str],
    sample: Sample,
    examples: Sample,
    sizes: Sequence[int],
    *,
    draws: int = 2,
    tick: Callable[[], object] = lambda: None,
) -> dict[int, AttentionReport]:
    """Reports on maps by n_dims; the names leave the size out."""
    return {
        n: report_of(
            {without_size(s): with_size(s, n) for s in specs}, sample, examples,
            draws=draws, tick=tick,
        )
        for n in sizes
    }  # fmt: skip


@torch.no_grad()
def kernel_curves(
    feature_maps: MapsLike,
    dims: int,
    *,
    norm: float = 1.5,
    points: int = 41,
    pairs: int = 16,
    draws: int = 8,
    seed: int = 0,
    softmax_temp: float | None = None,
) -> dict[str, KernelCurve]:
    """phi(x).phi(y) of pairs with |x| = |y| = ``norm`` and every angle, x.y = z from -norm^2 up.

    x = sqrt(softmax_temp) q. Pairs have random directions. Maps with statistics have them from
    isotropic queries and keys of that norm.
    """
    generator = torch.Generator().manual_seed(seed)
    temp = dims**-0.5 if softmax_temp is None else softmax_temp
    x, other = torch.randn(2, pairs, dims, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=-1, keepdim=True)
    other = other - (other * x).sum(-1, keepdim=True) * x
    other = other / other.norm(dim=-1, keepdim=True)
    angle = torch.linspace(math.pi, 0, points, dtype=torch.float64)
    y = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * other
    scale = norm / temp**0.5
    q, k = (scale * t.reshape(-1, dims) for t in (x.expand(points, -1, -1), y))
    examples = torch.randn(2, 1, 500, 1, dims, generator=generator)
    examples = scale * examples / examples.norm(dim=-1, keepdim=True)
    z = norm**2 * angle.cos()
    curves = {}
    for name, source in named(feature_maps).items():
        made = instances(source, dims, draws=draws, seed=seed, examples=Sample(*examples))
        found = torch.stack([estimate(m, q, k).view(points, pairs) for m in made])
        found = found.transpose(0, 1).flatten(1)  # (points, draws * pairs)
        mean = found.mean(1)
        found = found * ((mean * z.exp()).sum() / mean.square().sum().clamp(min=1e-300))
        low, high = found.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=1)
        curves[name] = KernelCurve(z, found.mean(1), low, high)
    return curves
