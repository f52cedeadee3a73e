"""The forward and the backward pass: which kernels run, and in which order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Settings
from . import backward, carried, forward, walks
from .launch import NOTHING, Inputs, Launch, prepare
from .learned import of_products, of_projection
from .maps import gradient, rows
from .plans import Plan, keeps
from .sums import Sums

MOST_BYTES = 300 * 2**20  # of sums of queries that are in memory together


def attend(
    settings: Settings, causal: bool, projection: Tensor | None, mask: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, state: Sums, cu: Tensor | None, cu_keys: Tensor | None,
) -> tuple[Tensor, Sums, Tensor | None, Tensor]:  # fmt: skip
    """Values (N, L, H*R, M) in the dtype of ``v``, the final sums, (sequences * H, F, M) and
    (sequences * H, F), and for the backward pass, if ``settings.keep``, norms (N, H*R, L) and
    the sums before segments."""
    call = prepare(settings, causal, projection, mask, q, k, v, *state, cu, cu_keys)
    inputs = call.inputs(projection, mask, q, k, v)
    n, length = q.shape[:2]
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=v.dtype)
    norm = call.empty(n, call.q_heads, length) if settings.keep else None
    final = call.sums((n if cu_keys is None else cu_keys.shape[0] - 1) * call.heads)
    kept = call.empty(*(call.kept(n, length) if keeps(settings, causal, cu) else (n, 0)))
    to = rows(out), norm, settings.eps
    if call.carried:
        plan, start = _segments(call, inputs, n, length, cu, state, kept)
        call.carry(carried.attend_along, inputs, plan, length, start, final, *to)
        return out, final, norm, kept
    before, flags = _along_keys(call, inputs, k, cu_keys, state, final, causal, kept)
    call.each(forward.attend, inputs, n, length, cu, before, flags, *to, whole=False)
    return out, final, norm, kept


def differentiate(
    settings: Settings, causal: bool, projection: Tensor | None, mask: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, state: Sums, out: Tensor, norm: Tensor, kept: Tensor,
    final: Sums, d_out: Tensor, d_kv: Tensor | None, d_z: Tensor | None,
    cu: Tensor | None, cu_keys: Tensor | None, learned: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, of the initial kv and z if there are any, and of a projection that is
    ``learned``."""
    shared = projection, mask, q, k, v, *state, cu, cu_keys
    call = prepare(settings, causal, *shared, out, norm, *final, d_out, d_kv, d_z)
    inputs = call.inputs(projection, mask, q, k, v)
    n, length = q.shape[:2]
    dq, numbers = torch.empty_like(q), call.empty(*norm.shape, 2)
    start, total = _seed(call, final, d_kv, d_z), NOTHING
    if state.kv is not None or not causal:
        total = call.sums(final.kv.shape[0] // call.heads * call.q_heads)
    du = of_products(call, q) if learned else None
    to = rows(d_out), norm, numbers, rows(out), gradient(dq, du)
    before, flags = None, None
    if call.carried:
        plan, start_keys = _segments(call, inputs, n, length, cu, state, kept, True)
        kernel = carried.differentiate_queries_along
        call.carry(kernel, inputs, plan, length, start_keys, *to, learned=learned)
    else:
        if causal:
            before, flags = _along_keys(call, inputs, k, cu_keys, state, NOTHING, True, kept, True)
        else:
            before = call.factors(final)
        kernel = backward.differentiate_queries
        call.each(kernel, inputs, n, length, cu, before, flags, *to, learned=learned)
    d_projection = None if du is None else of_projection(call, q, None, du)
    del before, to, du  # their memory serves what follows
    dk, dv = _gradient(call, k), _gradient(call, v)
    of_queries = q, d_out, numbers.transpose(1, 2), dk, dv
    alone = start.kv is None and total.kv is None
    for part in _portions(call, n, length, alone):
        of_keys = part.of(mask, 0), part.of(k), part.of(v)
        mine = (part.of(x, call.groups) for x in of_queries)
        more = _differentiate_keys(
            settings, causal, projection, *of_keys, *mine, start, total, cu, cu_keys, learned
        )
        d_projection = None if more is None else more.add_(d_projection)
    if d_projection is not None:
        d_projection = d_projection.to(projection.dtype)
    if call.groups > 1:
        dk, dv = (x.unflatten(2, (call.heads, -1)).sum(3).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv, *_of_state(call, state, total), d_projection


class _Portion(NamedTuple):
    """Some sequences, or some key heads of one; None for all."""

    batch: slice | None = None
    heads: slice | None = None

    def of(self, x: Any, groups: int = 1) -> Any:
        """The part of (N, length, H * groups, ...), or without ``groups`` of (N, length)."""
        if x is None:
            return None
        if self.heads is not None and groups:
            return x[:, :, self.heads.start * groups : self.heads.stop * groups]
        return x if self.batch is None else x[self.batch]


def _portions(call: Launch, n: int, length: int, alone: bool) -> list[_Portion]:
    """What is worked on together: the sums after all its chunks take MOST_BYTES, or little more.

    Only calls without gradients of the sums themselves are cut, that stand ``alone``.
    """
    chunks = n * -(-length // call.config.chunk)
    size = chunks * call.q_heads * call.features * call.m * call.operand.itemsize
    if size <= MOST_BYTES or not (call.causal and alone):
        return [_Portion()]
    count = -(-size // MOST_BYTES)
    if n > 1:
        each = -(-n // count)
        return [_Portion(batch=slice(i, i + each)) for i in range(0, n, each)]
    each = -(-call.heads // count)
    starts = range(0, call.heads, each)
    return [_Portion(heads=slice(h, min(h + each, call.heads))) for h in starts]


def _differentiate_keys(
    settings: Settings, causal: bool, projection: Tensor | None, mask: Tensor | None, k: Tensor,
    v: Tensor, q: Tensor, d_out: Tensor, numbers: Tensor, dk: Tensor, dv: Tensor, start: Sums,
    total: Sums, cu: Tensor | None, cu_keys: Tensor | None, learned: bool,
) -> Tensor | None:  # fmt: skip
    """Write the gradients of keys and values; that of a projection, as far as keys make it."""
    call = prepare(settings, causal, projection, mask, q, k, v, *start, cu, cu_keys, d_out)
    inputs, d_rows = call.inputs(projection, mask, q, k, v), rows(d_out)
    (n, length), numbers = q.shape[:2], numbers.transpose(1, 2)
    plan = call.segments(n, length, call.q_heads, call.blocks * call.columns, cu)
    walk = (inputs.q, d_rows, numbers, length), plan, call.q_heads, inputs.walk_map
    after, flags = call.along(walks.walk_queries, *walk, start, total, causal)
    du = of_products(call, k) if learned else None
    tensors = after, flags, d_rows, numbers, gradient(dk, du), rows(dv)
    kernel, size = backward.differentiate_keys, k.shape[1]
    call.each(kernel, inputs, n, size, cu_keys, *tensors, learned=learned)
    return None if du is None else of_projection(call, k, mask, du)


def _segments(
    call: Launch, inputs: Inputs, n: int, length: int, cu: Tensor | None, start: Sums,
    kept: Tensor, again: bool = False,
) -> tuple[Plan, Sums]:  # fmt: skip
    """Segments to carry sums along, and the sums before them; ``kept`` and ``again`` as for
    :func:`_along_keys`."""
    plan = call.segments(n, length, call.heads, 1, cu)
    if plan.table is None and plan.parts == 1:
        return plan, start
    parts = call.sums_in(kept, plan)
    if parts is None or not again:
        tensors = (*inputs[1:5], length)
        walk = walks.walk_keys, tensors, plan, call.heads, inputs.walk_map
        parts = call.before(*walk, start, parts=parts)
    return plan, parts


def _along_keys(
    call: Launch, inputs: Inputs, k: Tensor, cu: Tensor | None, state: Sums, final: Sums,
    store: bool, kept: Tensor, again: bool = False,
) -> tuple[Sums, Tensor | None]:  # fmt: skip
    """``kept`` takes the sums before segments, or has them if this is done ``again``."""
    plan = call.segments(*k.shape[:2], call.heads, call.blocks * call.columns, cu)
    walk = walks.walk_keys, (*inputs[1:5], k.shape[1]), plan, call.heads, inputs.walk_map
    parts = call.sums_in(kept, plan)
    if again and parts is not None:
        return call.walk(*walk, parts, final, True)
    return call.along(*walk, state, final, store, parts)


def _gradient(call: Launch, x: Tensor) -> Tensor:
    """Of keys or values, for each query head."""
    if call.groups == 1:
        return torch.empty_like(x)
    return call.empty(*x.shape[:2], call.q_heads, x.shape[3])


def _seed(call: Launch, final: Sums, d_kv: Tensor | None, d_z: Tensor | None) -> Sums:
    """Gradients of the final sums as sums over later queries, of the first head of a group."""
    if d_kv is None and d_z is None:
        return NOTHING
    d_kv = torch.zeros_like(final.kv) if d_kv is None else d_kv.flatten(0, 1)
    z = torch.zeros_like(final.z) if d_z is None else -d_z.flatten(0, 1)
    shift = None if final.shift is None else -final.shift
    if call.groups > 1:
        pad = (0, call.groups - 1)
        d_kv, z = (
            torch.nn.functional.pad(x[..., None], pad).movedim(-1, 1).flatten(0, 1)
            for x in (d_kv, z)
        )
        shift = None if shift is None else shift.repeat_interleave(call.groups, 0)
    return Sums(d_kv.contiguous(), z.contiguous(), shift)


def _of_state(call: Launch, state: Sums, total: Sums) -> Any:
    """Gradients of the initial sums."""
    if state.kv is None:
        return None, None
    d_kv, d_z = total.kv, -total.z
    if total.shift is not None:
        past = state.shift.flatten(0, 1).repeat_interleave(call.groups, 0)
        factor = (total.shift + past).exp2()
        d_kv, d_z = d_kv * factor[..., None], d_z * factor
    return (x.unflatten(0, (*state.kv.shape[:2], -1)).sum(2) for x in (d_kv, d_z))
