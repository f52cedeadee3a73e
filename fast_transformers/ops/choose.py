"""Which form of the mathematics serves a call, and why not the others."""

from __future__ import annotations

import torch

FORMS = {
    "triton": "kernels for a GPU that compute the feature map on chip",
    "chunked": "streams over chunks; memory linear in the length with a small constant",
    "reference": "the whole L x S matrix of weights; the specification, for tests and inspection",
    "recurrent": "token by token, as in generation; the second specification",
    "exported": "ordinary operations in one graph; for torch.export and ONNX",
}


def causal_chunk(length: int) -> int:
    """Tokens per chunk of causal attention: 64, or all of a short sequence in one chunk.

    Within a chunk the cost is quadratic, between chunks there is overhead. Measured on 2 cores
    with 64 dimensions a head: 64 is within 10 % of the best size for long sequences, and one
    chunk of 65 tokens takes a third of the time of two.
    """
    return length if 0 < length <= 128 else 64


def exporting() -> bool:
    """Whether torch.export or torch.onnx.export is writing the program down.

    The flag itself is read, since ``torch.compiler.is_exporting`` is true under torch.compile
    before torch 2.12. Torch 2.6 has no flag, and writes our operators into the program.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def why_not(impl: str, *, causal: bool, length: int, keys: int) -> str | None:
    """The reason why a form cannot serve a call, or None if it can.

    Args:
        impl: a key of :data:`FORMS`.
        causal: whether position i sees only the keys up to i.
        length: number of queries L.
        keys: number of keys S.

    Raises:
        ValueError: for an unknown name.
    """
    if impl not in FORMS:
        raise ValueError(f"impl must be 'auto' or one of {', '.join(FORMS)}, got {impl!r}")
    if impl == "triton":
        return "this version has no GPU kernels"
    return None


def resolve(impl: str, **call: bool | int) -> str:
    """The form that serves a call: an explicit choice runs or raises, "auto" takes the fastest.

    An exported program is given the form that needs nothing of this library.
    """
    if impl == "auto":
        return "exported" if exporting() else "chunked"
    reason = why_not(impl, **call)  # pyright: ignore[reportArgumentType]
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot serve this call: {reason}; use impl='auto'")
    return impl


def explain(*, causal: bool, length: int, keys: int) -> dict[str, str]:
    """For every form, "chosen", "on request: ..." or "no: ..." with the reason."""
    call = {"causal": causal, "length": length, "keys": keys}
    chosen = resolve("auto", **call)
    answer = {}
    for impl, purpose in FORMS.items():
        reason = why_not(impl, causal=causal, length=length, keys=keys)
        if impl == chosen:
            answer[impl] = f"chosen: {purpose}"
        else:
            answer[impl] = f"no: {reason}" if reason else f"on request: {purpose}"
    return answer
