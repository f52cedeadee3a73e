"""What models remember: one state for training on segments, prefill, streaming and generation."""

from .cache import KeysValues
from .parts import (
    ConditionalState,
    CrossConditionalState,
    CrossLinearState,
    Memory,
    RotaryState,
)
from .state import State, open_state

__all__ = [
    "ConditionalState",
    "CrossConditionalState",
    "CrossLinearState",
    "KeysValues",
    "Memory",
    "RotaryState",
    "State",
    "open_state",
]
