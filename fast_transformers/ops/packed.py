"""Sequences of different lengths in one tensor, one behind the other.

Kernels take them as they are. For the other forms sequences of similar length are gathered into
a padded batch, so that no information crosses a boundary, many short sequences cost no more than
one long one, and padding stays below a quarter whatever the mixture. Gathering copies the inputs
once, and reads the boundaries back from a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .state import Attended, LinearState


def nested(
    function: Callable[..., Attended],
    q: Any,
    k: Any,
    v: Any,
    sequences: tuple[Tensor | None, Tensor | None],
    **options: Any,
) -> Attended:
    """Call ``function`` with jagged nested tensors (N, length, H, dim) as packed ones."""
    if any(starts is not None for starts in sequences):
        raise ValueError(
            "cu_seqlens and cu_seqlens_keys must be None for nested tensors, which know their "
            "boundaries; leave them out, or pass the packed tensors"
        )
    for name, x in (("queries", q), ("keys", k), ("values", v)):
        jagged = x.is_nested and x.layout == torch.jagged and x.lengths() is None
        if not jagged or isinstance(x.shape[1], int):  # another dimension is the jagged one
            raise TypeError(
                f"{name} must be a nested tensor of layout torch.jagged without holes like the "
                "others, (N, length, H, dim); make all three with torch.nested.nested_tensor("
                "list, layout=torch.jagged), of tensors (length, H, dim)"
            )
    flat = [x.values()[None] for x in (q, k, v)]
    starts, key_starts, value_starts = q.offsets(), k.offsets(), v.offsets()
    if value_starts is not key_starts and value_starts.device.type == "cpu":
        if not torch.equal(value_starts, key_starts):
            raise ValueError(
                "values must have the lengths of the keys in every sequence, "
                f"{key_starts.diff().tolist()}, got {value_starts.diff().tolist()}"
            )
    if key_starts is starts:
        key_starts = None
    values, state = function(*flat, cu_seqlens=starts, cu_seqlens_keys=key_starts, **options)
    return Attended(torch.nested.nested_tensor_from_jagged(values[0], starts), state)


def check(q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_keys: Tensor | None) -> None:
    """What can be seen without reading the boundaries back from a device."""
    for name, starts, x in (
        ("cu_seqlens", cu_seqlens, q),
        ("cu_seqlens_keys", cu_seqlens_keys, k),
    ):
        if starts is None:
            continue
        if starts.ndim != 1 or starts.is_floating_point() or x.shape[0] != 1 or len(starts) < 2:
            raise ValueError(
                f"{name} must be a 1-D integer tensor of the sequences' starts and the end, for "
                f"inputs of shape (1, T, H, dim), got {starts.dtype} of shape "
                f"{tuple(starts.shape)} and inputs of {tuple(x.shape)}"
            )
    if cu_seqlens_keys is None and k.shape[1] != q.shape[1]:
        raise ValueError(
            f"cu_seqlens_keys must be given when keys ({k.shape[1]}) and queries ({q.shape[1]}) "
            "differ in number"
        )
    if cu_seqlens_keys is not None and len(cu_seqlens_keys) != len(cu_seqlens):
        raise ValueError(
            f"cu_seqlens_keys must be for the {len(cu_seqlens) - 1} sequences of cu_seqlens, got "
            f"{len(cu_seqlens_keys) - 1}"
        )


def packed(
    function: Callable[..., Attended],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    cu_seqlens_keys: Tensor | None,
    key_mask: Tensor | None,
    state: LinearState | None,
    **options: Any,
) -> Attended:
    """Call ``function`` for groups of sequences of similar length, which :func:`check` has seen.

    Returns values (1, T, H, M), and the state of each of the B sequences.
    """
    starts = _starts("cu_seqlens", cu_seqlens, q)
    key_starts = starts
    if cu_seqlens_keys is not None:
        key_starts = _starts("cu_seqlens_keys", cu_seqlens_keys, k)
    rows, places, states, order = [], [], [], []
    lengths = [
        (b - a, d - c)
        for (a, b), (c, d) in zip(pairwise(starts), pairwise(key_starts), strict=True)
    ]
    for group in _similar(lengths):
        queries, real = _index([starts[i] for i in group], [lengths[i][0] for i in group], q)
        keys, kept = _index([key_starts[i] for i in group], [lengths[i][1] for i in group], q)
        if key_mask is not None:
            kept = kept & key_mask[0][keys]
        chosen = torch.tensor(group, device=q.device)
        values, final = function(
            _rows(q, queries), _rows(k, keys), _rows(v, keys), key_mask=kept,
            state=None if state is None else state.reorder(chosen), **options,
        )  # fmt: skip
        rows.append(values[real])
        places.append(queries[real])
        states.append(final)
        order.append(chosen)
    back = torch.cat(places).argsort()
    return Attended(torch.cat(rows)[back][None], _join(states, torch.cat(order).argsort()))


def _starts(name: str, cu_seqlens: Tensor, x: Tensor) -> list[int]:
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != x.shape[1] or starts != sorted(starts):
        raise ValueError(
            f"{name} must rise from 0 to the number of tokens ({x.shape[1]}), got {starts}"
        )
    return starts


def _similar(lengths: list[tuple[int, int]]) -> list[list[int]]:
    """Numbers of sequences, in groups that are padded by a quarter at most, or by 16 tokens."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i][::-1]):
        if groups:
            members = [lengths[j] for j in (*groups[-1], i)]
            if all(max(x) <= max(1.25 * min(x), min(x) + 16) for x in zip(*members, strict=True)):
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


def _index(starts: list[int], lengths: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Which token stands where in a padded batch, and where it is real: (n, longest)."""
    first, length = (torch.tensor(x, device=like.device)[:, None] for x in (starts, lengths))
    at = torch.arange(max(lengths), device=like.device)
    real = at < length
    return torch.where(real, first + at, 0), real


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x[0].index_select(0, index.flatten()).unflatten(0, index.shape)


def _join(states: list[LinearState], order: Tensor) -> LinearState:
    shifts = [s.shift for s in states]
    shift = None if shifts[0] is None else torch.cat(shifts)[order]  # type: ignore[arg-type]
    kv, z = (torch.cat([getattr(s, name) for s in states])[order] for name in ("kv", "z"))
    return LinearState(kv, z, shift)
