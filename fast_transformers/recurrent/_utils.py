"""Shared by the recurrent modules."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from torch import Tensor

from ..feature_maps import draw, with_positions


def check_state(state: Any = None, memory: Any = None) -> Any:
    """``state``, or the value of the deprecated argument ``memory`` if only that is given."""
    if memory is not None:
        warnings.warn("'memory' is deprecated, use 'state' instead", DeprecationWarning, 3)
    return memory if state is None else state


def draw_once(feature_map: Any, device: Any) -> None:
    """Draw a map that cannot be used without; a live state never sees its features redrawn."""
    if not getattr(feature_map, "drawn", False):
        draw(feature_map, device)


class PositionState(NamedTuple):
    """The state of an attention, and the position of the next token.

    Attributes:
        attention: what the attention itself remembers, None before the first token.
        position: an int, or a tensor where the step is exported: its graph would fix an int.
    """

    attention: Any = None
    position: int | Tensor = 0

    @classmethod
    def of(cls, state: Any) -> PositionState:
        """``state``, or the beginning of a sequence for None."""
        return cls() if state is None else cls(*state)


def at_position(feature_map: Any, x: Tensor, position: int | Tensor) -> Tensor:
    """One token (N, H, E) as a positional map wants it."""
    return with_positions(feature_map, x[:, None], position)[:, 0]
