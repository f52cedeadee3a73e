"""The chunked form on whole tensors: what :mod:`.api` calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import Accumulate, Attend, Causal
from .call import Settings
from .features import Features
from .kinds import Formula
from .state import LinearState


def causal(
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
    sums = _sums(state)
    tensors = (key_mask, q, k, v, *sums)
    settings = _settings(features, tensors, chunk=chunk_size or 0, eps=eps, normalised=normalised)
    out, *final = Causal.apply(*_map(settings, features), *tensors, *features.parameters)
    return out, _state(features, *final[:3])


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
    tensors = (key_mask, k, v, *_sums(state))
    settings = _settings(features, tensors, chunk=chunk_size or 0)
    final = Accumulate.apply(*_map(settings, features), *tensors, *features.parameters)
    return _state(features, *final)


def attend(
    q: Tensor, state: LinearState, features: Features, *, eps: float, chunk_size: int | None
) -> Tensor:
    """Look queries (N, L, H*R, E) up in a state: (N, L, H*R, M), in the dtype of the sums."""
    tensors = (q, *_sums(state))
    settings = _settings(features, tensors, chunk=chunk_size or 0, eps=eps)
    return Attend.apply(*_map(settings, features), *tensors, *features.parameters)[0]


def _settings(features: Features, tensors: tuple[Tensor | None, ...], **options: Any) -> Settings:
    formula = features.formula or Formula("")
    inputs = (*tensors, *features.parameters)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return Settings(formula.kind, formula.numbers, **options, keep=keep)


def _map(settings: Settings, features: Features) -> tuple[Any, ...]:
    if features.formula is None:
        return settings, features, None
    return settings, None, features.formula.projection


def _sums(state: LinearState | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if state is None else (state.kv, state.z, state.shift)


def _state(features: Features, kv: Tensor, z: Tensor, shift: Tensor) -> LinearState:
    return LinearState(kv, z, shift if features.exponential else None)
