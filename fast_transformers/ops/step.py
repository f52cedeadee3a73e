"""The recurrent form: absorb one key and value, look one query up.

Differentiated by autograd; without gradients, maps that have a name are evaluated by
:mod:`.kinds` in a few small operations, which is what generation spends its time on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_state_width, check_widths
from .features import Features
from .kinds import KINDS, LOG2E
from .scaling import lowest
from .state import LinearState


def encode_one(
    function: Callable[[Tensor], Tensor], x: Tensor, features: Features, dtype: torch.dtype
) -> Tensor:
    """A user's function of one token, (N, H, E) to (N, H, F); log2 for exponential features."""
    x = x.to(torch.promote_types(x.dtype, features.dtype) if features.dtype else dtype)
    phi = function(x[:, None])[:, 0].to(dtype)
    return phi * LOG2E if features.exponential else phi


def _encode(x: Tensor, features: Features, dtype: torch.dtype, of_keys: bool) -> Tensor:
    if features.formula is None or (torch.is_grad_enabled() and x.requires_grad):
        return encode_one(features.keys if of_keys else features.queries, x, features, dtype)
    kind = KINDS[features.formula.kind](features.formula, dtype)
    return kind.keys(x.to(dtype)) if of_keys else kind.queries(x.to(dtype))


def absorb(
    k: Tensor,
    v: Tensor,
    features: Features,
    *,
    keep: Tensor | None = None,
    state: LinearState | None,
    dtype: torch.dtype,
) -> LinearState:
    """The state after one more key (N, H, E) and value (N, H, M).

    ``keep`` is (N,) bool; where it is False the key and value may hold anything and are not
    absorbed.
    """
    if keep is not None:
        k, v = (x.masked_fill(~keep[:, None, None], 0) for x in (k, v))
    a = _encode(k, features, dtype, of_keys=True)
    if keep is not None:
        a = a.masked_fill(~keep[:, None, None], -math.inf if features.exponential else 0)
    v = v.to(dtype)[..., None, :]
    if state is None:
        shift = a.detach().clamp(min=lowest(dtype)) if features.exponential else None
        kappa = a if shift is None else (a - shift).exp2()
        return LinearState(kappa[..., None] * v, kappa.clone(), shift)
    check_state_width(state.z.shape[-1], a.shape[-1])
    if state.shift is None:
        return LinearState(torch.addcmul(state.kv, a[..., None], v), state.z + a)
    shift = torch.maximum(state.shift, a.detach())
    kappa, decay = (a - shift).exp2(), (state.shift - shift).exp2()
    kv = torch.addcmul(state.kv * decay[..., None], kappa[..., None], v)
    return LinearState(kv, torch.addcmul(kappa, state.z, decay), shift)


def look_up(q: Tensor, state: LinearState, features: Features, *, eps: float) -> Tensor:
    """Attend with one query (N, H*R, E) to everything in a state: (N, H*R, M)."""
    b = _encode(q, features, state.kv.dtype, of_keys=False)
    n, h, f, m = state.kv.shape
    check_widths(b.shape[-1], f)
    p = b.reshape(n * h, -1, f)
    if state.shift is not None:
        p = p + state.shift.view(n * h, 1, f)
        p = (p - p.detach().amax(-1, keepdim=True).clamp_(min=lowest(p.dtype))).exp2()
    numerator = torch.bmm(p, state.kv.view(n * h, f, m))
    denominator = torch.bmm(p, state.z.view(n * h, f, 1))
    if state.shift is None:
        denominator = denominator + eps
    values = numerator / denominator.masked_fill(denominator == 0, math.inf)
    return values.view(n, -1, m)
