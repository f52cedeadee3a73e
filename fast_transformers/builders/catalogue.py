"""Every attention of this package: its name, its class and its parameters, as one table."""

from __future__ import annotations

from ..attention import (
    CausalLinearAttention,
    ConditionalFullAttention,
    FullAttention,
    LinearAttention,
)
from ..attention_registry import (
    AttentionRegistry,
    Callable,
    EventDispatcherInstance,
    Float,
    Int,
    Optional,
    RecurrentAttentionRegistry,
    RecurrentCrossAttentionRegistry,
)
from ..attention_registry.later import LATER
from ..recurrent.attention import (
    RecurrentConditionalFullAttention,
    RecurrentCrossConditionalFullAttention,
    RecurrentCrossFullAttention,
    RecurrentCrossLinearAttention,
    RecurrentFullAttention,
    RecurrentLinearAttention,
)

EVENTS = ("event_dispatcher", Optional(EventDispatcherInstance, ""))
SOFTMAX = [("softmax_temp", Optional(Float)), ("attention_dropout", Optional(Float, 0.1)), EVENTS]
KERNEL = [("query_dimensions", Int), ("feature_map", Optional(Callable)), EVENTS]
CONDITIONAL = [("length_limit", Optional(Int, 512)), *SOFTMAX]

for registry, rows in (
    (
        AttentionRegistry,
        [
            ("full", FullAttention, SOFTMAX),
            ("linear", LinearAttention, KERNEL),
            ("causal-linear", CausalLinearAttention, KERNEL),
            ("conditional-full", ConditionalFullAttention, CONDITIONAL),
        ],
    ),
    (
        RecurrentAttentionRegistry,
        [
            ("full", RecurrentFullAttention, SOFTMAX),
            ("linear", RecurrentLinearAttention, KERNEL),
            ("causal-linear", RecurrentLinearAttention, KERNEL),
            ("conditional-full", RecurrentConditionalFullAttention, CONDITIONAL),
        ],
    ),
    (
        RecurrentCrossAttentionRegistry,
        [
            ("full", RecurrentCrossFullAttention, SOFTMAX),
            ("linear", RecurrentCrossLinearAttention, KERNEL),
            ("conditional-full", RecurrentCrossConditionalFullAttention, CONDITIONAL),
        ],
    ),
):
    registry.reserve(LATER)
    for key, cls, parameters in rows:
        registry.register(key, cls, parameters)
