"""What a map knows of its inputs, moved by gradient descent until its attention is softmax's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FLOOR = 1e-12  # of a weight: one that is 0 would have an infinite gradient
QUERIES = 256  # of a sequence that a step looks at


def fit_weights(
    feature_map: Any,
    q: Tensor,
    k: Tensor,
    *,
    keep: Tensor | None = None,
    softmax_temp: float | None = None,
    steps: int = 100,
    lr: float = 0.02,
) -> Any:
    """Move a map's parameters and ``fitted_buffers`` so that its weights are softmax's, in place.

    Minimises the mean over the queries of -sum_j P_ij log W_ij, P the weights of softmax and W
    the map's, which is the loss of Zhang et al. 2024, "The Hedgehog & the Porcupine"
    (arXiv:2402.04347), section 4.2. What is random in the map is drawn anew for every step, and
    put back at the end. Adam with a cosine schedule, on one sequence after the other, and on 256
    of its queries if it has more.

    Args:
        feature_map: a map with nothing to fit is returned as it is.
        q: queries (N, L, H, E) of examples. k: their keys (N, S, H, E).
        keep: bool that broadcasts to (N, H, L, S), True where a query sees a key; None for all.
        softmax_temp: factor of the dot products; None is 1/sqrt(E).
        steps: of gradient descent; 0 leaves the map as it is.
        lr: of the first step.

    Returns:
        The same map, in evaluation mode.

    Raises:
        ValueError: for a negative number of steps, or queries and keys of other numbers of
            sequences or heads.
    """
    if steps < 0 or not lr > 0:
        raise ValueError(f"steps must be at least 0 and lr positive, got {steps} and {lr}")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            "q (N, L, H, E) and k (N, S, H, E) must agree in N, H and E, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    changes = _changes(feature_map)
    trained = [p for p in feature_map.parameters() if p.requires_grad]
    trained += [change for _, own in changes for change in own.values()]
    feature_map.eval()
    if not trained or not steps:
        return feature_map
    temp = q.shape[-1] ** -0.5 if softmax_temp is None else softmax_temp
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(trained, lr=lr)
    with torch.enable_grad(), _redrawn(feature_map) as draw:
        for step in range(steps):
            draw(generator)
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            n = step % q.shape[0]
            rows = torch.randperm(q.shape[1], generator=generator)[:QUERIES].sort().values
            shown = _rows_of(keep, n, rows)
            with _moved(changes):
                loss = cross_entropy(feature_map, q[[n]], k[[n]], rows, shown, temp)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        for module, own in changes:
            for name, value in module.moved(own).items():
                module.get_buffer(name).copy_(value)
    return feature_map


def has_parts(feature_map: Any) -> bool:
    """Whether :func:`fit_weights` would change a map."""
    if not isinstance(feature_map, nn.Module):
        return False
    return any(p.requires_grad for p in feature_map.parameters()) or bool(_changes(feature_map))


def cross_entropy(
    feature_map: Any, q: Tensor, k: Tensor, rows: Tensor, shown: Tensor | None, temp: float
) -> Tensor:
    """Mean over the queries ``rows`` of -sum_j P_ij log W_ij, differentiable in the map's parts.

    Args:
        q: (N, L, H, E). k: (N, S, H, E).
        rows: which of the L queries. shown: bool (N or 1, H or 1, rows, S); None for all True.
        temp: factor of the dot products.
    """
    logits = temp * (q[:, rows].transpose(1, 2).double() @ k.transpose(1, 2).double().mT)
    hidden = torch.zeros_like(logits, dtype=torch.bool) if shown is None else ~shown
    alive = ~hidden.all(-1)  # a query without keys has no weights
    exact = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0).to(q.dtype)
    exponential = getattr(feature_map, "exponential", False)
    names = ("log_queries", "log_keys") if exponential else ("forward_queries", "forward_keys")
    if getattr(feature_map, "positional", False):
        q, k = feature_map.add_positions(q), feature_map.add_positions(k)
    pairs = zip(names, (q[:, rows], k), strict=True)
    b, a = (getattr(feature_map, name)(x).transpose(1, 2) for name, x in pairs)
    if exponential:
        # factors that cancel, so no gradient goes through them
        shift = a.detach().amax(2, keepdim=True)
        b = b + shift
        b, a = (b - b.detach().amax(-1, keepdim=True)).exp(), (a - shift).exp()
    weights = (b @ a.mT).masked_fill(hidden, 0.0).clamp(min=FLOOR)
    log = weights.log() - weights.sum(-1, keepdim=True).log()
    return -((exact * log).sum(-1) * alive).sum() / alive.expand(exact.shape[:-1]).sum()


_Changes = list[tuple[Any, dict[str, Tensor]]]  # a map, and a change of each buffer from 0 on


def _changes(feature_map: nn.Module) -> _Changes:
    found = []
    for module in feature_map.modules():
        names = [n for n in getattr(module, "fitted_buffers", ()) if n in module._buffers]
        own = {n: torch.zeros_like(module.get_buffer(n)).requires_grad_() for n in names}
        found += [(module, own)] if own else []
    return found


@contextmanager
def _moved(changes: _Changes) -> Iterator[None]:
    """Within, buffers are moved by the changes, and gradients reach these."""
    before = []
    try:
        for module, own in changes:
            moved = module.moved(own)
            before += [(module, name, module._buffers[name]) for name in moved]
            module._buffers.update(moved)
        yield
    finally:
        for module, name, tensor in before:
            module._buffers[name] = tensor


@contextmanager
def _redrawn(feature_map: nn.Module) -> Iterator[Any]:
    """A function that draws random parts anew; at the end they are as they were."""
    random: list[Any] = [m for m in feature_map.modules() if "omega" in m._buffers]
    drawn = [(tensor, tensor.clone()) for m in random for tensor in m.buffers(recurse=False)]

    def draw(generator: torch.Generator) -> None:
        for part in random:
            part.resample(generator)

    try:
        yield draw
    finally:
        with torch.no_grad():
            for tensor, value in drawn:
                tensor.copy_(value)


def _rows_of(keep: Tensor | None, n: int, rows: Tensor) -> Tensor | None:
    """``keep`` of one sequence and some of its queries, (1, H or 1, rows, S)."""
    if keep is None:
        return None
    keep = keep.reshape((1,) * (4 - keep.ndim) + keep.shape)
    keep = keep[[n]] if keep.shape[0] > 1 else keep
    return keep[:, :, rows] if keep.shape[2] > 1 else keep
