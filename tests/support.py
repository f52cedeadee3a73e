"""Inputs, feature maps and error budgets that the tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fast_transformers import ops
from fast_transformers.attention import FullAttention
from fast_transformers.events import Event, EventDispatcher

EPS_FP32 = torch.finfo(torch.float32).eps
LENGTHS = [1, 2, 63, 64, 65, 131]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_qkv(
    length: int,
    keys: int | None = None,
    *,
    N: int = 2,
    H: int = 3,
    E: int = 8,
    M: int = 5,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """Queries, keys and values; ``strided`` ones are slices of something wider and transposed."""
    generator = torch.Generator().manual_seed(seed)
    keys = length if keys is None else keys

    def one(rows: int, dim: int, scale: float) -> Tensor:
        if not strided:
            x = torch.randn(N, rows, H, dim, generator=generator, dtype=torch.float64)
        else:
            wide = torch.randn(N, H, dim + 3, rows + 2, generator=generator, dtype=torch.float64)
            x = wide[:, :, 1 : dim + 1, 2:].permute(0, 3, 1, 2)
        return (x * scale).to(dtype)

    return [one(length, E, std), one(keys, E, std), one(keys, M, 1.0)]


def positive_features(E: int = 8, F: int = 24) -> ops.Features:
    """A map with trained weights, F != E, positive."""
    weight = torch.randn(E, F, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) / 3

    def phi(x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x @ weight.to(x.dtype)) + 0.01

    return ops.Features(phi, phi, any_heads=True)


def exponential_features(E: int = 8, F: int = 24) -> ops.Features:
    """Favor's log-features of both signs, with a fixed projection."""
    omega = torch.randn(E, F // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def queries(x: Tensor) -> Tensor:
        u = x @ omega.to(x.dtype)
        return torch.cat([u, -u], -1)

    def keys(x: Tensor) -> Tensor:
        return queries(x) - x.square().sum(-1, keepdim=True) / 2

    return ops.Features(queries, keys, exponential=True, any_heads=True)


def differentiate(
    function: Callable[..., ops.Attended], inputs: list[Tensor], seed: int = 9
) -> list[Tensor]:
    """Values, true final sums, and gradients of a loss that looks at all of them."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    values, state = function(*leaves)
    z = state.z[..., None]
    if state.shift is None:
        means = state.kv / (1 + z.abs())  # sums of either sign may be 0
    else:
        means = state.kv / z.clamp(min=1e-30)  # free of the shift
    generator = torch.Generator().manual_seed(seed)

    def weigh(x: Tensor) -> Tensor:
        w = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        return (x * w).sum()

    loss = weigh(values).to(means.dtype) + weigh(means)
    loss = loss + sum(0 * x.sum() for x in leaves)  # an empty sequence depends on nothing
    return [
        values.detach(),
        means.detach(),
        *torch.autograd.grad(loss, leaves, materialize_grads=True),
    ]


def assert_as_accurate(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    size: float | None = None,
    log_size: float = 0.0,
    operands: torch.dtype | None = None,
) -> None:
    """At most twice the error of plain PyTorch, one rounding of the result, and float32 noise.

    ``operands`` is the dtype that factors of products were rounded to, if not that of the result.

    ``size`` is the scale of the terms that were summed, if they cancel in the result;
    ``log_size`` that of logarithms that were rounded before they were exponentiated.
    """
    assert actual.shape == exact.shape
    largest = max(float(exact.abs().max()), size or 0.0) if exact.numel() else 0.0
    eps = max(torch.finfo(x).eps for x in (actual.dtype, operands or actual.dtype))
    noise = EPS_FP32 if actual.dtype != torch.float64 else eps
    lost = (plain.double() - exact).abs().max() if exact.numel() else 0.0
    budget = 2 * lost + eps * largest + (32 + 2 * log_size) * noise * max(largest, 1.0)
    assert actual.isfinite().all()
    error = (actual.double() - exact).abs().max() if exact.numel() else 0.0
    assert error <= budget, f"error {float(error):.1e} over budget {float(budget):.1e}"


def make_full(**options) -> FullAttention:
    return FullAttention(**{"attention_dropout": 0.0, **options})


def plain_softmax(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, temp: float | None = None
) -> tuple[Tensor, Tensor]:
    """Values and weights of softmax attention; a query without any key gets 0."""
    temp = q.shape[-1] ** -0.5 if temp is None else temp
    logits = temp * torch.einsum("nlhe,nshe->nhls", q, k)
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    return torch.einsum("nhls,nshm->nlhm", weights, v), weights


def listen() -> list[Event]:
    """A list that fills with the events of the default dispatcher."""
    events = []
    EventDispatcher.get().listen(Event, events.append)
    return events
