"""Absorb keys into a state, look queries up in it; differentiated by autograd.

For one token these two are the recurrent form. They are also the pieces that the reference
forms are made of, which hold every feature in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_state_width, check_widths
from .features import Features, evaluate, pack, sum_dtype, unpack
from .scaling import key_factors, normalise, query_factors
from .state import LinearState
from .summed import hide, read_keys


def empty_state(k: Tensor, v: Tensor, a: Tensor, features: Features) -> LinearState:
    """The state before the first key, for features like ``a`` (N*H, C, F)."""
    n, h, f, m = k.shape[0], k.shape[2], a.shape[-1], v.shape[-1]
    shift = a.new_full((n, h, f), torch.finfo(a.dtype).min) if features.exponential else None
    return LinearState(a.new_zeros(n, h, f, m), a.new_zeros(n, h, f), shift)


def absorb(
    k: Tensor,
    v: Tensor,
    features: Features,
    *,
    key_mask: Tensor | None = None,
    state: LinearState | None = None,
) -> LinearState:
    """Add keys (N, C, H, E) and values (N, C, H, M) to a state; a new state is returned."""
    dtype = sum_dtype(k, v) if state is None else state.kv.dtype
    k, v, masked = read_keys(k, v, key_mask, slice(None))
    a = hide(evaluate(features.keys, k, features, dtype), masked, features)
    state = empty_state(k, v, a, features) if state is None else state
    check_state_width(state.z.shape[-1], a.shape[-1])
    if not k.shape[1]:
        return state
    kv, z, shift = _flat(state)
    kappa, shift, decay = key_factors(a, shift)
    if decay is not None:
        kv, z = kv * decay[..., None], z * decay
    if k.shape[1] == 1:  # generation: an outer product is no work for a matrix product
        kv, z = torch.addcmul(kv, kappa.mT, pack(v, dtype)), z + kappa[:, 0]
    else:
        kv, z = torch.baddbmm(kv, kappa.mT, pack(v, dtype)), z + kappa.sum(1)
    shift = None if shift is None else shift.view_as(state.z)
    return LinearState(kv.view_as(state.kv), z.view_as(state.z), shift)


def look_up(q: Tensor, state: LinearState, features: Features, *, eps: float) -> Tensor:
    """Attend with queries (N, C, H, E) to everything in a state: (N, C, H, M)."""
    b = evaluate(features.queries, q, features, state.kv.dtype)
    check_widths(b.shape[-1], state.z.shape[-1])
    kv, z, shift = _flat(state)
    p, offset = query_factors(b, shift)
    denominator = (p * z[:, None]).sum(-1, keepdim=True)
    values, _ = normalise(p @ kv, denominator, offset, eps)
    return unpack(values, q.shape[0])


def _flat(state: LinearState) -> tuple[Tensor, Tensor, Tensor | None]:
    flat = state.map(lambda tensor: tensor.flatten(0, 1))
    return flat.kv, flat.z, flat.shift
