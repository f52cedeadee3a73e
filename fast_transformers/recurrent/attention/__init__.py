"""Recurrent attention, to the own past and to the output of an encoder."""

from .cross_attention import (
    RecurrentCrossAttentionLayer,
    RecurrentCrossConditionalFullAttention,
    RecurrentCrossFullAttention,
    RecurrentCrossLinearAttention,
)
from .self_attention import (
    RecurrentAttentionLayer,
    RecurrentConditionalFullAttention,
    RecurrentFullAttention,
    RecurrentLinearAttention,
)

__all__ = [
    "RecurrentAttentionLayer",
    "RecurrentConditionalFullAttention",
    "RecurrentCrossAttentionLayer",
    "RecurrentCrossConditionalFullAttention",
    "RecurrentCrossFullAttention",
    "RecurrentCrossLinearAttention",
    "RecurrentFullAttention",
    "RecurrentLinearAttention",
]
