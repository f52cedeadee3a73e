"""How the mathematics sees a feature map, and how it evaluates one chunk of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _identity(x: Tensor) -> Tensor:
    return x


class Features(NamedTuple):
    """Two functions of the last dimension: (N, C, H, E) to (N, C, H, F), token by token.

    Attributes:
        queries: phi of the queries, or its logarithm.
        keys: phi of the keys, or its logarithm.
        exponential: whether the two functions return log(phi). Such features are exponentiated
            relative to their running maximum, which cancels exactly.
        parameters: trained tensors inside the two functions; they receive gradients.
        dtype: dtype of the functions' own weights, None if they have none. Inputs are promoted
            to it, or else to the dtype of the sums.
        any_layout: the functions touch the last dimension only, so they may be given
            (N, H, C, E) instead, which saves a copy.
    """

    queries: Callable[[Tensor], Tensor] = _identity
    keys: Callable[[Tensor], Tensor] = _identity
    exponential: bool = False
    parameters: tuple[Tensor, ...] = ()
    dtype: torch.dtype | None = None
    any_layout: bool = False


IDENTITY = Features(any_layout=True)


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype of sums over the sequence: float64 if an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def pack(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C, H, D) of any strides to (N*H, C, D), the layout of the batched products."""
    n, c, h, d = x.shape
    return x.transpose(1, 2).reshape(n * h, c, d).to(dtype)


def unpack(x: Tensor, n: int) -> Tensor:
    """(N*H, C, D) to a (N, C, H, D) view."""
    return x.unflatten(0, (n, x.shape[0] // n)).transpose(1, 2)


def evaluate(
    function: Callable[[Tensor], Tensor], x: Tensor, features: Features, dtype: torch.dtype
) -> Tensor:
    """Features of one chunk: (N, C, H, E) to (N*H, C, F) in the dtype of the sums."""
    n, c, h, _ = x.shape
    x = x.to(torch.promote_types(x.dtype, features.dtype) if features.dtype else dtype)
    if features.any_layout:
        phi = function(x.transpose(1, 2).contiguous())
        return phi.reshape(n * h, c, phi.shape[-1]).to(dtype)
    return pack(function(x), dtype)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Sums over the sequence stay in float32 inside an autocast region, too."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@contextmanager
def reproducible(features: Features, x: Tensor, ctx: Any, at: slice) -> Iterator[None]:
    """Refuse features that draw random numbers, which the backward pass would draw again.

    Looks at the first chunk only, and only if a backward pass may follow.
    """
    if features.any_layout or at.start or not any(ctx.needs_input_grad):
        yield
        return
    module = torch if x.device.type == "cpu" else torch.get_device_module(x.device)
    before = module.get_rng_state()
    yield
    if not torch.equal(before, module.get_rng_state()):
        raise RuntimeError(
            "the feature map draws random numbers while it encodes (dropout, perhaps), but its "
            "features are computed again in the backward pass; draw them in new_feature_map"
        )


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a backward pass as written by hand: its result cannot be differentiated again.

    Raises as soon as that is prepared (``create_graph=True``); a result cut off from the graph
    would count as a constant in a gradient penalty, silently.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the chunked form has no second derivatives (create_graph=True was given); pass "
                "impl='reference' to the functions in fast_transformers.ops for this"
            )
        with without_autocast(next(g for g in ctx.saved_tensors if g is not None)):
            return backward(ctx, *gradients)

    return checked


class Differentiated:
    """Features of one chunk recomputed for the backward pass, with their pull-back."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        features: Features,
        dtype: torch.dtype,
        first: bool,
    ) -> None:
        self._inputs = [x.detach().requires_grad_(), *features.parameters]
        with torch.enable_grad():
            self._value = evaluate(function, self._inputs[0], features, dtype)
        self.value = self._value.detach()
        if first:
            self._check_leaves()

    def _check_leaves(self) -> None:
        """Every tensor that could receive a gradient is one that will."""
        known, waiting, seen = set(map(id, self._inputs)), [self._value.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise RuntimeError(
                    f"the feature map uses a tensor of shape {tuple(leaf.shape)} that requires a "
                    "gradient and would not get one; make it an nn.Parameter of the map, or list "
                    "it in Features.parameters"
                )
            waiting += [parent for parent, _ in node.next_functions]

    def pull_back(self, gradient: Tensor, parameter_gradients: list[Tensor | None]) -> Tensor:
        """Gradient of x, (N, C, H, E); gradients of the parameters are added to the list."""
        if self._value.requires_grad:
            x, *rest = torch.autograd.grad(
                self._value, self._inputs, gradient, allow_unused=True, materialize_grads=False
            )
        else:
            x, rest = None, []
        for i, extra in enumerate(rest):
            if extra is not None:
                old = parameter_gradients[i]
                parameter_gradients[i] = extra if old is None else old + extra
        return torch.zeros_like(self._inputs[0]) if x is None else x
