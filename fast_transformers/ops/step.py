"""The recurrent form: absorb one key and value, look one query up.

Differentiated by autograd; without gradients, maps that have a name are evaluated by
:mod:`.kinds` in a few small operations, which is what generation spends its time on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_state_width, check_widths
from .choose import exporting
from .features import Features, transformed, transforming
from .kinds import KINDS, LOG2E, Kind
from .scaling import SLACK, lowest
from .state import LinearState


def kind_of(features: Features, dtype: torch.dtype, *inputs: Tensor | None) -> Kind | None:
    """What evaluates the map; None for the map's own functions, which autograd differentiates."""
    if features.formula is None or exporting():
        return None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return None
    if transforming() and any(map(transformed, inputs)):
        return None
    return KINDS[features.formula.kind](features.formula, dtype)


def absorb(
    k: Tensor,
    v: Tensor,
    features: Features,
    kind: Kind | None,
    *,
    state: LinearState | None,
    dtype: torch.dtype,
    keep: Tensor | None = None,
    inplace: bool = False,
) -> LinearState:
    """The state after one more key (N, H, E) and value (N, H, M).

    ``keep`` is (N,) bool; where it is False the key and value may hold anything and are not
    absorbed. ``inplace`` writes to the tensors of the state.
    """
    if keep is not None:
        k, v = (x.masked_fill(~keep[:, None, None], 0) for x in (k, v))
    a = _own(features, k, dtype, True) if kind is None else kind.keys(_cast(k, dtype))
    if keep is not None:
        a = a.masked_fill(~keep[:, None, None], -math.inf if features.exponential else 0)
    v = _cast(v, dtype).unsqueeze(-2)
    if state is None:
        shift = a.detach().clamp(min=lowest(dtype)) if features.exponential else None
        kappa = a if shift is None else (a - shift).exp2()
        return LinearState(kappa.unsqueeze(-1) * v, kappa.clone(), shift)
    check_state_width(state.z.shape[-1], a.shape[-1])
    kv, z, shift = state.kv, state.z, state.shift
    if shift is not None:
        shift = _reference(a, shift, eager=kind is not None)
        if shift is not state.shift:
            decay = (state.shift - shift).exp2()
            if inplace:
                kv.mul_(decay.unsqueeze(-1)), z.mul_(decay)
                state.shift.copy_(shift)
            else:
                kv, z = kv * decay.unsqueeze(-1), z * decay
        a = (a - shift).exp2()
    if inplace:
        kv.addcmul_(a.unsqueeze(-1), v)
        z.add_(a)
        return state
    return LinearState(torch.addcmul(kv, a.unsqueeze(-1), v), z + a, shift)


def _reference(a: Tensor, shift: Tensor, eager: bool) -> Tensor:
    """A shift that includes a key; on a CPU the old one, while the key exceeds it by little."""
    a = a.detach()
    if eager and a.device.type == "cpu" and not torch.compiler.is_compiling():
        if float((a - shift).amax()) <= SLACK:
            return shift
    return torch.maximum(shift, a)


def look_up(
    q: Tensor,
    state: LinearState,
    features: Features,
    kind: Kind | None,
    *,
    eps: float,
    seen: bool = False,
) -> Tensor:
    """Attend with one query (N, H*R, E) to everything in a state: (N, H*R, M).

    ``seen`` says that the state is known to include a key.
    """
    n, h, f, m = state.kv.shape
    dtype, g = state.kv.dtype, n * h
    shift = None if state.shift is None else state.shift.view(g, 1, f)
    if kind is None:
        p = _own(features, q, dtype, False)
        check_widths(p.shape[-1], f)
        p = p.reshape(g, -1, f)
        p = p if shift is None else p + shift
    else:
        p = kind.queries(_cast(q, dtype).reshape(g, -1, q.shape[-1]), shift)
        check_widths(p.shape[-1], f)
    positive = kind is not None and kind.positive and (eps > 0 if shift is None else seen)
    if shift is not None:
        offset = p.detach().amax(-1, keepdim=True)
        p = (p - (offset if positive else offset.clamp_(min=lowest(p.dtype)))).exp2()
    numerator = torch.bmm(p, state.kv.view(g, f, m))
    denominator = torch.bmm(p, state.z.view(g, f, 1))
    if shift is None:
        denominator = denominator + eps
    if not positive:
        denominator = denominator.masked_fill(denominator == 0, math.inf)
    return (numerator / denominator).view(n, -1, m)


def _own(features: Features, x: Tensor, dtype: torch.dtype, of_keys: bool) -> Tensor:
    """A user's function of one token, (N, H, E) to (N, H, F); log2 for exponential features."""
    function = features.keys if of_keys else features.queries
    phi = function(features.cast(x, dtype)[:, None])[:, 0].to(dtype)
    return phi * LOG2E if features.exponential else phi


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)
