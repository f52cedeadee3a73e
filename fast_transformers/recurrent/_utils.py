"""Shared by the recurrent modules."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from ..attention.base import at_positions
from ..state.parts import Count


def check_state(state: Any = None, memory: Any = None) -> Any:
    """``state``, or the value of the deprecated argument ``memory`` if only that is given."""
    if memory is not None:
        warnings.warn("'memory' is deprecated, use 'state' instead", DeprecationWarning, 3)
    return memory if state is None else state


def at_position(feature_map: Any, x: Tensor, position: Count) -> Tensor:
    """One token (N, H, E) as a positional map wants it."""
    return at_positions(feature_map, x[:, None], None, position)[:, 0]
