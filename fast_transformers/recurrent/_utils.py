"""Shared by the recurrent modules."""

from __future__ import annotations

import warnings
from typing import Any


def check_state(state: Any = None, memory: Any = None) -> Any:
    """``state``, or the value of the deprecated argument ``memory`` if only that is given."""
    if memory is not None:
        warnings.warn("'memory' is deprecated, use 'state' instead", DeprecationWarning, 3)
    return memory if state is None else state
