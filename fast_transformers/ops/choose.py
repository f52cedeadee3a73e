"""Which form of the mathematics serves a call, and why not the others."""

from __future__ import annotations

import os
import re
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

from .features import IDENTITY, Features
from .kinds import KINDS

FORMS = {
    "triton": "kernels for a GPU that compute the feature map on chip",
    "chunked": "streams over chunks; memory linear in the length with a small constant",
    "reference": "the whole L x S matrix of weights; the specification, for tests and inspection",
    "recurrent": "token by token, as in generation; the second specification",
    "exported": "ordinary operations in one graph; for torch.export and ONNX",
}
OLDEST_TRITON = (3, 4)
OLDEST_SOUND = (3, 6)  # that carries an assembler which gets kernels right
CAPABILITY = 9  # of Hopper, the one the tiles were measured on; many others have less memory
MOST_DIMS, MOST_FEATURES = 256, 512  # of the kernels
MOST_DIMS_FLOAT32 = 128  # of those whose factors take twice the memory
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in Python, on any device


def causal_chunk(length: int, device: torch.device) -> int:
    """Tokens per chunk of causal attention, or all of a short sequence in one chunk.

    Within a chunk the cost is quadratic, between chunks there is overhead, most of it on a GPU.
    Measured on 2 cores with 64 dimensions a head: 32 takes 5 to 15 % less than 64 of 64 to 256
    features, and one chunk of 65 tokens takes a third of the time of two.
    """
    if 0 < length <= 128:
        return length
    return 32 if device.type == "cpu" else 64


def exporting() -> bool:
    """Whether torch.export or torch.onnx.export is writing the program down.

    The flag itself is read, since ``torch.compiler.is_exporting`` is true under torch.compile
    before torch 2.12. Torch 2.6 has no flag, and writes our operators into the program.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def _older(than: tuple[int, int]) -> str | None:
    """The version of Triton if it is older; None of a build of another name, too."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None
    return version if tuple(map(int, re.findall(r"\d+", version)[:2])) < than else None


def _missing() -> str | None:
    """What is not installed, found without importing it."""
    if find_spec(f"{__package__}.triton") is None:
        return "this installation comes without the kernels"
    if find_spec("triton") is None:
        return "Triton is not installed"
    version = _older(OLDEST_TRITON)
    if version is not None:
        return f"Triton {version} is too old, kernels need {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    return None


def _unsound() -> str | None:
    """Why machine code of the kernels would be wrong, see ``triton/assembler.py``."""
    version = None if "TRITON_PTXAS_PATH" in os.environ else _older(OLDEST_SOUND)
    if version is None:
        return None
    return (
        f"the assembler in Triton {version} gets kernels wrong; install Triton "
        f"{OLDEST_SOUND[0]}.{OLDEST_SOUND[1]}, or set TRITON_PTXAS_PATH to the ptxas of CUDA 12.9"
    )


MISSING, UNSOUND = _missing(), _unsound()  # once, where no compiler looks


UNFIT: dict[int | None, str | None] = {}  # what was found: asking takes as long as a kernel


def _unfit(index: int | None) -> str | None:
    """Why kernels do not run on a CUDA device."""
    if index not in UNFIT:
        UNFIT[index] = _misfit(index)
    return UNFIT[index]


def _misfit(index: int | None) -> str | None:
    """In words that a compiler takes for constants."""
    if torch.version.hip is not None:
        return "kernels are for GPUs of NVIDIA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    gpu = torch.cuda.get_device_properties(index)
    if gpu.major != CAPABILITY:
        found = f"compute capability {gpu.major}.{gpu.minor}"
        return f"the GPU has {found}, kernels are sized for {CAPABILITY}.0 (Hopper)"
    return None


def why_not(
    impl: str,
    *,
    causal: bool,
    length: int,
    keys: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = torch.float32,
    dims: tuple[int, int] = (64, 64),
    features: Features | None = None,
) -> str | None:
    """The reason why a form cannot serve a call, or None if it can.

    Args:
        impl: a key of :data:`FORMS`.
        causal: whether position i sees only the keys up to i.
        length: number of queries L.
        keys: number of keys S.
        device: of the tensors; None for the default device.
        dtype: of queries, keys and values; None if they differ.
        dims: (E, M), dimensions of queries and of values.
        features: the feature map; None if queries and keys are features already. The number of
            features of a map without a formula is not known before they are computed.

    Raises:
        ValueError: for an unknown name.
    """
    if impl not in FORMS:
        raise ValueError(f"impl must be 'auto' or one of {', '.join(FORMS)}, got {impl!r}")
    if impl == "triton":
        device = torch.device(device or torch.get_default_device())
        return _not_installed(device) or _too_much(dtype, dims, features or IDENTITY)
    return None


def _not_installed(device: torch.device) -> str | None:
    if exporting():
        return "an exported program is made of ordinary operations"
    if MISSING is not None:
        return MISSING
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the tensors are on a device of type {device.type}, kernels need cuda"
    return UNSOUND or _unfit(device.index)


def _too_much(dtype: torch.dtype | None, dims: tuple[int, int], features: Features) -> str | None:
    if dtype is None:
        return "queries, keys and values differ in dtype"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"kernels sum in float32, the inputs are {dtype}".replace("torch.", "")
    formula, most, why = features.formula, MOST_DIMS, ""
    if dtype != torch.bfloat16:
        most, why = MOST_DIMS_FLOAT32, f" in {dtype}".replace("torch.", "")
    elif formula is not None and not KINDS[formula.kind].never_zero:
        most, why = MOST_DIMS_FLOAT32, f" for {formula.kind}, whose factors are float32"
    if formula is not None:
        width = KINDS[formula.kind].width(formula, dims[0])
        if width > MOST_FEATURES:
            return f"kernels take {MOST_FEATURES} features, there are {width}"
        if formula.projection is not None and dims[0] > most:
            return f"kernels take queries of {most} dimensions{why}, these have {dims[0]}"
    if dims[1] > most:
        return f"kernels take values of {most} dimensions{why}, these have {dims[1]}"
    return None


def resolve(impl: str, *, device: torch.device, **call: Any) -> str:
    """The form that serves a call: an explicit choice runs or raises, "auto" takes the fastest.

    An exported program is given the form that needs nothing of this library. ``call`` is what
    :func:`why_not` is told.
    """
    if impl == "auto":
        if exporting():
            return "exported"
        on_gpu = device.type == "cuda" and why_not("triton", device=device, **call) is None
        return "triton" if on_gpu else "chunked"
    reason = why_not(impl, device=device, **call)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot serve this call: {reason}; use impl='auto'")
    return impl


def explain(
    *,
    causal: bool,
    length: int,
    keys: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = torch.float32,
    dims: tuple[int, int] = (64, 64),
    features: Features | None = None,
) -> dict[str, str]:
    """For every form, "chosen", "on request: ..." or "no: ..." with the reason.

    Arguments are those of :func:`why_not`.
    """
    call = {"causal": causal, "length": length, "keys": keys, "dtype": dtype, "dims": dims}
    call |= {"features": features, "device": torch.device(device or torch.get_default_device())}
    chosen = resolve("auto", **call)
    answer = {}
    for impl, purpose in FORMS.items():
        if impl == "triton" and features is not None and features.formula is None:
            purpose = f"kernels over features computed by torch, if at most {MOST_FEATURES}"
            if features.composition is not None:
                kind = features.composition.inner.formula.kind
                purpose = f"kernels that compute {kind} on chip, of rows computed by torch"
        reason = why_not(impl, **call)
        if impl == chosen:
            answer[impl] = f"chosen: {purpose}"
        else:
            answer[impl] = f"no: {reason}" if reason else f"on request: {purpose}"
    return answer
