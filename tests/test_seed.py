"""The two builders of the feature-map document, as printed there."""

from functools import partial

import torch

from fast_transformers.builders import TransformerEncoderBuilder
from fast_transformers.feature_maps import Favor


def test_both_ways_to_pass_a_map() -> None:
    first = TransformerEncoderBuilder.from_kwargs(
        attention_type="linear",
        n_layers=4,
        n_heads=8,
        query_dimensions=32,
        feature_map=Favor.factory(n_dims=256),
    ).get()
    second = TransformerEncoderBuilder.from_kwargs(
        attention_type="linear",
        n_layers=4,
        n_heads=8,
        query_dimensions=32,
        feature_map=partial(Favor, n_dims=256),
    ).get()
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 50, 8 * 64)
    with torch.no_grad():
        torch.testing.assert_close(first.eval()(x), second.eval()(x))
    assert first.layers[0].attention.inner_attention.feature_map.feature_dims == 256
