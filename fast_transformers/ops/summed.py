"""Attention to all keys at once: sum over the keys, then look the sums up.

    S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j),   out_i = phi(q_i) S / phi(q_i).z

Both halves stream over chunks and recompute the feature map in the backward pass, so that no
feature outlives its chunk. The two halves serve by themselves too: a decoder sums its memory
once and looks it up at every step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .checks import check_state_width, check_widths
from .features import (
    Differentiated,
    Features,
    evaluate,
    first_order,
    pack,
    reproducible,
    sum_dtype,
    unpack,
)
from .scaling import key_factors, lowest, normalise, query_factors
from .state import LinearState


def accumulate(
    k: Tensor,
    v: Tensor,
    features: Features,
    *,
    key_mask: Tensor | None = None,
    state: LinearState | None = None,
    chunk_size: int = 256,
) -> LinearState:
    """Add keys (N, S, H, E) and values (N, S, H, M) to a state, in chunks."""
    kv, z, shift = (None, None, None) if state is None else (state.kv, state.z, state.shift)
    kv, z, shift = _Accumulate.apply(
        features, chunk_size, key_mask, k, v, kv, z, shift, *features.parameters
    )
    return LinearState(kv, z, shift)


def attend(
    q: Tensor, state: LinearState, features: Features, *, eps: float, chunk_size: int = 256
) -> Tensor:
    """Look queries (N, L, H, E) up in a state: (N, L, H, M), in the dtype of the sums."""
    return _Attend.apply(
        features, chunk_size, eps, q, state.kv, state.z, state.shift, *features.parameters
    )


def chunks(length: int, size: int) -> list[slice]:
    return [slice(lo, min(lo + size, length)) for lo in range(0, length, size)]


def read_keys(
    k: Tensor, v: Tensor, mask: Tensor | None, at: slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A chunk of keys and values with the masked ones zeroed, and where they are, (G, C, 1)."""
    k, v = k[:, at], v[:, at]
    if mask is None:
        return k, v, None
    drop = ~mask[:, at, None, None]
    return (
        k.masked_fill(drop, 0),
        v.masked_fill(drop, 0),
        pack(drop.expand(-1, -1, k.shape[2], 1), torch.bool),
    )


def hide(a: Tensor, masked: Tensor | None, features: Features) -> Tensor:
    """Take masked keys out: a feature of 0, whose logarithm is -inf."""
    return a if masked is None else a.masked_fill(masked, -math.inf if features.exponential else 0)


class Sums:
    """The running sums, (G, F, M) and (G, F), allocated when the first features are known."""

    kv: Any
    z: Any
    shift: Tensor | None

    def __init__(self, kv: Tensor | None, z: Tensor | None, shift: Tensor | None) -> None:
        self.kv = None if kv is None else kv.detach().flatten(0, 1).clone()
        self.z = None if z is None else z.detach().flatten(0, 1).clone()
        self.shift = None if shift is None else shift.detach().flatten(0, 1)

    def allocate(self, a: Tensor, values: int, exponential: bool) -> None:
        if self.kv is None:
            g, _, f = a.shape
            self.kv, self.z = a.new_zeros(g, f, values), a.new_zeros(g, f)
            if exponential:
                self.shift = a.new_full((g, f), lowest(a.dtype))
        check_state_width(self.z.shape[-1], a.shape[-1])

    def factors(self, a: Tensor) -> Tensor:
        """Key factors relative to the shift that includes these keys; the sums follow it."""
        kappa, self.shift, decay = key_factors(a, self.shift)
        if decay is not None:
            self.kv *= decay[..., None]
            self.z *= decay
        return kappa

    def add(self, kappa: Tensor, v: Tensor) -> None:
        self.kv.baddbmm_(kappa.mT, v)
        self.z += kappa.sum(1)

    def unflatten(self, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
        shift = None if self.shift is None else self.shift.unflatten(0, (n, -1))
        return self.kv.unflatten(0, (n, -1)), self.z.unflatten(0, (n, -1)), shift


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Features,
        chunk_size: int,
        key_mask: Tensor | None,
        k: Tensor,
        v: Tensor,
        kv: Tensor | None,
        z: Tensor | None,
        shift: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype, sums = sum_dtype(k, v), Sums(kv, z, shift)
        # an empty sequence still has a number of features
        for at in chunks(k.shape[1], chunk_size) or [slice(0, 0)]:
            k_chunk, v_chunk, masked = read_keys(k, v, key_mask, at)
            with reproducible(features, k, ctx, at):
                a = hide(evaluate(features.keys, k_chunk, features, dtype), masked, features)
            sums.allocate(a, v.shape[-1], features.exponential)
            if a.shape[1]:
                sums.add(sums.factors(a), pack(v_chunk, dtype))
        kv_out, z_out, shift_out = sums.unflatten(k.shape[0])
        ctx.save_for_backward(key_mask, k, v, shift, shift_out, *parameters)
        ctx.settings = features, chunk_size, dtype, kv is not None
        if shift_out is not None:
            ctx.mark_non_differentiable(shift_out)
        ctx.set_materialize_grads(False)
        return kv_out, z_out, shift_out

    @staticmethod
    @first_order
    def backward(ctx: Any, d_kv: Tensor | None, d_z: Tensor | None, _: Any) -> tuple[Any, ...]:
        key_mask, k, v, shift, shift_out, *_ = ctx.saved_tensors
        features, chunk_size, dtype, continued = ctx.settings
        nothing = (None,) * (8 + len(features.parameters))
        if d_kv is None and d_z is None:
            return nothing
        d_parameters: list[Tensor | None] = [None] * len(features.parameters)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        d_kv_flat = None if d_kv is None else d_kv.flatten(0, 1)
        d_z_flat = None if d_z is None else d_z.flatten(0, 1)[:, None]
        for at in chunks(k.shape[1], chunk_size):
            k_chunk, v_chunk, masked = read_keys(k, v, key_mask, at)
            keys = Differentiated(features.keys, k_chunk, features, dtype, not at.start)
            kappa = hide(keys.value, masked, features)
            if shift_out is not None:
                kappa = (kappa - shift_out.flatten(0, 1)[:, None]).exp_()
            if d_kv_flat is None:
                da = d_z_flat.expand_as(kappa)
                dv[:, at] = 0
            else:
                da = pack(v_chunk, dtype) @ d_kv_flat.mT
                if d_z_flat is not None:
                    da += d_z_flat
                dv[:, at] = unpack(kappa @ d_kv_flat, k.shape[0])
            if features.exponential:
                da = da * kappa
            elif masked is not None:
                da = da.masked_fill(masked, 0.0)
            dk[:, at] = keys.pull_back(da, d_parameters)
        if shift is not None:  # from sums relative to the new shift to sums relative to the old
            decay = (shift - shift_out).exp()
            d_kv = None if d_kv is None else d_kv * decay[..., None]
            d_z = None if d_z is None else d_z * decay
        d_state = (d_kv, d_z) if continued else (None, None)
        return None, None, None, dk, dv, *d_state, None, *d_parameters


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Features,
        chunk_size: int,
        eps: float,
        q: Tensor,
        kv: Tensor,
        z: Tensor,
        shift: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        dtype, sums = kv.dtype, Sums(kv, z, shift)
        n, length, h, _ = q.shape
        out = kv.new_empty(n, length, h, kv.shape[-1])
        norm = kv.new_empty(n * h, length, 1)
        for at in chunks(length, chunk_size):
            with reproducible(features, q, ctx, at):
                b = evaluate(features.queries, q[:, at], features, dtype)
            check_widths(b.shape[-1], z.shape[-1])
            p, offset = query_factors(b, sums.shift)
            denominator = (p * sums.z[:, None]).sum(-1, keepdim=True)
            values, norm[:, at] = normalise(p @ sums.kv, denominator, offset, eps)
            out[:, at] = unpack(values, n)
        ctx.save_for_backward(q, kv, z, shift, out, norm, *parameters)
        ctx.settings = features, chunk_size, dtype
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        q, kv, z, shift, out, norm, *_ = ctx.saved_tensors
        features, chunk_size, dtype = ctx.settings
        d_parameters: list[Tensor | None] = [None] * len(features.parameters)
        sums = Sums(kv, z, shift)
        dq = torch.empty_like(q)
        d_kv, d_z = torch.zeros_like(sums.kv), torch.zeros_like(sums.z)
        for at in chunks(q.shape[1], chunk_size):
            queries = Differentiated(features.queries, q[:, at], features, dtype, not at.start)
            do = pack(d_out[:, at], dtype)
            delta = (do * pack(out[:, at], dtype)).sum(-1, keepdim=True)
            g = (do @ sums.kv.mT).sub_(delta * sums.z[:, None])
            if sums.shift is None:
                p, db = queries.value * norm[:, at], g * norm[:, at]
            else:
                p = (queries.value + sums.shift[:, None]).sub_(norm[:, at]).exp_()
                db = g * p
            d_kv.baddbmm_(p.mT, do)
            d_z.sub_((p * delta).sum(1))
            dq[:, at] = queries.pull_back(db, d_parameters)
        return (
            *(None, None, None, dq),
            *(d_kv.view_as(kv), d_z.view_as(z), None),
            *d_parameters,
        )
