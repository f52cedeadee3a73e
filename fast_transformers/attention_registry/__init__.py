"""Which attention a builder makes for a name, and which parameters it takes.

An attention of your own becomes available to the builders by

    AttentionRegistry.register("mine", MyAttention, [("softmax_temp", Optional(Float))])

Parameters are shared by name among the attentions of one registry, so their specs must agree.
"""

from .registry import (
    AttentionRegistry,
    RecurrentAttentionRegistry,
    RecurrentCrossAttentionRegistry,
    Registry,
)
from .spec import (
    Bool,
    Callable,
    Choice,
    EventDispatcherInstance,
    Float,
    Int,
    Optional,
    Spec,
)

__all__ = [
    # registries, one for each attention builder
    "AttentionRegistry",
    "RecurrentAttentionRegistry",
    "RecurrentCrossAttentionRegistry",
    "Registry",
    # specs of parameters
    "Bool",
    "Callable",
    "Choice",
    "EventDispatcherInstance",
    "Float",
    "Int",
    "Optional",
    "Spec",
]
