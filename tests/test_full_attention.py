"""Softmax attention over whole sequences."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fast_transformers.attention import (
    FullAttention,
)
from fast_transformers.events import AttentionEvent
from fast_transformers.masking import BaseMask, FullMask, LengthMask, TriangularCausalMask
from tests.support import listen, make_full, make_qkv, plain_softmax

N, L, S, H, E = 2, 5, 7, 3, 8
SHAPES = [None, (L, S), (N, L, S), (N, 1, L, S), (1, H, L, S), (N, H, L, S)]


@pytest.mark.parametrize("listening", [False, True], ids=["", "listening"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_attention(shape, padded, listening):
    q, k, v = make_qkv(L, S, dtype=torch.float64)
    keep, mask, lengths = torch.ones(N, H, L, S, dtype=torch.bool), FullMask(L, S), None
    if shape is not None:
        matrix = torch.rand(shape) < 0.6
        matrix[..., 2, :] = False  # a query without any key
        mask = FullMask(matrix)
        keep &= matrix[:, None] if len(shape) == 3 else matrix
    if padded:
        lengths = LengthMask(torch.tensor([S, 3]), max_len=S)
        keep &= lengths.bool_matrix[:, None, None, :]
    events = listen() if listening else []
    attended = make_full()(q, k, v, mask, None, lengths)
    expected, weights = plain_softmax(q, k, v, keep)
    assert_close(attended, expected)
    assert attended.is_contiguous()
    if shape is not None:
        assert not attended[:, 2].any()
    for event in events:
        assert isinstance(event, AttentionEvent)
        assert_close(event.attention_matrix, weights)
    assert len(events) == listening


def test_a_mask_of_three_dimensions_has_no_heads():
    q, k, v = make_qkv(L, S, N=3, H=3)
    matrix = torch.rand(3, L, S) < 0.6
    expected, _ = plain_softmax(q, k, v, matrix[:, None])
    assert_close(make_full()(q, k, v, matrix, None, None), expected)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_full_causal_attention(padded):
    q, k, v = make_qkv(S)
    keep = torch.ones(N, 1, S, S, dtype=torch.bool).tril()
    lengths = LengthMask(torch.tensor([S, 0])) if padded else None
    if lengths is not None:
        keep[1] = False
    expected, _ = plain_softmax(q, k, v, keep)
    for mask in (TriangularCausalMask(S), keep[0, 0].new_ones(S, S).tril()):
        assert_close(make_full()(q, k, v, mask, None, lengths), expected)


@pytest.mark.parametrize(("temp", "used"), [(0.7, 0.7), (None, E**-0.5), (0, E**-0.5)])
def test_softmax_temp(temp, used):
    q, k, v = make_qkv(L, S)
    expected, _ = plain_softmax(q, k, v, temp=used)
    assert_close(make_full(softmax_temp=temp)(q, k, v, None, None, None), expected)


def test_dropout_of_full_attention():
    q, k, v = make_qkv(L, S)
    attention = FullAttention(attention_dropout=0.9)
    assert not torch.equal(*(attention(q, k, v, None, None, None) for _ in range(2)))
    events = listen()
    attention(q, k, v, None, None, None)
    assert (events[0].attention_matrix == 0).any()
    attention.eval()
    assert_close(attention(q, k, v, None, None, None), plain_softmax(q, k, v)[0])


def test_only_what_keeps_everything_may_have_another_shape():
    q, k, v = make_qkv(L, S)
    full, expected = make_full(), plain_softmax(q, k, v)[0]
    for mask in (FullMask(20), torch.ones(9, 9, dtype=torch.bool)):
        assert_close(full(q, k, v, mask, None, None), expected)
    for mask in (TriangularCausalMask(9), FullMask(torch.zeros(2, N, H, L, S) > 0)):
        with pytest.raises(ValueError, match=r"must have shape \(L, S\) = \(5, 7\).*build it"):
            full(q, k, v, mask, None, None)


def test_full_attention_does_not_look_into_masks(monkeypatch):
    def waits(self):
        raise AssertionError("this waits for the device")

    for name in ("all_ones", "lower_triangular"):
        monkeypatch.setattr(BaseMask, name, property(waits))
    q, k, v = make_qkv(S)
    lengths = LengthMask(torch.tensor([S, 3]))
    for mask in (TriangularCausalMask(S), FullMask(S), torch.rand(S, S) < 0.5):
        make_full()(q, k, v, mask, lengths, lengths)
