"""The specification: attention with the whole matrix of weights, and token by token.

Both are differentiated by autograd, run anywhere and answer for every faster form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_state_width, check_widths
from .features import Features, evaluate, pack, sum_dtype, unpack
from .scaling import lowest, normalise
from .state import LinearState
from .step import absorb, empty_state, look_up
from .summed import read_keys


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
    the features by logsumexp, (N*H, L, S, F) in size: exact at any norm, and slow.
    """
    dtype = sum_dtype(q, k, v)
    b = evaluate(features.queries, q, features, dtype)  # (G, L, F)
    kept, values, masked = read_keys(k, v, key_mask, slice(None))
    a = evaluate(features.keys, kept, features, dtype)  # (G, S, F)
    past = empty_state(k, v, a, features) if state is None else state
    check_state_width(past.z.shape[-1], a.shape[-1])
    check_widths(b.shape[-1], a.shape[-1])
    unseen = torch.ones(b.shape[1], a.shape[1], dtype=torch.bool, device=q.device)
    unseen = unseen.triu(1) if causal else torch.zeros_like(unseen)
    unseen = unseen if masked is None else unseen | masked.mT
    if features.exponential:
        weights = (b[:, :, None] + a[:, None]).logsumexp(-1)  # (G, L, S)
        weights = weights.masked_fill(unseen, -math.inf)
        p = b + past.shift.flatten(0, 1)[:, None]
        offset = torch.cat([weights, p], -1).detach().amax(-1, keepdim=True)
        offset = offset.clamp(min=lowest(dtype))
        weights, p = (weights - offset).exp(), (p - offset).exp()
    else:
        weights, p, offset = (b @ a.mT).masked_fill(unseen, 0.0), b, None
    denominator = weights.sum(-1) + (p * past.z.flatten(0, 1)[:, None]).sum(-1)
    numerator = weights @ pack(values, dtype) + p @ past.kv.flatten(0, 1)
    out, _ = normalise(numerator, denominator[..., None], offset, eps)
    reach = slice(min(k.shape[1], q.shape[1]) if causal else None)
    mask = None if key_mask is None else key_mask[:, reach]
    return unpack(out, q.shape[0]), absorb(
        k[:, reach], v[:, reach], features, key_mask=mask, state=past
    )


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
    state = absorb(k[:, :0], v[:, :0], features, state=state)
    out = [q.new_zeros(*q.shape[:1], 0, q.shape[2], v.shape[-1], dtype=state.kv.dtype)]

    def see(j: int) -> LinearState:
        at = slice(j, j + 1)
        mask = None if key_mask is None else key_mask[:, at]
        return absorb(k[:, at], v[:, at], features, key_mask=mask, state=state)

    if not causal:
        for j in range(k.shape[1]):
            state = see(j)
    for i in range(q.shape[1]):
        if causal and i < k.shape[1]:
            state = see(i)
        out.append(look_up(q[:, i : i + 1], state, features, eps=eps))
    return torch.cat(out, 1), state
