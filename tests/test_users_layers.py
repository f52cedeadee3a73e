"""Layers and models that users derive from those of this package."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fast_transformers.attention import AttentionLayer
from fast_transformers.builders import TransformerEncoderBuilder
from fast_transformers.builders.transformer_builders import BaseTransformerEncoderBuilder
from fast_transformers.events import QKVEvent
from fast_transformers.masking import FullMask, LengthMask, TriangularCausalMask
from fast_transformers.transformers import (
    TransformerEncoder,
    TransformerEncoderLayer,
)

N, L = 2, 5


class OldAttentionLayer(AttentionLayer):
    """As public code subclasses it: no other arguments than the older library's."""

    def __init__(self, attention, d_model, n_heads, d_keys=None, d_values=None,
                 d_model_keys=None, event_dispatcher=""):  # fmt: skip
        super().__init__(
            attention, d_model, n_heads, d_keys=d_keys, d_values=d_values,
            d_model_keys=d_model_keys, event_dispatcher=event_dispatcher,
        )  # fmt: skip

    def forward(self, queries, keys, values, attn_mask, query_lengths, key_lengths):
        n, length, _ = queries.shape
        q = self.query_projection(queries).view(n, length, self.n_heads, -1)
        k = self.key_projection(keys).view(n, length, self.n_heads, -1)
        v = self.value_projection(values).view(n, length, self.n_heads, -1)
        self.event_dispatcher.dispatch(QKVEvent(self, q, k, v))
        out = self.inner_attention(q, k, v, attn_mask, query_lengths, key_lengths)
        return self.out_projection(out.view(n, length, -1))


class OldEncoderLayer(TransformerEncoderLayer):
    def __init__(self, attention, d_model, d_ff=None, dropout=0.1, activation="relu",
                 event_dispatcher=""):  # fmt: skip
        super().__init__(attention, d_model, d_ff, dropout, activation, event_dispatcher)

    def forward(self, x, attn_mask=None, length_mask=None):
        attn_mask = attn_mask or FullMask(x.shape[1], device=x.device)
        lengths = x.new_full((x.shape[0],), x.shape[1], dtype=torch.int64)
        length_mask = length_mask or LengthMask(lengths)
        x = x + self.dropout(
            self.attention(
                x, x, x, attn_mask=attn_mask, query_lengths=length_mask, key_lengths=length_mask
            )
        )
        y = x = self.norm1(x)
        y = self.dropout(self.activation(self.linear1(y)))
        return self.norm2(x + self.dropout(self.linear2(y)))


class OldEncoder(TransformerEncoder):
    def __init__(self, layers, norm_layer=None, event_dispatcher=""):
        super().__init__(layers, norm_layer, event_dispatcher)

    def forward(self, x, attn_mask=None, length_mask=None):
        for layer in self.layers:
            x = layer(x, attn_mask=attn_mask, length_mask=length_mask)
        return self.norm(x)


class OldBuilder(BaseTransformerEncoderBuilder):
    def _get_attention_builder(self):
        return TransformerEncoderBuilder()._get_attention_builder()

    def _get_attention_layer_class(self):
        return OldAttentionLayer

    def _get_encoder_class(self):
        return OldEncoder

    def _get_encoder_layer_class(self):
        return OldEncoderLayer


@pytest.mark.parametrize("kind", ["full", "linear", "causal-linear"])
def test_users_subclasses(kind):
    options = {
        "attention_type": kind, "n_layers": 2, "n_heads": 2, "query_dimensions": 8,
        "value_dimensions": 8,
    }  # fmt: skip
    old = OldBuilder.from_kwargs(**options).get().eval()
    assert type(old) is OldEncoder
    assert type(old.layers[1]) is OldEncoderLayer
    assert type(old.layers[1].attention) is OldAttentionLayer
    new = TransformerEncoderBuilder.from_kwargs(**options).get().eval()
    new.load_state_dict(old.state_dict())
    mask = TriangularCausalMask(L) if kind == "causal-linear" else None
    x, lengths = torch.randn(N, L, 16), LengthMask(torch.tensor([L, 2]), max_len=L)
    assert_close(old(x, mask, lengths), new(x, mask, lengths))


def test_builders_without_their_hooks():
    with pytest.raises(NotImplementedError, match="_get_attention_builder"):
        BaseTransformerEncoderBuilder()
