"""Named maps, where CPUs differ in how they compute them."""

from __future__ import annotations

import pytest
import torch

from fast_transformers.ops import Formula, kinds, processor


@pytest.mark.parametrize("length", [100, 10_000])
@pytest.mark.parametrize("slow", [False, True])
def test_elu_plus_one_by_either_exponential(slow, length, monkeypatch) -> None:
    monkeypatch.setattr(processor, "mkl_is_slow", lambda: slow)
    x = torch.linspace(-80, 20, length)
    found = kinds.EluPlusOne(Formula("elu_plus_one"), x.dtype).value(x)
    exact = torch.where(x > 0, x.double() + 1, x.double().exp())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
