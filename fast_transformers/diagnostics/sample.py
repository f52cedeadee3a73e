"""What is diagnosed: queries and keys with their mask, and the feature maps that are tried."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.base import key_mask
from ..attention.full_attention import kept
from ..feature_maps import FeatureMap, RandomFeatureMap, build_feature_map
from ..feature_maps.fitting import fit_weights, has_parts
from ..masking import as_mask
from ..specs import parse_feature_map


class Fitted(NamedTuple):
    """A map that is fitted to the examples after it was calibrated on them.

    Attributes:
        source: a spec or a factory.
        steps: of gradient descent, see :func:`~fast_transformers.diagnostics.fit`.
    """

    source: str | Callable[[int], Any]
    steps: int


MapLike = str | FeatureMap | Callable[[int], Any] | Fitted
MapsLike = MapLike | Sequence[MapLike] | Mapping[str, MapLike]


class Sample(NamedTuple):
    """The input of one attention.

    Attributes:
        q: (N, L, H, E).
        k: (N, S, H, E).
        v: (N, S, H, M), or None.
        keep: bool that broadcasts to (N, H, L, S), True where a query sees a key; None for all.
        softmax_temp: factor of the dot products; None is 1/sqrt(E).
    """

    q: Tensor
    k: Tensor
    v: Tensor | None = None
    keep: Tensor | None = None
    softmax_temp: float | None = None

    @property
    def temperature(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.softmax_temp is None else self.softmax_temp

    def head(self, index: int) -> Sample:
        """One head of it, as a sample of one head."""
        one = slice(index, index + 1)
        keep = self.keep
        if keep is not None and keep.ndim == 4 and keep.shape[1] > 1:
            keep = keep[:, one]
        v = None if self.v is None else self.v[:, :, one]
        return self._replace(q=self.q[:, :, one], k=self.k[:, :, one], v=v, keep=keep)

    def sequences(self, which: slice) -> Sample:
        """Some of the sequences."""
        keep = self.keep
        if keep is not None and keep.ndim == 4 and keep.shape[0] > 1:
            keep = keep[which]
        v = None if self.v is None else self.v[which]
        return self._replace(q=self.q[which], k=self.k[which], v=v, keep=keep)

    def shown(self) -> Tensor:
        """``keep`` as (N or 1, H or 1, L, S)."""
        if self.keep is None:
            size = (1, 1, self.q.shape[1], self.k.shape[1])
            return torch.ones(size, dtype=torch.bool, device=self.q.device)
        missing = 4 - self.keep.ndim
        return self.keep.reshape((1,) * missing + self.keep.shape).expand(
            -1, -1, self.q.shape[1], self.k.shape[1]
        )


def make_sample(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    attn_mask: Any = None,
    key_lengths: Any = None,
    softmax_temp: float | None = None,
) -> Sample:
    """Check the inputs of an attention and put them together.

    Args:
        q: (N, L, H, E). k: (N, S, H, E), or fewer heads that each serve several of the queries'.
        v: (N, S, H, M), or None.
        attn_mask: as :class:`~fast_transformers.attention.FullAttention` takes it, or None.
        key_lengths: which keys are real, or None for all.
        softmax_temp: factor of the dot products; None is 1/sqrt(E).

    Raises:
        ValueError: for shapes that do not fit each other, or values that are not finite.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and (x.ndim != 4 or not x.is_floating_point() or not x.numel()):
            raise ValueError(
                f"{name} must be a floating tensor (N, length, H, dim) with elements, got "
                f"{tuple(x.shape)} of {x.dtype}"
            )
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q (N, L, H, E) and k (N, S, H, E) must agree in N and E, and H of q be a multiple "
            f"of that of k, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must be (N, S, H, M) with the N, S and H of k, got {tuple(v.shape)} beside "
            f"{tuple(k.shape)}"
        )
    if not all(bool(x.isfinite().all()) for x in (q, k, v) if x is not None):
        raise ValueError("q, k and v must be finite; mask padding with key_lengths and zeros")
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k = k.repeat_interleave(groups, 2)
        v = None if v is None else v.repeat_interleave(groups, 2)
    mask = None if attn_mask is None else as_mask(attn_mask, "attn_mask")
    keep = kept(mask, key_mask(key_lengths, k), q.transpose(1, 2), k.transpose(1, 2))
    return Sample(q.detach(), k.detach(), None if v is None else v.detach(), keep, softmax_temp)


def merge_heads(heads: Sequence[Sample]) -> Sample:
    """Samples of one head each, of the same sequences, as one."""
    q, k = (torch.cat([getattr(head, name) for head in heads], 2) for name in "qk")
    values = [head.v for head in heads if head.v is not None]
    keep = None if heads[0].keep is None else torch.cat([head.shown() for head in heads], 1)
    return Sample(q, k, torch.cat(values, 2) if values else None, keep, heads[0].softmax_temp)


def halves(sample: Sample) -> tuple[Sample, Sample]:
    """The first half of the sequences, to measure, and the second, to calibrate on.

    A single sequence is both.
    """
    count = sample.q.shape[0]
    if count < 2:
        return sample, sample
    return sample.sequences(slice(0, count // 2)), sample.sequences(slice(count // 2, None))


def named(feature_maps: MapsLike) -> dict[str, MapLike]:
    """The maps of a report by name: a spec's is the spec itself, a map's that of its class.

    Raises:
        TypeError: for something that is no map, no spec and no factory.
    """
    if isinstance(feature_maps, Mapping):
        return dict(feature_maps)
    if isinstance(feature_maps, str) or callable(feature_maps):
        feature_maps = [feature_maps]
    names: dict[str, MapLike] = {}
    for each in feature_maps:
        if not isinstance(each, str) and not callable(each):
            raise TypeError(
                f"feature_maps must be specs such as 'favor:n_dims=64', maps or factories, got "
                f"{each!r}"
            )
        name = each if isinstance(each, str) else repr(each)
        if isinstance(each, nn.Module) or (not isinstance(each, str) and name.startswith("<")):
            name = getattr(each, "__name__", type(each).__name__)
        names[name if name not in names else f"{name} ({len(names) + 1})"] = each
    return names


def instances(
    source: MapLike,
    dims: int,
    *,
    draws: int = 1,
    seed: int = 0,
    examples: Sample | None = None,
) -> Iterator[Any]:
    """The map, once for each draw of what is random in it, in evaluation mode.

    A factory is called for every draw; of a ready map, or one that was fitted, copies are drawn
    anew. A map without randomness comes once. Maps that have statistics are calibrated on
    ``examples`` unless they came ready, and fitted if they are :class:`Fitted`. The global
    generator is left as it was.
    """
    steps = 0
    if isinstance(source, Fitted):
        source, steps = source
    for draw in range(draws):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed * 1_000_003 + draw) % 2**63)
            if isinstance(source, nn.Module):
                made = copy.deepcopy(source).eval() if draws > 1 else source
                if draws > 1:
                    _resample(made)
            else:
                made = _made(source, dims, examples, steps)
        if steps and isinstance(made, nn.Module):
            source = made  # what was fitted does not depend on the draw
        yield made
        if not is_random(made):
            return


def _made(
    source: str | Callable[[int], Any], dims: int, examples: Sample | None, steps: int
) -> Any:
    """What a factory makes, calibrated and fitted."""
    factory = parse_feature_map(source) if isinstance(source, str) else source
    made = build_feature_map(factory, dims)
    if isinstance(made, nn.Module):
        made.eval()
    if examples is not None and isinstance(made, FeatureMap):
        made.to(examples.q.device)
        made.calibrate(examples.q, examples.k)
        fit_weights(
            made, examples.q, examples.k, keep=examples.keep,
            softmax_temp=examples.softmax_temp, steps=steps,
        )  # fmt: skip
    return made


def with_fits(specs: Sequence[str], dims: int, steps: int) -> dict[str, MapLike]:
    """Specs by name, each followed by the same map fitted in ``steps`` if it has what to fit."""
    maps: dict[str, MapLike] = {}
    for spec in specs:
        maps[spec] = spec
        if steps and has_parts(next(instances(spec, dims))):
            maps[f"{spec}, fitted"] = Fitted(spec, steps)
    return maps


def is_random(feature_map: Any) -> bool:
    """Whether another draw would give other features."""
    return bool(getattr(feature_map, "random", False)) or any(_random_parts(feature_map))


def _random_parts(feature_map: Any) -> Iterator[RandomFeatureMap]:
    modules = feature_map.modules() if isinstance(feature_map, nn.Module) else ()
    return (m for m in modules if isinstance(m, RandomFeatureMap))


def _resample(feature_map: nn.Module) -> None:
    for part in _random_parts(feature_map):
        part.resample()
