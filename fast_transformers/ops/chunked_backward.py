"""The two sweeps of the causal backward pass; the equations are in :mod:`.chunked`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .features import Differentiated, Features, evaluate, pack, unpack
from .scaling import lowest
from .summed import Sums, hide, read_keys

Layout = list[tuple[slice, list[slice]]]  # of each chunk, the pieces it was worked in


class Saved(NamedTuple):
    """What the forward pass kept, and the gradient of its values."""

    features: Features
    dtype: torch.dtype
    key_mask: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    norm: Tensor  # (G, L, 1), see scaling.normalise
    d_out: Tensor
    normalised: bool

    def outputs(self, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        """d_out, delta = d_out.out and norm of a chunk, (G, C, M | 1 | 1)."""
        do = pack(self.d_out[:, at], self.dtype)
        delta = (do * pack(self.out[:, at], self.dtype)).sum(-1, keepdim=True)
        if not self.normalised:
            delta.zero_()
        return do, delta, self.norm[:, at]


def queries_backward(
    saved: Saved, layout: Layout, sums: Sums, d_parameters: list[Tensor | None]
) -> Tensor:
    """Sweep forward, rebuilding the sums of the past from ``sums``: gradient of the queries."""
    features, dtype = saved.features, saved.dtype
    dq = torch.empty_like(saved.q)
    for at, pieces in layout:
        k_chunk, v_chunk, masked = read_keys(saved.k, saved.v, saved.key_mask, at)
        a = hide(evaluate(features.keys, k_chunk, features, dtype), masked, features)
        v = pack(v_chunk, dtype)
        queries = Differentiated(features.queries, saved.q[:, at], features, dtype, not at.start)
        do, delta, norm = saved.outputs(at)
        sums.allocate(a, v.shape[-1], features.exponential)
        db = torch.empty_like(queries.value)
        for i in pieces:
            kappa = sums.factors(a[:, i])
            pairs = (do[:, i] @ v[:, i].mT).sub_(delta[:, i]).tril_()
            g = torch.baddbmm(do[:, i] @ sums.kv.mT, pairs, kappa)
            g -= delta[:, i] * sums.z[:, None]
            if sums.shift is None:
                db[:, i] = g * norm[:, i]
            else:
                db[:, i] = g * (queries.value[:, i] - norm[:, i] + sums.shift[:, None]).exp_()
            sums.add(kappa, v[:, i])
        dq[:, at] = queries.pull_back(db, d_parameters)
    return dq


def keys_backward(
    saved: Saved, layout: Layout, future: Future, d_parameters: list[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Sweep in reverse, building the sums of the future: gradients of keys and values."""
    features, dtype = saved.features, saved.dtype
    dk, dv = torch.empty_like(saved.k), torch.empty_like(saved.v)
    for at, pieces in reversed(layout):
        k_chunk, v_chunk, masked = read_keys(saved.k, saved.v, saved.key_mask, at)
        keys = Differentiated(features.keys, k_chunk, features, dtype, not at.start)
        a = hide(keys.value, masked, features)
        b = evaluate(features.queries, saved.q[:, at], features, dtype)
        v = pack(v_chunk, dtype)
        do, delta, norm = saved.outputs(at)
        future.allocate(a, v.shape[-1], features.exponential)
        da, dv_chunk = torch.empty_like(a), torch.empty_like(v)
        for i in reversed(pieces):
            p, kappa = future.factors(b[:, i], norm[:, i], a[:, i])
            pairs = (do[:, i] @ v[:, i].mT).sub_(delta[:, i]).tril_()
            g = torch.baddbmm(v[:, i] @ future.kv.mT, pairs.mT, p).sub_(future.z[:, None])
            da[:, i] = g * kappa if features.exponential else g
            weights = (p @ kappa.mT).tril_()
            dv_chunk[:, i] = torch.baddbmm(kappa @ future.kv, weights.mT, do[:, i])
            future.add(p, do[:, i], delta[:, i])
        if masked is not None and not features.exponential:
            da.masked_fill_(masked, 0.0)
        dk[:, at] = keys.pull_back(da, d_parameters)
        dv[:, at] = unpack(dv_chunk, saved.v.shape[0])
    return dk, dv


class Future:
    """R = sum_t P_t do_t^T and r = sum_t P_t delta_t over the queries after a key.

    For exponential features P_t = exp(b_t - L_t), L_t the log-normaliser, is kept relative to
    its running maximum ``top``; a later query has seen the key, so b_ti + a_ji <= L_t and the
    key's factor exp(a_ji + top_i) is at most 1. The gradient of the final state starts the sums.
    """

    kv: Any
    z: Any
    top: Tensor | None

    def __init__(self, d_kv: Tensor | None, d_z: Tensor | None, shift_out: Tensor | None) -> None:
        self._start = d_kv, d_z, shift_out
        self.kv = self.z = self.top = None

    def allocate(self, a: Tensor, values: int, exponential: bool) -> None:
        if self.kv is not None:
            return
        d_kv, d_z, shift_out = self._start
        g, _, f = a.shape
        zeros = a.new_zeros
        self.kv = zeros(g, f, values) if d_kv is None else d_kv.flatten(0, 1).clone()
        self.z = zeros(g, f) if d_z is None else -d_z.flatten(0, 1)
        if exponential:
            reached = d_kv is not None or d_z is not None
            self.top = -shift_out.flatten(0, 1) if reached else a.new_full((g, f), lowest(a.dtype))

    def factors(self, b: Tensor, norm: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised query factors and key factors; the sums follow the new maximum."""
        if self.top is None:
            return b * norm, a
        b = b - norm
        top = torch.maximum(self.top, b.amax(1))
        decay = (self.top - top).exp_()
        self.kv *= decay[..., None]
        self.z *= decay
        self.top = top
        return (b - top[:, None]).exp_(), (a + top[:, None]).exp_()

    def add(self, p: Tensor, do: Tensor, delta: Tensor) -> None:
        self.kv.baddbmm_(p.mT, do)
        self.z += (p * delta).sum(1)

    def gradient_of_state(self, kv: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of the initial kv and z, which are relative to ``shift``."""
        d_kv, d_z = self.kv, -self.z
        if shift is not None and self.top is not None:
            scale = (shift.flatten(0, 1) + self.top).exp_()
            d_kv, d_z = d_kv * scale[..., None], d_z * scale
        return d_kv.view_as(kv), d_z.view(kv.shape[:-1])
