"""A whole model, the drawing of random maps, and the machine's matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fast_transformers.builders import TransformerEncoderBuilder
from fast_transformers.feature_maps import Favor
from fast_transformers.masking import TriangularCausalMask

from .jobs import DIM, HEADS, TAIL

LAYERS, LENGTH = 4, 2048


class Call:
    """A job made of a function that returns a tensor.

    Args:
        function: what is measured; gradients are off.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function = function

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self.function()

    def results(self) -> dict[str, Tensor]:
        """The last tokens of what it returns."""
        return {"values": self()[0, -TAIL:].clone()}


class Free(nn.Module):
    """An attention that costs nothing: it returns the values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        return v


def make_model() -> tuple[nn.Module, Tensor, TriangularCausalMask]:
    """A causal linear transformer with its input and mask, the same in every process."""
    torch.manual_seed(0)
    model = TransformerEncoderBuilder.from_kwargs(
        attention_type="causal-linear",
        n_layers=LAYERS,
        n_heads=HEADS,
        query_dimensions=DIM,
        value_dimensions=DIM,
        feed_forward_dimensions=4 * HEADS * DIM,
    ).get()
    x = torch.randn(1, LENGTH, HEADS * DIM)
    return model.eval(), x, TriangularCausalMask(LENGTH)


def replace_attention(model: nn.Module, attention: nn.Module) -> nn.Module:
    """Have every layer use this attention between its projections; returns the model."""
    for module in list(model.modules()):
        if hasattr(module, "inner_attention"):
            module.inner_attention = attention
    return model


def model(part: str) -> Call:
    """The whole model, the model without attention ("rest"), or one layer's attention alone."""
    whole, x, mask = make_model()
    if part == "whole":
        return Call(lambda: whole(x, attn_mask=mask))
    if part == "rest":
        rest = replace_attention(whole, Free())
        return Call(lambda: rest(x, attn_mask=mask))
    layers: list[Any] = [m for m in whole.modules() if hasattr(m, "inner_attention")]
    attention = layers[0].inner_attention
    q, k, v = torch.randn(3, 1, LENGTH, HEADS, DIM)
    return Call(lambda: attention(q, k, v, mask, None, None))


def redraw(features: int) -> Call:
    """A random map in training, which is drawn again at every call."""
    favor = Favor(DIM, n_dims=features, redraw=1, generator=0).train()

    def draw() -> Tensor:
        favor.new_feature_map()
        return favor.omega

    return Call(draw)


def product(batch: int, size: int) -> Call:
    """A matrix product in float32, of one large pair or of many small ones."""
    shape = (batch, size, size) if batch > 1 else (size, size)
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    out = torch.empty(shape)
    multiply = torch.bmm if batch > 1 else torch.mm
    return Call(lambda: multiply(a, b, out=out))


TASKS: dict[str, Callable[..., Call]] = {"model": model, "redraw": redraw, "product": product}
