"""The one place that inspects ranks, shapes and dtypes of what the caller hands in."""

from __future__ import annotations

import torch
from torch import Tensor

from .choose import exporting
from .features import Features
from .state import LinearState

_LAYOUT = {4: "(N, length, H, dim)", 3: "(N, H, dim)"}


def check_inputs(q: Tensor, k: Tensor, v: Tensor, dim: int = 4) -> None:
    """Queries, keys and values that can attend to each other; ``dim`` is 3 for a single step."""
    if (
        not exporting()  # whose graph would be bound to the answers about the lengths
        and isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
        and (shape := k.shape) == q.shape and k.ndim == v.ndim == dim
        and (v.shape == shape or v.shape[:-1] == shape[:-1])
        and q.is_floating_point() and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
    ):  # fmt: skip
        return  # as nearly always; generation is in a hurry
    for name, x in (("queries", q), ("keys", k), ("values", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != dim:
            raise ValueError(
                f"{name} must have {dim} dimensions, {_LAYOUT[dim]}, got shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{name} must be floating point, got {x.dtype}; embed or convert them first, "
                f"e.g. {name}.float()"
            )
        if x.device != q.device:
            raise ValueError(
                f"{name} must be on the device of the queries ({q.device}), got {x.device}; "
                f"move them with {name}.to({str(q.device)!r})"
            )
    for name, x in (("keys", k), ("values", v)):
        if x.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name} must have the batch size of the queries ({q.shape[0]}), got "
                f"{x.shape[0]}; expand or repeat the smaller one"
            )
    for name, x in (("keys", k), ("values", v)):
        if x.shape[-2] != k.shape[-2] or (q.shape[-2] % max(x.shape[-2], 1)):
            raise ValueError(
                f"{name} must have the heads of the queries ({q.shape[-2]}), or a divisor of that "
                f"number, the same for keys and values, got {x.shape[-2]}; the layout is "
                + _LAYOUT[dim]
            )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"values must have as many rows as keys ({k.shape[1]}), got {v.shape[1]}; "
            "pad both, or cut both, before the call"
        )


def check_projection(features: Features, x: Tensor) -> None:
    """A map with a projection fits the inputs; a user's own function says so itself."""
    projection = None if features.formula is None else features.formula.projection
    if projection is not None and x.shape[-1] != projection.shape[0]:
        raise ValueError(
            f"the feature map was made for {projection.shape[0]} query dimensions, got inputs of "
            f"{x.shape[-1]}; make it with query_dimensions={x.shape[-1]}"
        )


def check_key_mask(key_mask: Tensor | None, k: Tensor) -> None:
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]:
        raise ValueError(
            f"key_mask must be a bool tensor of shape {tuple(k.shape[:2])}, True = keep, got "
            f"{key_mask.dtype} of shape {tuple(key_mask.shape)}"
        )


def check_widths(of_queries: int, of_keys: int) -> None:
    """Features of queries can be multiplied by those of keys."""
    if of_queries != of_keys:
        raise ValueError(
            "the feature map must give queries and keys the same number of features, got "
            f"{of_queries} for queries and {of_keys} for keys; check forward_queries and "
            "forward_keys"
        )


def check_state(
    state: LinearState | None, v: Tensor, n: int, dtype: torch.dtype, exponential: bool
) -> None:
    """A state that ``n`` sequences can continue; its number of features is checked on use."""
    if state is None:
        return
    h, m = v.shape[-2:]
    again = "start a new sequence with state=None"
    shape = state.kv.shape
    if len(shape) != 4 or state.z.shape != shape[:3]:
        raise ValueError(
            "state must hold kv (N, H, F, M) and z (N, H, F), got "
            f"{tuple(shape)} and {tuple(state.z.shape)}"
        )
    if shape[0] != n:
        raise ValueError(
            f"The batch size changed during iteration: the state is for {shape[0]} "
            f"sequences, the inputs are for {n}; {again}, or pick rows with state.reorder(rows)"
        )
    if shape[1] != h or shape[3] != m:
        raise ValueError(
            f"state is for {shape[1]} heads of {shape[3]} value dimensions, "
            f"the inputs have {h} of {m}; {again}"
        )
    if state.kv.dtype != dtype or state.z.dtype != dtype:
        raise TypeError(
            f"state must be {dtype} for {v.dtype} inputs, got {state.kv.dtype}; keep the state "
            "as it was returned, or convert it with state.map(lambda t: t.to(dtype))"
        )
    if (state.shift is not None) != exponential:
        kinds = {True: "exponential features", False: "features that are no exponentials"}
        raise ValueError(
            f"state was made by a feature map with {kinds[not exponential]}, this one has "
            f"{kinds[exponential]}; {again}"
        )


def check_state_width(of_state: int, of_keys: int) -> None:
    if of_state != of_keys:
        raise ValueError(
            f"state is for a feature map of {of_state} features, this one has {of_keys}; start a "
            "new sequence with state=None"
        )
