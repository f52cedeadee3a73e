"""The specification: attention with the whole matrix of weights, and token by token.

Both are differentiated by autograd as often as one likes, run anywhere and answer for every
faster form. They evaluate the map's own functions and hold every feature in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_state_width, check_widths
from .features import Features, sum_dtype
from .formula import LOG2E
from .scaling import lowest
from .state import LinearState
from .step import absorb, encode, kind_of, look_up
from .sums import empty_sums


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features,
    *,
    causal: bool,
    key_mask: Tensor | None,
    state: LinearState | None,
    eps: float,
) -> tuple[Tensor, LinearState]:
    """out = W v / rowsum(W), W_ij = phi(q_i).phi(k_j), with W as an L x S matrix.

    The sums in ``state`` count as F more keys. Logits of exponential features are reduced over
    the features by logsumexp, (N, H, L, S, F) in size: exact at any norm, and slow.
    """
    dtype = sum_dtype(q, k, v)
    groups = q.shape[2] // max(k.shape[2], 1)
    if key_mask is not None:  # masked keys and values may hold anything
        k, v = (x.masked_fill(~key_mask[:, :, None, None], 0) for x in (k, v))
    b = _encode(features.queries, q, features, dtype)  # (N, H*R, L, F)
    a = _encode(features.keys, k, features, dtype)  # (N, H, S, F)
    values = v.transpose(1, 2).to(dtype)
    check_widths(b.shape[-1], a.shape[-1])
    past = state or LinearState(*empty_sums(v, a.shape[-1], features.exponential, dtype))
    check_state_width(past.z.shape[-1], a.shape[-1])
    reach = min(k.shape[1], q.shape[1]) if causal else k.shape[1]
    kept = None if key_mask is None else key_mask[:, None, :reach, None]
    final = _add(past, a[:, :, :reach], values[:, :, :reach], kept)
    a, values, kv, z = (_repeat(x, groups) for x in (a, values, past.kv, past.z))
    unseen = torch.ones(b.shape[2], a.shape[2], dtype=torch.bool, device=q.device)
    unseen = unseen.triu(1) if causal else torch.zeros_like(unseen)
    if key_mask is not None:
        unseen = unseen | ~key_mask[:, None, None]
    if features.exponential:
        assert past.shift is not None
        weights = (b[..., None, :] + a[..., None, :, :]).logsumexp(-1)  # (N, H*R, L, S)
        weights = weights.masked_fill(unseen, -math.inf)
        p = b + (_repeat(past.shift, groups) / LOG2E)[..., None, :]
        offset = torch.cat([weights, p], -1).detach().amax(-1, keepdim=True)
        offset = offset.clamp(min=lowest(dtype))
        weights, p = (weights - offset).exp(), (p - offset).exp()
        eps = 0.0
    else:
        weights, p = (b @ a.mT).masked_fill(unseen, 0.0), b
    denominator = weights.sum(-1) + (p * z[..., None, :]).sum(-1) + eps
    denominator = denominator.masked_fill(denominator == 0, math.inf)
    out = (weights @ values + p @ kv) / denominator[..., None]
    return out.transpose(1, 2), final


def _encode(
    function: Callable[[Tensor], Tensor], x: Tensor, features: Features, dtype: torch.dtype
) -> Tensor:
    return function(features.cast(x, dtype)).transpose(1, 2).to(dtype)


def _repeat(x: Tensor, groups: int) -> Tensor:
    """Every key head once for each of the query heads that share it."""
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _add(past: LinearState, a: Tensor, values: Tensor, kept: Tensor | None) -> LinearState:
    """The state after keys (N, H, S, F), in natural logarithms if exponential."""
    if kept is not None:
        a = a.masked_fill(~kept, -math.inf if past.shift is not None else 0.0)
    if past.shift is None:
        return LinearState(past.kv + a.mT @ values, past.z + a.sum(2))
    if not a.shape[2]:
        return past
    shift = torch.maximum(past.shift, a.detach().amax(2) * LOG2E)
    kappa = (a - (shift / LOG2E)[:, :, None]).exp()
    decay = (past.shift - shift).exp2()
    kv, z = past.kv * decay[..., None] + kappa.mT @ values, past.z * decay + kappa.sum(2)
    return LinearState(kv, z, shift)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features,
    *,
    causal: bool,
    key_mask: Tensor | None,
    state: LinearState | None,
    eps: float,
) -> tuple[Tensor, LinearState]:
    """One token after the other, through the functions that a generating model uses."""
    dtype = sum_dtype(q, k, v)
    if state is None:
        width = _encode(features.keys, k[:, :0], features, dtype).shape[-1]
        state = LinearState(*empty_sums(v, width, features.exponential, dtype))
    kind = kind_of(features, dtype, q, k, v, state.kv, state.z)
    out = [q.new_zeros(*q.shape[:1], 0, q.shape[2], v.shape[-1], dtype=dtype)]

    def see(j: int) -> LinearState:
        if key_mask is None:
            a = encode(k[:, j], features, kind, dtype, of_keys=True)
            return absorb(a, v[:, j], features, kind, state=state)
        drop = ~key_mask[:, j, None, None]  # what may hold anything, and is not absorbed
        key, value = (x[:, j].masked_fill(drop, 0) for x in (k, v))
        a = encode(key, features, kind, dtype, of_keys=True)
        a = a.masked_fill(drop, -math.inf if features.exponential else 0)
        return absorb(a, value, features, kind, state=state)

    if not causal:
        for j in range(k.shape[1]):
            state = see(j)
    for i in range(q.shape[1]):
        if causal and i < k.shape[1]:
            state = see(i)
        b = encode(q[:, i], features, kind, dtype, of_keys=False)
        out.append(look_up(b, state, kind, eps=eps)[:, None])
    return torch.cat(out, 1), state
