"""Attention over whole sequences."""

from ..attention_registry.later import LATER_CLASSES
from .attention_layer import AttentionLayer
from .causal_linear_attention import CausalLinearAttention
from .conditional_full_attention import ConditionalFullAttention
from .full_attention import FullAttention
from .linear_attention import LinearAttention

__all__ = [
    "AttentionLayer",
    "CausalLinearAttention",
    "ConditionalFullAttention",
    "FullAttention",
    "LinearAttention",
]


def __getattr__(name: str) -> object:
    if name in LATER_CLASSES:
        raise AttributeError(f"{name} is not in this version; {LATER_CLASSES[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
