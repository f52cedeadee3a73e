"""What every contender has to answer before its speed is reported.

The answers come from this library's reference in float64. It is given features, not maps: each
contender's own formula in float64, with its own eps, so nothing but rounding may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fast_transformers import ops
from fast_transformers.feature_maps import elu_feature_map

from .contenders import ELU, Contender, shared_favor
from .worker.jobs import DIM, make_inputs

CHECK_BATCH, CHECK_LENGTH = 2, 200  # all tokens are compared; several chunks, the last one short
EPS_FP32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Formula:
    """phi(q), phi(k) and what is added to the denominator.

    Attributes:
        features: queries and keys, (N, L, H, E), to features; keys of the whole sequence.
        eps: added to the denominator.
        key_eps: added to every feature of the keys' sum.
    """

    features: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    eps: float = 0.0
    key_eps: float = 0.0


def formula(contender: Contender, causal: bool) -> Formula:
    """What a contender with a feature map is meant to compute."""
    if contender.map == ELU:
        elu = elu_feature_map(DIM)
        return Formula(lambda q, k: (elu(q), elu(k)), eps=1e-6)
    favor = shared_favor().double()
    if contender.home != "performer":
        # our attention works with logarithms and needs no eps
        eps = 1e-6 if contender.home == "older" else 0.0
        return Formula(lambda q, k: (favor(q), favor(k)), eps=eps)

    def performer(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _performer(favor.omega, q, (-1,)), _performer(favor.omega, k, (1, 3))

    return Formula(performer, key_eps=1e-6 if causal else 0.0)


def _performer(omega: Tensor, x: Tensor, largest: tuple[int, ...]) -> Tensor:
    """performer-pytorch's features: 1e-4 is added to exponentials whose largest is about 1."""
    omega = torch.cat([omega, -omega], 1).to(x.dtype)
    x = x * x.shape[-1] ** -0.25
    u = x @ omega
    shift = u.detach().amax(largest, keepdim=True) + x.square().sum(-1, keepdim=True) / 2
    return ((u - shift).exp() + 1e-4) * omega.shape[1] ** -0.5


def answers(
    contender: Contender,
    causal: bool,
    batch: int,
    length: int,
    tokens: int,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Results of the last tokens, in the last head of the last sequence, by the reference.

    With fewer tokens than the length the earlier ones go in as a state, so any length can be
    checked. Gradients of keys and values of full attention depend on every query and are then
    left out.
    """
    q, k, v, gradient = (x[-1:, :, -1:].to(dtype) for x in make_inputs(batch, length))
    past = length - tokens
    q = q[:, past:].requires_grad_()
    if contender.map is None:
        k, v = k.requires_grad_(), v.requires_grad_()
        values, leaves = _softmax(q, k, v, causal), [q, k, v]
    else:
        old_k, old_v = k[:, :past], v[:, :past]
        k, v = k[:, past:].requires_grad_(), v[:, past:].requires_grad_()
        values = _linear(formula(contender, causal), causal, q, (old_k, k), (old_v, v))
        leaves = [q, k, v]
    found = torch.autograd.grad((values * gradient[:, past:]).sum(), leaves)
    results = {"values": values, "query gradients": found[0]}
    if causal or not past:
        results |= {"key gradients": found[1], "value gradients": found[2]}
    return {name: x.detach()[0, -tokens:, 0] for name, x in results.items()}


def _softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    logits = torch.einsum("nlhe,nshe->nhls", q, k) * DIM**-0.5
    if causal:
        unseen = torch.ones(logits.shape[-2:], dtype=torch.bool)
        logits = logits.masked_fill(unseen.triu(1 + k.shape[1] - q.shape[1]), -torch.inf)
    return torch.einsum("nhls,nshm->nlhm", logits.softmax(-1), v)


def _linear(
    formula: Formula,
    causal: bool,
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
) -> Tensor:
    phi_q, phi_k = formula.features(q, torch.cat(keys, 1))
    shape = (1, 1, phi_k.shape[-1])
    state = ops.LinearState(
        kv=phi_k.new_zeros(*shape, values[0].shape[-1]),
        z=phi_k.new_full(shape, formula.key_eps),
    )
    past = keys[0].shape[1]
    if not causal:
        v = torch.cat(values, 1)
        return ops.linear_attention(
            phi_q, phi_k, v, state=state, eps=formula.eps, impl="reference"
        ).values
    if past:
        old_k, old_v = phi_k[:, :past], values[0]
        state = ops.linear_attention(
            phi_q[:, :1], old_k, old_v, state=state, impl="reference"
        ).state
    return ops.causal_linear_attention(
        phi_q, phi_k[:, past:], values[1], state=state, eps=formula.eps, impl="reference"
    ).values


def disagreements(
    found: dict[str, Tensor], contender: Contender, causal: bool, batch: int, length: int
) -> list[str]:
    """What is wrong with the results of a contender, a line each; empty if nothing is.

    The error may be twice that of the plain formula in float32, and what sums in float32 lose
    besides if they are taken term by term: roundings of the result, and of the sums over its
    past, a random walk that grows with the root of the length.
    """
    tokens = found["values"].shape[0]
    shape = (causal, batch, length, tokens)
    exact = answers(contender, *shape)
    plain = answers(contender, *shape, dtype=torch.float32)
    passes = "forward+backward" if len(found) > 1 else "forward"
    wrong = []
    for name in found.keys() & exact.keys():
        size = float(exact[name].abs().max())
        lost = float((plain[name].double() - exact[name]).abs().max())
        budget = 2 * lost + EPS_FP32 * size * (16 + 2 * length**0.5)
        error = float((found[name].double() - exact[name]).abs().max())
        if not error <= budget:  # NaN is wrong, too
            wrong.append(
                f"{name} of {contender.name}, {'causal' if causal else 'full'}, {passes}, "
                f"{batch} x {length}: error {error:.1e}, allowed {budget:.1e}"
            )
    return wrong
