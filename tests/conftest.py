from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the package and Triton are imported

from fast_transformers import ops
from fast_transformers.events import EventDispatcher

torch.set_num_threads(1)  # the tests run in one process per core


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    EventDispatcher.get().clear()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the package allocates and forgets to write shows up as NaN."""

    def poison(make):  # type: ignore[no-untyped-def]
        def poisoned(*args, **kwargs):  # type: ignore[no-untyped-def]
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return poisoned

    for module in (ops.chunked_backward, ops.summed):
        monkeypatch.setattr(module.torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
