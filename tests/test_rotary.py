"""Rotary positions."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fast_transformers.builders import RecurrentEncoderBuilder, TransformerEncoderBuilder
from fast_transformers.masking import TriangularCausalMask
from fast_transformers.rotary import RotaryEmbedding
from fast_transformers.utils import make_mirror

N, L = 2, 5


def test_rotary_depends_on_the_distance_alone():
    rotary = RotaryEmbedding(8)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    at = [x.expand(1, 60, 1, 8) for x in (q, k)]
    products = rotary(at[0])[0, :, 0] @ rotary(at[1])[0, :, 0].T
    for distance in (-20, -1, 0, 1, 20):
        diagonal = products.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products.diagonal(1)[0] != products.diagonal(2)[0]
    assert_close(rotary(at[0]).norm(dim=-1), at[0].norm(dim=-1))
    assert_close(rotary(at[0], start=7)[:, :5], rotary(at[0])[:, 7:12])
    assert torch.equal(rotary(at[0])[:, 0], at[0][:, 0])
    assert not rotary.state_dict()
    assert rotary(at[0].bfloat16()).dtype == torch.bfloat16
    x = torch.randn(1, 4, 2, 6, dtype=torch.float64)
    pairs = torch.complex(x[..., :3], x[..., 3:])
    speeds = torch.tensor([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)], dtype=torch.float64)
    angles = torch.arange(4)[:, None, None] * speeds
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    assert_close(RotaryEmbedding(6, base=100.0)(x), torch.cat([turned.real, turned.imag], -1))
    with pytest.raises(ValueError, match="must be even, got 7"):
        RotaryEmbedding(7)


@pytest.mark.parametrize("kind", ["full", "linear"])
def test_rotary_in_a_model(kind):
    """Softmax attention with rotary positions sees the order of tokens, linear one too."""
    options = {"attention_type": kind, "query_dimensions": 8, "rotary": True, "dropout": 0.0}
    model = TransformerEncoderBuilder.from_kwargs(n_layers=1, n_heads=2, **options).get().eval()
    assert not any("rotary" in name for name in model.state_dict())
    x = torch.randn(N, L, 128)
    swapped = x[:, [0, 2, 1, 3, 4]]
    assert not torch.allclose(model(x)[:, 0], model(swapped)[:, 0], atol=1e-4)
    recurrent = RecurrentEncoderBuilder.from_kwargs(n_layers=1, n_heads=2, **options).get().eval()
    make_mirror(model, recurrent)
    state = None
    for i in range(L):
        y, state = recurrent(x[:, i], state)
    last = model(x) if kind == "linear" else model(x, TriangularCausalMask(L))
    assert_close(y, last[:, -1], rtol=1e-4, atol=1e-5)
