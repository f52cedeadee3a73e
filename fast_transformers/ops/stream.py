"""The chunked form on whole tensors: what :mod:`.api` calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .autograd import USE_REFERENCE, Accumulate, Attend, Causal, run
from .call import Settings
from .features import Features, transformed, transforming
from .formula import Formula
from .state import LinearState


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
    chunk_size: int | None,
) -> tuple[Tensor, LinearState]:
    """Values (N, L, H*R, M) in the dtype of the sums; arguments are those of :mod:`.api`."""
    if not causal:
        final = accumulate(k, v, features, key_mask=key_mask, state=state, chunk_size=chunk_size)
        return attend(q, final, features, eps=eps, chunk_size=chunk_size), final
    both = min(q.shape[1], k.shape[1])
    mask = None if key_mask is None else key_mask[:, :both]
    values, final = prefix_attention(
        q[:, :both], k[:, :both], v[:, :both], features,
        key_mask=mask, state=state, eps=eps, chunk_size=chunk_size,
    )  # fmt: skip
    if both < q.shape[1]:
        rest = attend(q[:, both:], final, features, eps=eps, chunk_size=chunk_size)
        values = torch.cat([values, rest], 1)
    return values, final


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features,
    *,
    key_mask: Tensor | None,
    state: LinearState | None,
    eps: float,
    chunk_size: int | None,
    normalised: bool = True,
) -> tuple[Tensor, LinearState]:
    """Queries, keys and values of one length L: values (N, L, H*R, M) in the dtype of the sums.

    Without ``normalised`` the values are not divided by the sum of their weights; that has a
    meaning only for features that are not exponentials.
    """
    if _must_be_seen(features):
        q, k = (
            encode(features.queries, q, features),
            encode(features.keys, k, features, key_mask),
        )
        features = given(features)
    _refuse_hidden(features, q)
    tensors = (key_mask, q, k, v, *sums_of(state))
    settings = settings_of(
        features, tensors, chunk=chunk_size or 0, eps=eps, normalised=normalised
    )
    out, *final = _run(Causal, settings, features, tensors)
    return out, state_of(features, *final[:3])


def accumulate(
    k: Tensor,
    v: Tensor,
    features: Features,
    *,
    key_mask: Tensor | None,
    state: LinearState | None,
    chunk_size: int | None,
) -> LinearState:
    """Add keys (N, S, H, E) and values (N, S, H, M) to a state."""
    if _must_be_seen(features):
        k, features = encode(features.keys, k, features, key_mask), given(features)
    _refuse_hidden(features, k)
    tensors = (key_mask, k, v, *sums_of(state))
    settings = settings_of(features, tensors, chunk=chunk_size or 0)
    final = _run(Accumulate, settings, features, tensors)
    return state_of(features, *final)


def attend(
    q: Tensor, state: LinearState, features: Features, *, eps: float, chunk_size: int | None
) -> Tensor:
    """Look queries (N, L, H*R, E) up in a state: (N, L, H*R, M), in the dtype of the sums."""
    if _must_be_seen(features):
        q, features = encode(features.queries, q, features), given(features)
    _refuse_hidden(features, q)
    tensors = (q, *sums_of(state))
    settings = settings_of(features, tensors, chunk=chunk_size or 0, eps=eps)
    return _run(Attend, settings, features, tensors)[0]


def _must_be_seen(features: Features) -> bool:
    """Whether a compiler has to see a user's functions, which no operator can call."""
    return features.formula is None and torch.compiler.is_compiling()


def encode(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    features: Features,
    mask: Tensor | None = None,
) -> Tensor:
    """Features of the whole sequence, for the compiler to fuse with what comes before them."""
    if mask is not None:
        x = x.masked_fill(~mask[:, :, None, None], 0)
    lowest = torch.float32 if features.dtype is None else features.dtype
    return function(x.to(torch.promote_types(x.dtype, lowest)))


def _refuse_hidden(features: Features, x: Tensor) -> None:
    """torch.func cannot see through a pass to the tensors that a user's functions look at."""
    if features.formula is not None or not transforming():
        return
    token = torch.zeros(1, 1, *x.shape[2:], dtype=torch.promote_types(x.dtype, torch.float32))
    token = token.to(x.device, features.dtype or token.dtype)
    if any(transformed(function(token)) for function in (features.queries, features.keys)):
        raise NotImplementedError(
            "torch.func or forward-mode derivatives of a feature map's own weights; "
            + USE_REFERENCE
        )


def given(features: Features) -> Features:
    kind = "logarithm" if features.exponential else "identity"
    return Features(exponential=features.exponential, any_heads=True, formula=Formula(kind))


def settings_of(
    features: Features, tensors: tuple[Tensor | None, ...], **options: Any
) -> Settings:
    formula = features.formula or Formula("")
    inputs = (*tensors, *features.parameters, formula.projection)
    keep = torch.is_grad_enabled() and any(
        x is not None and (x.requires_grad or transformed(x)) for x in inputs
    )
    return Settings(formula.kind, formula.numbers, **options, keep=keep)


def _run(
    function: type[Function],
    settings: Settings,
    features: Features,
    tensors: tuple[Tensor | None, ...],
) -> Any:
    formula = features.formula
    named = (settings, features, None) if formula is None else (settings, None, formula.projection)
    return run(function, settings.keep, *named, *tensors, *features.parameters)


def sums_of(state: LinearState | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if state is None else (state.kv, state.z, state.shift)


def state_of(features: Features, kv: Tensor, z: Tensor, shift: Tensor) -> LinearState:
    return LinearState(kv, z, shift if features.exponential else None)
