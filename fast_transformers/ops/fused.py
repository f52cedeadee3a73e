"""The kernels on whole tensors: their operators, autograd, and the form "triton" of :mod:`.api`.

This file needs torch alone. Triton is imported when an operator runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .autograd import USE_REFERENCE, BackwardPass, folded, run
from .call import Settings
from .checks import check_state_width, check_widths
from .features import Features
from .formula import Formula
from .kinds import KINDS
from .operators import Results, operator, present
from .state import LinearState
from .stream import encode, given, settings_of, state_of, sums_of


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features,
    *,
    causal: bool,
    key_mask: Tensor | None,
    state: LinearState | None,
    eps: float,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_keys: Tensor | None = None,
) -> tuple[Tensor, LinearState]:
    """Values (N, L, H*R, M) in the dtype of ``v``, by a map that has a formula.

    Arguments are those of :mod:`.api`. Causal packed sequences have as many keys as queries.
    """
    if cu_seqlens is not None:
        sequences = cu_seqlens, cu_seqlens_keys
        return _attend(q, k, v, features, causal, key_mask, state, eps, *sequences)
    if not causal:
        return _attend(q, k, v, features, False, key_mask, state, eps)
    both = min(q.shape[1], k.shape[1])
    mask = None if key_mask is None else key_mask[:, :both]
    first = q[:, :both], k[:, :both], v[:, :both]
    values, final = _attend(*first, features, True, mask, state, eps)
    if both < q.shape[1]:  # the last queries see every key, and there are no others
        rest, _ = _attend(q[:, both:], k[:, :0], v[:, :0], features, False, None, final, eps)
        values = torch.cat([values, rest], 1)
    return values, final


def evaluate(
    q: Tensor, k: Tensor, v: Tensor, features: Features, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Features]:
    """A map without a formula, computed and differentiated by torch: its features of ``q`` and
    ``k`` in place of them, and the map that takes them as they are; all in one dtype.

    Of a composition torch computes what the last map is given, not features. Masked keys may hold
    anything, so the map sees zeros there.
    """
    if features.composition is not None:
        of_queries, of_keys, inner = features.composition
        q, k = encode(of_queries, q, features), encode(of_keys, k, features, key_mask)
        return q.to(v.dtype), k.to(v.dtype), v, inner
    q, k = encode(features.queries, q, features), encode(features.keys, k, features, key_mask)
    check_widths(q.shape[-1], k.shape[-1])
    # logarithms of features keep their precision, features are rounded as in the kernels
    dtype = v.dtype if v.dtype == torch.bfloat16 and not features.exponential else torch.float32
    return q.to(dtype), k.to(dtype), v.to(dtype), given(features)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, features: Features, causal: bool, key_mask: Tensor | None,
    state: LinearState | None, eps: float, *sequences: Tensor | None,
) -> tuple[Tensor, LinearState]:  # fmt: skip
    formula = features.formula
    assert formula is not None
    if state is not None:
        check_state_width(state.kv.shape[2], KINDS[formula.kind].width(formula, k.shape[-1]))
    tensors = (key_mask, q, k, v, *sums_of(state), *(sequences or (None, None)))
    settings = settings_of(features, tensors, eps=eps)
    out, *final, _, _ = run(Fused, settings.keep, settings, causal, formula.projection, *tensors)
    return out, state_of(features, *final)


def _final_shape(
    settings: Settings, projection: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[int, int, int, int]:  # fmt: skip
    """(sequences, H, F, M)."""
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    formula = Formula(settings.kind, projection, settings.numbers)
    return n, k.shape[2], KINDS[settings.kind].width(formula, k.shape[-1]), v.shape[-1]


def _shapes(
    settings: Settings, projection: Tensor | None, mask: Any, q: Tensor, k: Tensor, v: Tensor,
    kv: Any, z: Any, shift: Any, cu_seqlens: Tensor | None, _: Any, causal: bool
) -> Results:  # fmt: skip
    from .triton.launch import Launch
    from .triton.plans import keeps

    out = v.new_empty(*q.shape[:3], v.shape[-1])
    final = v.new_empty(
        _final_shape(settings, projection, q, k, v, cu_seqlens), dtype=torch.float32
    )
    z = final.new_empty(final.shape[:3])
    shift = z.new_empty(z.shape) if KINDS[settings.kind].exponential else None
    n, length, heads = q.shape[:3]
    norm = z.new_empty(n, heads, length if settings.keep else 0)
    kept = n, 0
    if keeps(settings, causal, cu_seqlens):
        shape = None if projection is None else projection.shape
        call = Launch(settings, causal, shape, q.shape, k.shape, v.shape, k.dtype, k.device)
        kept = call.kept(n, length)
    return out, *present((final, z, shift)), norm, z.new_empty(kept)


_INPUTS = (
    "Tensor? key_mask, Tensor q, Tensor k, Tensor v, Tensor? kv, Tensor? z, Tensor? shift, "
    "Tensor? cu_seqlens, Tensor? cu_seqlens_keys"
)


@operator("fused", f"{_INPUTS}, bool causal) -> ({', '.join(['Tensor'] * 6)})", _shapes)
def fused(
    settings: Settings,
    features: None,
    projection: Tensor | None,
    key_mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    shift: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_keys: Tensor | None,
    causal: bool,
) -> Results:
    """Values, the final sums (3), and for the backward pass what it needs of the denominators,
    and sums on the way."""
    from .triton import passes

    state = passes.Sums(*map(_contiguous, (kv, z, shift)))
    with torch.cuda.device_of(q):
        out, final, norm, kept = passes.attend(
            settings, causal, projection, key_mask, q, k, v, state,
            *_starts(q, cu_seqlens, cu_seqlens_keys),
        )  # fmt: skip
    shape = _final_shape(settings, projection, q, k, v, cu_seqlens)[:2]
    kv, z, shift = (None if x is None else x.unflatten(0, shape) for x in final)
    if norm is None:
        norm = q.new_empty(q.shape[0], q.shape[2], 0, dtype=torch.float32)
    return out, *present((kv, z, shift)), norm, kept  # pyright: ignore[reportArgumentType]


def _backward_shapes(
    settings: Settings, projection: Any, mask: Any, q: Tensor, k: Tensor, v: Tensor,
    kv: Tensor | None, z: Tensor | None, *rest: Any
) -> Results:  # fmt: skip
    learned = rest[-1]
    state = (q.new_empty(0, dtype=torch.float32) if x is None else x for x in (kv, z))
    d_projection = projection if learned else q.new_empty(0, dtype=torch.float32)
    return tuple(x.new_empty(x.shape) for x in (q, k, v, *state, d_projection))


@operator(
    "fused_backward",
    f"{_INPUTS}, Tensor out, Tensor final_kv, Tensor final_z, Tensor final_shift, Tensor norm, "
    "Tensor kept, Tensor d_out, Tensor? d_kv, Tensor? d_z, bool causal, bool learned) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_shapes,
)
def fused_backward(
    settings: Settings,
    features: None,
    projection: Tensor | None,
    key_mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    shift: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_keys: Tensor | None,
    out: Tensor,
    final_kv: Tensor,
    final_z: Tensor,
    final_shift: Tensor,
    norm: Tensor,
    kept: Tensor,
    d_out: Tensor,
    d_kv: Tensor | None,
    d_z: Tensor | None,
    causal: bool,
    learned: bool,
) -> Results:
    """Gradients of q, k, v, of the initial kv and z, which are empty if there are none, and of
    the projection, which is empty unless it is ``learned``."""
    from .triton import passes

    state = passes.Sums(*map(_contiguous, (kv, z, shift)))
    sums = final_kv, final_z, final_shift if KINDS[settings.kind].exponential else None
    final = (None if x is None else x.flatten(0, 1) for x in sums)
    with torch.cuda.device_of(q):
        gradients = passes.differentiate(
            settings, causal, projection, key_mask, q, k, v, state, out, norm, kept,
            passes.Sums(*final), d_out, d_kv, d_z, *_starts(q, cu_seqlens, cu_seqlens_keys),
            learned,
        )  # fmt: skip
    return tuple(q.new_empty(0, dtype=torch.float32) if x is None else x for x in gradients)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _starts(
    q: Tensor, cu_seqlens: Tensor | None, cu_seqlens_keys: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Of queries and of keys, which may be the same."""
    if cu_seqlens is None:
        return None, None
    starts = cu_seqlens.to(q.device)
    return starts, starts if cu_seqlens_keys is None else cu_seqlens_keys.to(q.device)


class Fused(Function):
    """``causal`` stands where the other passes are given a user's functions."""

    @staticmethod
    def forward(
        settings: Settings, causal: bool, projection: Tensor | None, *tensors: Any
    ) -> Results:
        return fused(settings, None, projection, *tensors, causal)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.settings, ctx.causal = inputs[:2]
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(*inputs[2:], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        d_out, d_kv, d_z, *_ = gradients
        saved = ctx.saved_tensors
        kv, out = saved[5], saved[10]
        d_out = torch.zeros_like(out) if d_out is None else d_out
        learned = ctx.needs_input_grad[2]
        dq, dk, dv, d_kv, d_z, d_projection = run(
            FusedBackward, False, ctx.settings, (ctx.causal, learned), *saved, d_out, d_kv, d_z
        )
        state = (None, None) if kv is None else (d_kv, d_z)
        projection = d_projection if learned else None
        return None, None, projection, None, dq, dk, dv, *state, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        _refuse_packed(args)
        return folded(Fused, info.batch_size, in_dims, args, [0] * 9, [0] * 6)


class FusedBackward(BackwardPass):
    """In the same place: ``causal``, and whether the projection is learned."""

    @staticmethod
    def forward(
        settings: Settings, which: tuple[bool, bool], projection: Tensor | None, *tensors: Any
    ) -> Results:
        return fused_backward(settings, None, projection, *tensors, *which)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        _refuse_packed(args)
        if args[1][1]:  # its gradient is a sum over what is mapped over
            raise NotImplementedError(f"vmap of the gradient of a projection; {USE_REFERENCE}")
        return folded(FusedBackward, info.batch_size, in_dims, args, [0] * 18, [0] * 6)


def _refuse_packed(args: tuple[Any, ...]) -> None:
    if args[10] is not None:
        raise NotImplementedError(f"vmap over packed sequences; {USE_REFERENCE}")
