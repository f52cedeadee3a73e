"""What ``fast-transformers info`` tells: versions, devices, and which code path would run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata

import torch

from . import __version__, ops
from .builders import AttentionBuilder, RecurrentAttentionBuilder
from .feature_maps import FeatureMap, elu_feature_map, features_of
from .specs import parse_feature_map
from .stepper import explain_steps

CONDITIONAL_LIMIT = 512  # the default length_limit of the conditional attention
EXTRAS = ("transformers", "accelerate", "safetensors", "scikit-learn", "matplotlib", "triton")


def report(
    shape: Sequence[int] | None = None,
    causal: bool = False,
    attention: str | None = None,
    feature_map: str | None = None,
) -> Iterator[str]:
    """The lines of the report.

    Args:
        shape: N, L, S, H, E, M of a call of linear attention to explain, or None.
        causal: whether that call is causal.
        attention: name or composition to look up, or None.
        feature_map: spec of a map to describe, for the E of ``shape`` or 64, or None.

    Raises:
        ValueError: for an attention or a feature map that is not available.
    """
    about = [] if attention is None else [_attention(attention)]
    dims = 64 if shape is None else shape[4]
    features = elu_feature_map(dims)
    if feature_map is not None:
        features = parse_feature_map(feature_map)(dims)
        size = f"{features.query_dimensions} dimensions to {features.feature_dims} features"
        about.append(f"feature map       {feature_map}, {size}")
    yield f"fast-transformers {__version__}"
    yield f"python            {platform.python_version()} on {platform.platform()}"
    yield f"torch             {torch.__version__}"
    for name in EXTRAS:
        yield f"{name:<17} {_version(name)}"
    yield f"ptxas             {_ptxas()}"
    yield f"threads           {torch.get_num_threads()} of {os.cpu_count()} processors"
    yield from _devices()
    yield from _steps()
    yield from about
    if shape is not None:
        yield ""
        yield from _paths(shape, causal, attention or "linear", features)


def _paths(
    shape: Sequence[int], causal: bool, attention: str, features: FeatureMap
) -> Iterator[str]:
    """Which code path serves a call with these shapes, and why not the others."""
    n, length, keys, heads, query_dims, value_dims = shape
    outer, _, inner = attention.partition(":")
    softmax = outer == "full"
    if outer == "conditional-full":
        softmax = max(length, keys) <= CONDITIONAL_LIMIT
        outer = "full" if softmax else inner
    causal = causal or outer == "causal-linear"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield (
        f"{'causal ' * causal}{'softmax' if softmax else 'linear'} attention, queries "
        f"({n}, {length}, {heads}, {query_dims}), keys ({n}, {keys}, {heads}, {query_dims}), "
        f"values ({n}, {keys}, {heads}, {value_dims}), {device}:"
    )
    if softmax:
        answers = {
            "sdpa": "chosen: scaled_dot_product_attention of PyTorch",
            "matrix": "no: nobody listens for AttentionEvent, which needs the L x S matrix",
        }
    else:
        answers = ops.explain(
            causal=causal,
            length=length,
            keys=keys,
            device=device,
            dims=(query_dims, value_dims),
            features=features_of(features),
        )
    for impl, answer in answers.items():
        yield f"  {impl:<10} {answer}"


def _attention(name: str) -> str:
    batch, recurrent = AttentionBuilder(), RecurrentAttentionBuilder()
    if not batch.validate_attention_type(name):
        raise ValueError(batch.explain(name))
    twin = "has a recurrent twin" if recurrent.validate_attention_type(name) else "has no twin"
    return f"attention         {name} is available and {twin}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        if name == "triton":
            return "not installed: it comes with CUDA builds of torch"
        return "not installed: pip install fast-transformers[hf]"


def _ptxas() -> str:
    """Version of the assembler that the kernels go through."""
    try:
        from .ops.triton.assembler import assembler

        return assembler().version
    except ImportError:
        return "not available: it comes with Triton"
    except RuntimeError as e:
        return str(e)


def _steps() -> Iterator[str]:
    """How steps of generation run on the device that a model would be put on, and why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    label = "generation"
    for form, answer in explain_steps(device).items():
        yield f"{label:<17} {form:<9} {answer}"
        label = ""


def _devices() -> Iterator[str]:
    yield f"cpu               {platform.processor() or platform.machine()}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield f"cuda:{index}            {properties.name}, {memory:.0f} GiB"
    if not torch.cuda.is_available():
        yield "cuda              not available"
    if torch.backends.mps.is_available():
        yield "mps               available"
