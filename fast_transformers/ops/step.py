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
from .formula import LOG2E, Kind
from .kinds import KINDS
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


def encode(
    x: Tensor, features: Features, kind: Kind | None, dtype: torch.dtype, *, of_keys: bool
) -> Tensor:
    """Features of one token, (N, H, E) to (N, H, F); log2 of those that are exponentials."""
    if kind is not None:
        x = _cast(x, dtype)
        return kind.keys(x) if of_keys else kind.queries(x)
    function = features.keys if of_keys else features.queries
    phi = function(features.cast(x, dtype)[:, None])[:, 0].to(dtype).contiguous()
    return phi * LOG2E if features.exponential else phi


def encode_both(
    q: Tensor, k: Tensor, features: Features, kind: Kind | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same of a query and a key, together if the map has a name."""
    if kind is not None and q.shape == k.shape:
        return kind.both(_cast(q, dtype), _cast(k, dtype))
    return (
        encode(q, features, kind, dtype, of_keys=False),
        encode(k, features, kind, dtype, of_keys=True),
    )


def absorb(
    a: Tensor,
    v: Tensor,
    features: Features,
    kind: Kind | None,
    *,
    state: LinearState | None,
    inplace: bool = False,
) -> LinearState:
    """The state after one more key with the features (N, H, F), and its value (N, H, M).

    ``inplace`` writes to the tensors of the state.
    """
    v = _cast(v, a.dtype).unsqueeze(-2)
    if state is None:
        shift = a.detach().clamp(min=lowest(a.dtype)) if features.exponential else None
        kappa = a if shift is None else (a - shift).exp2()
        return LinearState(kappa.unsqueeze(-1) * v, kappa.clone(), shift)
    check_state_width(state.z.shape[-1], a.shape[-1])
    kv, z, shift = state.kv, state.z, state.shift
    if shift is not None:
        excess = a - shift
        if kind is None or not _slight(excess):
            shift = torch.maximum(shift, a.detach())
            decay, excess = (state.shift - shift).exp2(), a - shift
            if inplace:
                kv.mul_(decay.unsqueeze(-1)), z.mul_(decay)
                state.shift.copy_(shift)
            else:
                kv, z = kv * decay.unsqueeze(-1), z * decay
        a = excess.exp2_()
    if inplace:
        kv.addcmul_(a.unsqueeze(-1), v)
        z.add_(a)
        return state
    return LinearState(torch.addcmul(kv, a.unsqueeze(-1), v), z + a, shift)


def _slight(excess: Tensor) -> bool:
    """Whether a key exceeds the shift by so little that the shift may stay; asked on a CPU."""
    if excess.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return float(excess.max()) <= SLACK


def look_up(
    b: Tensor, state: LinearState, kind: Kind | None, *, eps: float, seen: bool = False
) -> Tensor:
    """Attend with the features (N, H*R, F) of one query to all of a state: (N, H*R, M).

    ``seen`` says that the state is known to include a key.
    """
    n, h, f, m = state.kv.shape
    g = n * h
    check_widths(b.shape[-1], f)
    p = b.reshape(g, -1, f)
    positive = kind is not None and kind.positive and (eps > 0 if state.shift is None else seen)
    if state.shift is not None:
        p = p + state.shift.reshape(g, 1, f)
        offset = p.detach().amax(-1, keepdim=True)
        p.sub_(offset if positive else offset.clamp_(min=lowest(p.dtype))).exp2_()
    numerator = torch.bmm(p, state.kv.reshape(g, f, m))
    denominator = torch.bmm(p, state.z.reshape(g, f, 1))
    if state.shift is None:
        denominator = denominator + eps
    if not positive:
        denominator = denominator.masked_fill(denominator == 0, math.inf)
    return (numerator / denominator).view(n, -1, m)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)
