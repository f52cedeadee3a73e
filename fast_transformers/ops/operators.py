"""The passes as operators of ``torch.library``, for the feature maps that have a name.

Compilers and exporters see each as one node: inside, the loops depend on the length, and the
blocks of exponential features on the keys. A user's own functions cannot be arguments of an
operator; with them the same passes are called directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import chunked, chunked_backward, summed
from .call import Call, Settings
from .choose import causal_chunk
from .chunked import Inputs, Kept
from .features import Features, sum_dtype, without_autocast
from .sums import Triple
from .threads import same_threads

Results = tuple[Tensor, ...]
Gradients = list[Tensor | None]  # of the parameters of a user's map

_SETTINGS = (
    "str kind, float[] numbers, int chunk, float eps, bool normalised, bool keep, "
    "Tensor? projection, "
)


def operator(name: str, schema: str, fake: Callable[..., Results]) -> Callable[..., Any]:
    """Register ``function(settings, features, projection, *tensors)`` for features=None."""

    def register(function: Callable[..., Results]) -> Callable[..., Results]:
        def run(*args: Any) -> Results:
            first = next(x for x in args[3:] if x is not None)
            with without_autocast(first), same_threads(first):
                return function(*args)

        def named(*args: Any) -> Results:
            return run(Settings(args[0], tuple(args[1]), *args[2:6]), None, *args[6:])

        def shapes(*args: Any) -> Results:
            return fake(Settings(*args[:6]), *args[6:])

        # not by custom_op, whose calls take as long as several small kernels
        qualified = f"fast_transformers::{name}"
        torch.library.define(qualified, f"({_SETTINGS}{schema}", tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "CompositeExplicitAutograd", named)
        torch.library.impl(qualified, "Autograd", torch.library.fallthrough_kernel)
        torch.library.register_fake(qualified, shapes)
        registered = getattr(torch.ops.fast_transformers, name).default

        def call(
            settings: Settings, features: Features | None, projection: Tensor | None, *tensors: Any
        ) -> Results:
            if features is not None:
                return run(settings, features, projection, *tensors)
            return registered(*settings, projection, *tensors)

        return call

    return register


def _triple(kv: Tensor | None, z: Tensor | None, shift: Tensor | None) -> Triple | None:
    return None if kv is None or z is None else (kv, z, shift)


def present(state: Triple) -> Results:
    """Operators have no optional results: no shift is an empty one."""
    kv, z, shift = state
    return kv, z, z.new_empty(*z.shape[:2], 0) if shift is None else shift


def _causal_shapes(
    settings: Settings, projection: Any, mask: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> Results:
    call = Call.of(settings, None, projection, sum_dtype(q, k, v), chunk=0)
    out, final, kept = chunked.allocate(call, Inputs(q, k, v, mask))
    return out, *present(final), *kept


@operator(
    "causal",
    "Tensor? key_mask, Tensor q, Tensor k, Tensor v, Tensor? kv, Tensor? z, Tensor? shift) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _causal_shapes,
)
def causal(
    settings: Settings,
    features: Features | None,
    projection: Tensor | None,
    key_mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    shift: Tensor | None,
) -> Results:
    """Values, the final sums (3), and what the backward pass needs (5)."""
    chunk = causal_chunk(q.shape[1], q.device)
    call = Call.of(settings, features, projection, sum_dtype(q, k, v), chunk)
    out, final, kept = chunked.forward(call, Inputs(q, k, v, key_mask), _triple(kv, z, shift))
    return out, *present(final), *kept


def _causal_backward_shapes(
    settings: Settings, projection: Tensor | None, mask: Any, q: Tensor, k: Tensor, v: Tensor,
    shift: Tensor, out: Tensor, norm: Any, cuts: Any, kept_kv: Tensor, *_: Any
) -> Results:  # fmt: skip
    state = out.new_empty(v.shape[0], v.shape[2], kept_kv.shape[-2], v.shape[-1])
    return *map(torch.empty_like, (q, k, v)), state, state[..., 0].clone()


@operator(
    "causal_backward",
    "Tensor? key_mask, Tensor q, Tensor k, Tensor v, Tensor shift, Tensor out, Tensor norm, "
    "Tensor cuts, Tensor kept_kv, Tensor kept_z, Tensor kept_shift, Tensor d_out, Tensor? d_kv, "
    "Tensor? d_z) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _causal_backward_shapes,
)
def causal_backward(
    settings: Settings,
    features: Features | None,
    projection: Tensor | None,
    key_mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    out: Tensor,
    norm: Tensor,
    cuts: Tensor,
    kept_kv: Tensor,
    kept_z: Tensor,
    kept_shift: Tensor,
    d_out: Tensor,
    d_kv: Tensor | None,
    d_z: Tensor | None,
) -> Results:
    """Gradients of q, k, v, of the initial kv and z, and of a user's parameters."""
    chunk = causal_chunk(q.shape[1], q.device)
    call = Call.of(settings, features, projection, out.dtype, chunk)
    parameters: Gradients = [None] * len(call.features.parameters)
    kept = Kept(norm, cuts, kept_kv, kept_z, kept_shift)
    gradients, state = chunked_backward.backward(
        call, Inputs(q, k, v, key_mask), shift if call.features.exponential else None, out, kept,
        d_out, (d_kv, d_z), parameters,
    )  # fmt: skip
    return *gradients, *state, *parameters  # pyright: ignore[reportReturnType]


def _accumulate_shapes(
    settings: Settings, projection: Tensor | None, mask: Any, k: Tensor, v: Tensor, *_: Any
) -> Results:
    call = Call.of(settings, None, projection, sum_dtype(k, v), chunk=0)
    return present(summed.allocate_state(call, k, v))


@operator(
    "accumulate",
    "Tensor? key_mask, Tensor k, Tensor v, Tensor? kv, Tensor? z, Tensor? shift) -> "
    "(Tensor, Tensor, Tensor)",
    _accumulate_shapes,
)
def accumulate(
    settings: Settings,
    features: Features | None,
    projection: Tensor | None,
    key_mask: Tensor | None,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    shift: Tensor | None,
) -> Results:
    """The sums (3) over keys and values, added to a state."""
    call = Call.of(settings, features, projection, sum_dtype(k, v), chunk=0)
    return present(summed.accumulate(call, k, v, key_mask, _triple(kv, z, shift)))


@operator(
    "accumulate_backward",
    "Tensor? key_mask, Tensor k, Tensor v, Tensor shift, Tensor d_kv, Tensor d_z) -> "
    "(Tensor, Tensor)",
    lambda settings, projection, mask, k, v, *_: (torch.empty_like(k), torch.empty_like(v)),
)
def accumulate_backward(
    settings: Settings,
    features: Features | None,
    projection: Tensor | None,
    key_mask: Tensor | None,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    d_kv: Tensor,
    d_z: Tensor,
) -> Results:
    """Gradients of k and v, and of a user's parameters."""
    call = Call.of(settings, features, projection, d_kv.dtype, chunk=0)
    parameters: Gradients = [None] * len(call.features.parameters)
    gradients = summed.accumulate_backward(
        call, k, v, key_mask, shift if call.features.exponential else None, d_kv, d_z, parameters
    )
    return *gradients, *parameters  # pyright: ignore[reportReturnType]


def _attend_shapes(settings: Settings, projection: Any, q: Tensor, kv: Tensor, *_: Any) -> Results:
    rows = q.new_empty(*q.shape[:3], kv.shape[-1], dtype=kv.dtype)
    n, length, heads = q.shape[:3]
    return rows, rows.new_empty(n, length if settings.keep else 0, heads, 1)


@operator(
    "attend",
    "Tensor q, Tensor kv, Tensor z, Tensor? shift) -> (Tensor, Tensor)",
    _attend_shapes,
)
def attend(
    settings: Settings,
    features: Features | None,
    projection: Tensor | None,
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    shift: Tensor | None,
) -> Results:
    """Values, and what the backward pass needs of the denominators."""
    call = Call.of(settings, features, projection, kv.dtype, chunk=0)
    return summed.attend(call, q, (kv, z, shift))


@operator(
    "attend_backward",
    "Tensor q, Tensor kv, Tensor z, Tensor? shift, Tensor out, Tensor norm, Tensor d_out) -> "
    "(Tensor, Tensor, Tensor)",
    lambda settings, projection, q, kv, z, *_: (
        torch.empty_like(q),
        kv.new_empty(kv.shape),
        z.new_empty(z.shape),
    ),
)
def attend_backward(
    settings: Settings,
    features: Features | None,
    projection: Tensor | None,
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    shift: Tensor | None,
    out: Tensor,
    norm: Tensor,
    d_out: Tensor,
) -> Results:
    """Gradients of q, kv and z, and of a user's parameters."""
    call = Call.of(settings, features, projection, kv.dtype, chunk=0)
    parameters: Gradients = [None] * len(call.features.parameters)
    gradients = summed.attend_backward(call, q, (kv, z, shift), out, norm, d_out, parameters)
    return *gradients, *parameters  # pyright: ignore[reportReturnType]
