"""Recurrent attention to a memory, and what the recurrent layers call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fast_transformers import ops
from fast_transformers.attention import FullAttention, LinearAttention
from fast_transformers.events import AttentionEvent, EventDispatcher
from fast_transformers.masking import LengthMask
from fast_transformers.recurrent.attention import (
    RecurrentAttentionLayer,
    RecurrentCrossAttentionLayer,
    RecurrentCrossConditionalFullAttention,
    RecurrentCrossFullAttention,
    RecurrentCrossLinearAttention,
)
from tests.support import make_qkv

N, L, S, H, E, M = 2, 6, 7, 3, 8, 5


def test_cross_linear_attention():
    q, k, v = make_qkv(L, S)
    attention = RecurrentCrossLinearAttention(E)
    lengths = LengthMask(torch.tensor([S, 3]))
    whole = LinearAttention(E)(q, k, v, None, None, lengths)
    out, state = attention(q[:, 0], k, v, lengths)
    assert_close(out, whole[:, 0])
    for i in range(1, L):
        out, state = attention(q[:, i], None, None, None, state)
        assert_close(out, whole[:, i])
    features = (nn.functional.elu(k) + 1) * lengths.at_width(S)[:, :, None, None]
    first, second = state
    assert first.shape == (N, H, M, E)
    assert_close(first, torch.einsum("nshe,nshm->nhme", features, v))
    assert torch.equal(state[0], first)
    assert_close(second, features.sum(1))
    for old in ([first, second], (first, second), ops.LinearState(first.mT, second)):
        assert_close(attention(q[:, -1], None, None, None, old)[0], out)
    assert_close(state.reorder(torch.tensor([1, 0]))[0], first.flip(0))
    with pytest.raises(ValueError, match="keys and values must be given for the first query"):
        attention(q[:, 0], None, None, None)


def test_cross_full_attention():
    events = []
    EventDispatcher.get().listen(AttentionEvent, events.append)
    q, k, v = make_qkv(L, S)
    attention = RecurrentCrossFullAttention(attention_dropout=0.0)
    lengths = LengthMask(torch.tensor([S, 0]))
    whole = FullAttention(attention_dropout=0.0)(q, k, v, None, None, lengths)
    weights = events.pop().attention_matrix  # (N, H, L, S)
    state = None
    for i in range(L):
        keys = (k, v) if state is None else (None, None)
        out, state = attention(q[:, i], *keys, lengths, state)
        assert_close(out, whole[:, i])
        assert_close(events[i].attention_matrix, weights[:, :, i].transpose(1, 2))
    assert not out[1].any()
    keys, values = state
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    assert torch.equal(attention(q[:, -1], None, None, lengths, [k, v])[0], out)
    with pytest.raises(ValueError, match="keys and values must be given for the first query"):
        attention(q[:, 0], None, None, lengths)


@pytest.mark.parametrize("size", [3, 4])
def test_cross_conditional_attention(size):
    q, k, v = make_qkv(L, size)
    attention = RecurrentCrossConditionalFullAttention(
        RecurrentCrossLinearAttention(E), 3, attention_dropout=0.0
    )
    full = FullAttention(attention_dropout=0.0)(q, k, v, None, None, None)
    linear = LinearAttention(E)(q, k, v, None, None, None)
    out, state = attention(q[:, 0], k, v, None)
    for i in range(L):
        expected = full if size <= 3 and i < 3 else linear
        assert_close(out, expected[:, i])
        if i + 1 < L:
            out, state = attention(q[:, i + 1], None, None, None, state)


def test_layers():
    """What the inner attentions are called with."""
    calls = []

    def inner(q, k, v, *rest):
        calls.append((q, k, v, *rest))
        return torch.ones(N, H, M), "new"

    x, memory = torch.randn(N, 12), torch.randn(N, S, 10)
    layer = RecurrentAttentionLayer(inner, 12, H, E, M, event_dispatcher="")
    y, state = layer(x, x, x, "old")
    assert state == "new"
    assert y.shape == (N, 12)
    assert [t.shape for t in calls[0][:3]] == [(N, H, E), (N, H, E), (N, H, M)]
    assert calls[0][3:] == ("old",)
    cross = RecurrentCrossAttentionLayer(inner, 12, H, E, M, 10)
    cross(x, memory, memory, "lengths")
    assert [t.shape for t in calls[1][:3]] == [(N, H, E), (N, S, H, E), (N, S, H, M)]
    assert calls[1][3:] == ("lengths", None)
    cross(x, memory, memory, "lengths", state="old")
    assert calls[2][1:] == (None, None, "lengths", "old")
