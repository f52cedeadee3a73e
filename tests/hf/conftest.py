"""What several tests of training share."""

from __future__ import annotations

import pytest


@pytest.fixture
def few_copies(monkeypatch):
    """Copying tasks with 64 sequences an epoch."""
    from fast_transformers.hf import data

    draw = data._draw_copies
    monkeypatch.setattr(data, "_draw_copies", lambda n, *args: draw(64, *args))
