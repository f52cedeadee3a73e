"""What models remember: one state for training on segments, prefill, streaming and generation."""

from .cache import KeysValues
from .parts import (
    ConditionalState,
    CrossConditionalState,
    CrossLinearState,
    Memory,
    PositionState,
)
from .state import State, open_state

__all__ = [
    "ConditionalState",
    "CrossConditionalState",
    "CrossLinearState",
    "KeysValues",
    "Memory",
    "PositionState",
    "State",
    "open_state",
]
