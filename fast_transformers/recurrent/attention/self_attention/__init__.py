"""Recurrent attention to the own past."""

from .attention_layer import RecurrentAttentionLayer
from .conditional_full_attention import RecurrentConditionalFullAttention
from .full_attention import RecurrentFullAttention
from .linear_attention import RecurrentLinearAttention

__all__ = [
    "RecurrentAttentionLayer",
    "RecurrentConditionalFullAttention",
    "RecurrentFullAttention",
    "RecurrentLinearAttention",
]
