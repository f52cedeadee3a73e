"""What padding holds changes no real token, not by a single bit."""

from __future__ import annotations

import pytest
import torch

from fast_transformers.attention import (
    CausalLinearAttention,
    ConditionalFullAttention,
    FullAttention,
    LinearAttention,
)
from fast_transformers.builders import (
    RecurrentDecoderBuilder,
    TransformerDecoderBuilder,
    TransformerEncoderBuilder,
)
from fast_transformers.masking import FullMask, LengthMask, TriangularCausalMask
from tests.maps import ALL
from tests.support import make_qkv

LENGTHS = torch.tensor([9, 4, 1])
SIZE = 9
PADDING = ~LengthMask(LENGTHS, max_len=SIZE).bool_matrix
CONTENTS = {"random": None, "nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "big": 1e300}
SIZES = {"n_layers": 2, "n_heads": 2, "query_dimensions": 8, "value_dimensions": 8, "dropout": 0.0}


def repad(x, content):
    """`x` with other padding."""
    other = torch.randn_like(x) if content is None else torch.full_like(x, content)
    return torch.where(PADDING.view(*PADDING.shape, *[1] * (x.ndim - 2)), other, x)


def same(one, other):
    real = [x[~PADDING] for x in (one, other)]
    assert real[0].isfinite().all()
    assert torch.equal(*real)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("kind", [LinearAttention, CausalLinearAttention])
def test_linear_attention(kind, content, name):
    attention = kind(8, ALL[name]).double().eval()
    mask = TriangularCausalMask(SIZE) if kind is CausalLinearAttention else FullMask(SIZE)
    inputs = make_qkv(SIZE, N=3, dtype=torch.float64)
    lengths = LengthMask(LENGTHS)
    expected = attention(*inputs, mask, lengths, lengths)
    padded = [repad(x, CONTENTS[content]) for x in inputs]
    same(attention(*padded, mask, lengths, lengths), expected)


@pytest.mark.parametrize("limit", [SIZE, SIZE - 1])
@pytest.mark.parametrize("causal", [False, True])
def test_full_attention(causal, limit):
    other = CausalLinearAttention(8) if causal else LinearAttention(8)
    full = FullAttention(attention_dropout=0.0)
    mask = TriangularCausalMask(SIZE) if causal else FullMask(SIZE)
    inputs = make_qkv(SIZE, N=3, dtype=torch.float64)
    lengths = LengthMask(LENGTHS)
    for attention in (full, ConditionalFullAttention(other, limit, attention_dropout=0.0)):
        expected = attention(*inputs, mask, lengths, lengths)
        padded = [repad(x, None) for x in inputs]
        same(attention(*padded, mask, lengths, lengths), expected)


TYPES = ["full", "linear", "causal-linear", "conditional-full:linear", "conditional-full:full"]


@pytest.mark.parametrize("extra", [{}, {"norm_first": True, "rotary": True}], ids=["", "modern"])
@pytest.mark.parametrize("name", ["elu", "favor", "smoothed"])
@pytest.mark.parametrize("kind", TYPES)
def test_encoder(kind, name, extra):
    encoder = TransformerEncoderBuilder.from_kwargs(
        attention_type=kind, feature_map=ALL[name], length_limit=4, **SIZES, **extra
    )
    encoder = encoder.get().double().eval()
    mask = TriangularCausalMask(SIZE) if kind == "causal-linear" else None
    x = torch.randn(3, SIZE, 16, dtype=torch.float64)
    expected = encoder(x, mask, LengthMask(LENGTHS))
    for content in ("random", "nan"):
        if content == "nan" and "full" in kind.split(":"):
            continue  # the products of softmax attention with NaN are NaN
        same(encoder(repad(x, CONTENTS[content]), mask, LengthMask(LENGTHS)), expected)


@pytest.mark.parametrize("cross", ["full", "linear", "conditional-full:linear"])
@pytest.mark.parametrize("kind", ["full", "causal-linear"])
def test_decoder(kind, cross):
    decoder = TransformerDecoderBuilder.from_kwargs(
        self_attention_type=kind, cross_attention_type=cross, length_limit=4, **SIZES
    )
    decoder = decoder.get().double().eval()
    masks = {"x_length_mask": LengthMask(LENGTHS), "memory_length_mask": LengthMask(LENGTHS)}
    masks["x_mask"] = TriangularCausalMask(SIZE)
    x, memory = torch.randn(2, 3, SIZE, 16, dtype=torch.float64)
    expected = decoder(x, memory, **masks)
    same(decoder(repad(x, None), repad(memory, None), **masks), expected)


@pytest.mark.parametrize("cross", ["full", "linear", "conditional-full:linear"])
def test_recurrent_decoder(cross):
    decoder = RecurrentDecoderBuilder.from_kwargs(
        cross_attention_type=cross, attention_dropout=0.0, length_limit=2, **SIZES
    )
    decoder = decoder.get().double().eval()
    x, memory = torch.randn(2, 3, SIZE, 16, dtype=torch.float64)
    content = torch.nan if cross == "linear" else None
    outputs = []
    for padded in (memory, repad(memory, content)):
        state = None
        for i in range(3):
            out, state = decoder(x[:, i], padded, LengthMask(LENGTHS), state)
            outputs.append(out)
    assert all(torch.equal(outputs[i], outputs[i + 3]) for i in range(3))
