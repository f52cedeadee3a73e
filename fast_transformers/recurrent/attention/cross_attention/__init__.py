"""Recurrent attention to the output of an encoder."""

from .attention_layer import RecurrentCrossAttentionLayer
from .conditional_full_attention import RecurrentCrossConditionalFullAttention
from .full_attention import RecurrentCrossFullAttention
from .linear_attention import RecurrentCrossLinearAttention

__all__ = [
    "RecurrentCrossAttentionLayer",
    "RecurrentCrossConditionalFullAttention",
    "RecurrentCrossFullAttention",
    "RecurrentCrossLinearAttention",
]
