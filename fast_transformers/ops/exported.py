"""The equations as one graph of ordinary operations, for ``torch.export`` and ONNX.

A program that leaves this library must not call its operators, must not loop over a length that
is known only when it runs, and must not look at values to decide what to do. So the sequence is
cut into chunks whose number is part of the graph:

* Sums of features that are no exponentials are a cumulative sum over the chunks.
* Exponential features (see :mod:`.scaling`) have a shift that rises from chunk to chunk, which no
  cumulative sum can follow without loss; they are scanned, and inside a chunk every pair of
  tokens is exponentiated by itself. That is exact at any norm, and why their chunks are short.

Memory is linear in the length. Anything but an exporter is served better by the other forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_state_width, check_widths
from .choose import exporting
from .features import Features, sum_dtype
from .formula import LOG2E
from .scaling import lowest
from .state import LinearState
from .sums import Triple, empty_sums

CHUNK = 64
EXPONENTIAL_CHUNK = 16  # each query of a chunk costs as many exponentials per feature


def attention(
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
    """Values (N, L, H*R, M) and the state after the keys; arguments are those of :mod:`.api`."""
    form = _causal if causal else _full
    return form(q, k, v, features, key_mask, state, eps)


def _full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features,
    key_mask: Tensor | None,
    state: LinearState | None,
    eps: float,
) -> tuple[Tensor, LinearState]:
    dtype = sum_dtype(q, k, v)
    a, values = _keys(k, v, features, key_mask, dtype)
    b = _encode(features.queries, q, features, dtype)
    a, values, b = (x.transpose(1, 2) for x in (a, values, b))  # (N, H, length, dim)
    kv, z, shift = _add(_past(state, v, a, b, features), a, values)
    groups = q.shape[2] // k.shape[2]
    p = b.unflatten(1, (-1, groups)).flatten(2, 3)  # (N, H, R*L, F)
    if shift is not None:
        p = p + shift[..., None, :]
        p = _exp2(p - p.detach().amax(-1, keepdim=True).clamp(min=lowest(dtype)))
    denominator = p @ z[..., None]
    out = _divide(p @ kv, denominator if shift is not None else denominator + eps)
    out = out.unflatten(2, (groups, q.shape[1])).flatten(1, 2).transpose(1, 2)
    return out, LinearState(kv, z, shift)


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features,
    key_mask: Tensor | None,
    state: LinearState | None,
    eps: float,
) -> tuple[Tensor, LinearState]:
    dtype = sum_dtype(q, k, v)
    n, length, heads = q.shape[:3]
    groups = heads // k.shape[2]
    c = EXPONENTIAL_CHUNK if features.exponential else CHUNK
    # one more chunk than needed: a graph must not depend on whether there is one chunk or several
    chunks = (length + c - 1) // c + 1

    def pad(x: Tensor) -> Tensor:
        filled = torch.cat([x, x.new_zeros(n, chunks * c, *x.shape[2:])], 1)
        return filled[:, : chunks * c]

    def pack(x: Tensor) -> Tensor:
        """(N, chunks*c, H*R, D) to (chunks, N, H, R*c, D): queries of one key head together."""
        x = x.reshape(n, chunks, c, k.shape[2], x.shape[2] // k.shape[2], x.shape[3])
        return x.permute(1, 0, 3, 4, 2, 5).flatten(3, 4)

    real = k.new_ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
    within = torch.arange(chunks * c, device=q.device) < length
    a, values = _keys(pad(k), pad(v), features, pad(real) & within, dtype)
    b = _encode(features.queries, pad(q), features, dtype)
    past = _past(state, v, a, b, features)
    b, a, values = pack(b), pack(a), pack(values)
    unseen = torch.ones(c, c, dtype=torch.bool, device=q.device).triu(1)
    unseen = unseen.repeat(groups, 1)  # (R*c, c)
    form = _scanned if features.exponential else _cumulated
    out, final = form(b, a, values, unseen, past, eps)
    out = out.unflatten(3, (groups, c)).permute(1, 0, 4, 2, 3, 5)  # (N, chunks, c, H, R, M)
    return out.reshape(n, chunks * c, heads, -1)[:, :length], LinearState(*final)


def _cumulated(
    p: Tensor, kappa: Tensor, values: Tensor, unseen: Tensor, past: Triple, eps: float
) -> tuple[Tensor, Triple]:
    """Causal attention of packed features that are no exponentials."""
    kv = torch.cat([past[0][None], kappa.mT @ values]).cumsum(0)  # before each chunk, and after
    z = torch.cat([past[1][None], kappa.sum(-2)]).cumsum(0)
    weights = (p @ kappa.mT).masked_fill(unseen, 0.0)
    denominator = weights.sum(-1, keepdim=True) + p @ z[:-1, ..., None] + eps
    return _divide(weights @ values + p @ kv[:-1], denominator), (kv[-1], z[-1], None)


def _scanned(
    b: Tensor, a: Tensor, values: Tensor, unseen: Tensor, past: Triple, eps: float
) -> tuple[Tensor, Triple]:
    """Causal attention of packed base-2 logarithms of features; it needs no ``eps``."""

    def step(carry: list[Tensor], chunk: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        (kv, z, shift), (b, a, values) = carry, chunk
        logits = b[..., :, None, :] + a[..., None, :, :]  # (N, H, R*c, c, F)
        logits = logits.masked_fill(unseen[..., None], -math.inf)
        p = b + shift[..., None, :]
        offset = torch.maximum(logits.detach().amax((-1, -2)), p.detach().amax(-1))
        offset = offset.clamp(min=lowest(b.dtype))[..., None]
        weights, p = _exp2(logits - offset[..., None]).sum(-1), _exp2(p - offset)
        denominator = weights.sum(-1, keepdim=True) + p @ z[..., None]
        out = _divide(weights @ values + p @ kv, denominator)
        return list(_add((kv, z, shift), a, values)), [out]  # pyright: ignore[reportReturnType]

    carry, (out,) = _scan(step, list(past), [b, a, values])  # pyright: ignore[reportArgumentType]
    return out, tuple(carry)  # pyright: ignore[reportReturnType]


def _scan(
    step: Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]],
    carry: list[Tensor],
    chunks: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Carry sums through ``step``, chunk by chunk; the last sums and the stacked results."""
    if not exporting():
        results = []
        for i in range(len(chunks[0])):
            carry, (out,) = step(carry, [x[i] for x in chunks])
            results.append(out)
        return carry, [torch.stack(results)]
    from torch._higher_order_ops.scan import scan

    # detached: torch 2.13 cannot trace the gradient of a scan whose batch size is not fixed
    return scan(step, [x.detach() for x in carry], [x.detach() for x in chunks])


def _encode(
    function: Callable[[Tensor], Tensor], x: Tensor, features: Features, dtype: torch.dtype
) -> Tensor:
    """(N, length, H, E) to (N, length, H, F); base-2 logarithms of exponential features."""
    phi = function(features.cast(x, dtype)).to(dtype)
    return phi * LOG2E if features.exponential else phi


def _keys(
    k: Tensor, v: Tensor, features: Features, keep: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Features of keys, and values; what is masked may hold anything and counts as nothing."""
    if keep is None:
        return _encode(features.keys, k, features, dtype), v.to(dtype)
    drop = ~keep[:, :, None, None]
    a = _encode(features.keys, k.masked_fill(drop, 0.0), features, dtype)
    nothing = -math.inf if features.exponential else 0.0
    return a.masked_fill(drop, nothing), v.masked_fill(drop, 0.0).to(dtype)


def _past(
    state: LinearState | None, v: Tensor, a: Tensor, b: Tensor, features: Features
) -> Triple:
    check_widths(b.shape[-1], a.shape[-1])
    if state is None:
        return empty_sums(v, a.shape[-1], features.exponential, a.dtype)
    check_state_width(state.z.shape[-1], a.shape[-1])
    return state.kv, state.z, state.shift


def _add(past: Triple, a: Tensor, values: Tensor) -> Triple:
    """Sums with the keys (N, H, S, F) and values (N, H, S, M) added to them."""
    kv, z, shift = past
    if shift is None:
        return kv + a.mT @ values, z + a.sum(-2), None
    new = torch.maximum(shift, a.detach().amax(-2))
    kappa, decay = _exp2(a - new[..., None, :]), _exp2(shift - new)
    return kv * decay[..., None] + kappa.mT @ values, z * decay + kappa.sum(-2), new


def _exp2(x: Tensor) -> Tensor:
    """2^x by way of exp, which run-times of exported graphs have a fast form of."""
    return (x * (1 / LOG2E)).exp()


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Where 0/0 is 0."""
    return numerator / denominator.masked_fill(denominator == 0, math.inf)
