"""The builders, and options that make small models."""

from fast_transformers.builders import (
    AttentionBuilder,
    RecurrentAttentionBuilder,
    RecurrentCrossAttentionBuilder,
    RecurrentDecoderBuilder,
    RecurrentEncoderBuilder,
    TransformerDecoderBuilder,
    TransformerEncoderBuilder,
)

ATTENTION = [AttentionBuilder, RecurrentAttentionBuilder, RecurrentCrossAttentionBuilder]
ENCODERS = [TransformerEncoderBuilder, RecurrentEncoderBuilder]
DECODERS = [TransformerDecoderBuilder, RecurrentDecoderBuilder]
MODELS = [*ENCODERS, *DECODERS]
SMALL = {
    "n_layers": 2, "n_heads": 2, "query_dimensions": 6, "value_dimensions": 5,
    "feed_forward_dimensions": 7,
}  # fmt: skip
