"""Causal attention in chunks: a chunk attends to itself directly, to the past through sums.

For a chunk of queries with factors p, keys with factors kappa and values v, after sums S, z of
everything before it,

    A = tril(p kappa^T),   out = (p S + A v) / (p.z + rowsum(A)),
    S += kappa^T v,        z += sum(kappa)

so time and memory are linear in the length. Features are recomputed chunk by chunk in the
backward pass, which sweeps forward for the queries (they need the sums of the past) and in
reverse for keys and values (they need the sums of the future): with P the normalised query
factors, G = do v^T - delta and delta = do.out,

    d(query feature)_t = S do_t - delta_t z + sum_{j<=t} G_tj kappa_j
    d(key feature)_j   = R v_j - r + sum_{t>=j} G_tj P_t,        R = sum_t P_t do_t^T,
    dv_j               = R^T kappa_j + sum_{t>=j} (P_t.kappa_j) do_t,   r = sum_t P_t delta_t

What :mod:`.scaling` takes out of exponential features cancels here as it does forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .checks import check_widths
from .chunked_backward import Future, Layout, Saved, keys_backward, queries_backward
from .features import Features, evaluate, first_order, pack, reproducible, sum_dtype, unpack
from .scaling import is_spread, normalise, query_factors
from .state import LinearState
from .summed import Sums, chunks, hide, read_keys


def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features,
    *,
    key_mask: Tensor | None,
    state: LinearState | None,
    eps: float,
    chunk_size: int,
    normalised: bool = True,
) -> tuple[Tensor, LinearState]:
    """Queries, keys and values of one length L: values (N, L, H, M) in the dtype of the sums.

    Without ``normalised`` the values are not divided by the sum of their weights; that has a
    meaning only for features that are not exponentials.
    """
    kv, z, shift = (None, None, None) if state is None else (state.kv, state.z, state.shift)
    out, kv, z, shift = _Causal.apply(
        features, chunk_size, eps if normalised else None, key_mask, q, k, v, kv, z, shift,
        *features.parameters,
    )  # fmt: skip
    return out, LinearState(kv, z, shift)


def _pieces(a: Tensor, sums: Sums, masked: Tensor | None) -> Iterator[slice]:
    """Slices of a chunk, in order, each narrow enough for one reference; normally just one.

    The decision needs the shift that the pieces before have left in ``sums``.
    """
    waiting = [(0, a.shape[1])]
    while waiting:
        lo, hi = waiting.pop()
        if is_spread(a[:, lo:hi], sums.shift, None if masked is None else masked[:, lo:hi]):
            middle = (lo + hi) // 2
            waiting += [(middle, hi), (lo, middle)]
        else:
            yield slice(lo, hi)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Features,
        chunk_size: int,
        eps: float | None,
        key_mask: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: Tensor | None,
        z: Tensor | None,
        shift: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        dtype, sums = sum_dtype(q, k, v), Sums(kv, z, shift)
        n, length, h, _ = q.shape
        out = q.new_empty(n, length, h, v.shape[-1], dtype=dtype)
        norm = q.new_empty(n * h, length, 1, dtype=dtype)
        layout: Layout = []
        for at in chunks(length, chunk_size) or [slice(0, 0)]:
            k_chunk, v_chunk, masked = read_keys(k, v, key_mask, at)
            with reproducible(features, q, ctx, at):
                a = hide(evaluate(features.keys, k_chunk, features, dtype), masked, features)
                b = evaluate(features.queries, q[:, at], features, dtype)
            check_widths(b.shape[-1], a.shape[-1])
            sums.allocate(a, v.shape[-1], features.exponential)
            v_chunk = pack(v_chunk, dtype)
            pieces = []
            for piece in _pieces(a, sums, masked) if length else ():
                kappa = sums.factors(a[:, piece])
                p, offset = query_factors(b[:, piece], sums.shift)
                weights = (p @ kappa.mT).tril_()
                values = torch.baddbmm(p @ sums.kv, weights, v_chunk[:, piece])
                where = slice(at.start + piece.start, at.start + piece.stop)
                if eps is None:
                    norm[:, where] = 1.0
                else:
                    denominator = (p * sums.z[:, None]).sum(-1, keepdim=True)
                    denominator += weights.sum(-1, keepdim=True)
                    values, norm[:, where] = normalise(values, denominator, offset, eps)
                out[:, where] = unpack(values, n)
                sums.add(kappa, v_chunk[:, piece])
                pieces.append(piece)
            layout.append((at, pieces))
        kv_out, z_out, shift_out = sums.unflatten(n)
        tensors = (key_mask, q, k, v, kv, z, shift, shift_out, out, norm)
        ctx.save_for_backward(*tensors, *parameters)  # so that a changed parameter is noticed
        ctx.settings = features, dtype, layout, eps is not None
        if shift_out is not None:
            ctx.mark_non_differentiable(shift_out)
        ctx.set_materialize_grads(False)
        return out, kv_out, z_out, shift_out

    @staticmethod
    @first_order
    def backward(
        ctx: Any, d_out: Tensor | None, d_kv: Tensor | None, d_z: Tensor | None, _: Any
    ) -> tuple[Any, ...]:
        key_mask, q, k, v, kv, z, shift, shift_out, out, norm, *_ = ctx.saved_tensors
        features, dtype, layout, normalised = ctx.settings
        d_out = torch.zeros_like(out) if d_out is None else d_out
        saved = Saved(features, dtype, key_mask, q, k, v, out, norm, d_out, normalised)
        d_parameters: list[Tensor | None] = [None] * len(features.parameters)
        dq = queries_backward(saved, layout, Sums(kv, z, shift), d_parameters)
        future = Future(d_kv, d_z, shift_out)
        dk, dv = keys_backward(saved, layout, future, d_parameters)
        d_state = (None, None) if kv is None else future.gradient_of_state(kv, shift)
        return None, None, None, None, dq, dk, dv, *d_state, None, *d_parameters
