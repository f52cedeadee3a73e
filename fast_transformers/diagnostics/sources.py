"""Where the queries and keys of a comparison come from: drawn, a file, a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sample import Sample, halves, make_sample

MOST_ELEMENTS = 2**26  # of q, and of k, in a file
MOST_ROWS = 8  # sequences of a run that are measured, and as many to calibrate on
LONGEST = 1024  # tokens of a sequence


class Source(NamedTuple):
    """What is compared on.

    Attributes:
        title: a sentence on where it comes from.
        samples: by the name of the layer.
        examples: the same layers on other inputs, to calibrate maps on.
        own: the feature maps that a trained model has itself, by the name of the layer.
    """

    title: str
    samples: dict[str, Sample]
    examples: dict[str, Sample]
    own: dict[str, Any] = {}  # noqa: RUF012

    @property
    def separate(self) -> bool:
        """Whether the examples are other inputs than those measured."""
        return all(self.examples[name] is not sample for name, sample in self.samples.items())

    def calibrated_on(self, other: Source) -> Source:
        """The same, measured whole, with all of another source to calibrate on.

        Raises:
            ValueError: if that has other layers, or other numbers of heads and dimensions.
        """
        for name, sample in self.samples.items():
            wanted, examples = sample.q.shape[2:], other.samples.get(name)
            got = None if examples is None else examples.q.shape[2:]
            if got != wanted:
                raise ValueError(
                    f"inputs to calibrate on need {name!r} with heads and dimensions "
                    f"{tuple(wanted)}, got {'no such layer' if got is None else tuple(got)}"
                )
        return self._replace(
            title=f"{self.title}, maps calibrated on {other.title}", examples=other.samples
        )


def synthetic(
    dims: int = 64, length: int = 256, heads: int = 2, logit_std: float = 1.0, seed: int = 0
) -> Source:
    """Independent normal queries, keys and values (2, length, heads, dims).

    Raises:
        ValueError: for sizes that are too small or too large.
    """
    if not (2 <= dims <= 1024 and 2 <= length <= LONGEST and 1 <= heads <= 64):
        raise ValueError(
            f"dims must be from 2 to 1024, length from 2 to {LONGEST} and heads from 1 to 64, got "
            f"{dims}, {length} and {heads}"
        )
    if not 0 < logit_std <= 100:
        raise ValueError(f"logit_std must be above 0 and at most 100, got {logit_std}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 2, length, heads, dims, generator=generator)
    x[:, :2] *= logit_std**0.5
    samples = [Sample(q, k, v) for q, k, v in x]
    title = (
        f"independent normal queries and keys: {heads} heads of {dims} dimensions, {length} "
        f"tokens, logits with a standard deviation of {logit_std:g}"
    )
    return Source(title, {"synthetic": samples[0]}, {"synthetic": samples[1]})


def from_file(path: Path, examples: Path | None = None) -> Source:
    """Queries and keys in a safetensors file: ``q``, ``k`` and perhaps ``v``, (N, L, H, E).

    Bool ``keep`` (N or 1, H or 1, L, S) is a mask, () float ``softmax_temp`` the factor of the
    dot products.

    Args:
        path: of the file.
        examples: another such file to calibrate maps on. Without it the second half of the
            sequences is kept for that, and a single sequence is both measured and calibrated on.

    Raises:
        OSError: for a file that is missing.
        ValueError: for one that is no safetensors, or holds other tensors, or for examples that
            are the file itself or have other heads or dimensions.
    """
    if examples is None:
        sample = _read(path)
        measured, others = halves(sample)
        return Source(_title(path, measured, sample), {path.stem: measured}, {path.stem: others})
    if examples.exists() and path.exists() and examples.samefile(path):
        raise ValueError(f"{path} is what is measured; calibrate on another file")
    sample, other = _read(path), _read(examples)
    source = Source(_title(path, sample, sample), {path.stem: sample}, {path.stem: sample})
    given = Source(_title(examples, other, other), {path.stem: other}, {path.stem: other})
    return source.calibrated_on(given)


def _title(path: Path, used: Sample, whole: Sample) -> str:
    count, _, heads, dims = whole.q.shape
    return f"{path.name}: {len(used.q)} of {count} sequences, {heads} heads of {dims} dimensions"


def _read(path: Path) -> Sample:
    """What a safetensors file holds."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            unknown = sorted(names - {"q", "k", "v", "keep", "softmax_temp"})
            if not {"q", "k"} <= names or unknown:
                raise ValueError(
                    f"{path} must hold q and k (N, L, H, E), and perhaps v, keep and "
                    f"softmax_temp, got {', '.join(sorted(names)) or 'nothing'}"
                )
            for name in names:
                shape = file.get_slice(name).get_shape()
                if torch.Size(shape).numel() > MOST_ELEMENTS:
                    raise ValueError(
                        f"{path}: {name} has shape {shape}, more than can be compared"
                    )
            found = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    return _from_tensors(path, found)


def _from_tensors(path: Path, found: dict[str, Tensor]) -> Sample:
    q, k, v = (None if found.get(n) is None else found[n].float() for n in "qkv")
    assert q is not None
    assert k is not None
    temp = found.get("softmax_temp")
    if temp is not None and (temp.numel() != 1 or not bool(temp.isfinite().all())):
        raise ValueError(f"{path}: softmax_temp must be one number, got {tuple(temp.shape)}")
    factor = None if temp is None else float(temp)
    try:
        sample = make_sample(q, k, v, softmax_temp=factor)
        if max(q.shape[1], k.shape[1]) > LONGEST:
            raise ValueError(
                f"at most {LONGEST} tokens can be compared, got {q.shape[1]} queries and "
                f"{k.shape[1]} keys; cut them"
            )
        if (keep := found.get("keep")) is not None:
            shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            sample = sample._replace(keep=keep.bool().expand(shape))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return sample
