"""Products of many rows with weights, by either library."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fast_transformers.ops import products

ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "apart": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "few": lambda x: x[:1],
    "none": lambda x: x[:0],
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.mT.contiguous().mT,
    "laid out": products.laid_out,
    "a part": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rows", ROWS)
def test_product(rows, weights, dtype, monkeypatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    generator = torch.Generator().manual_seed(0)
    x = ROWS[rows](torch.randn(300, 5, dtype=dtype, generator=generator))
    w = WEIGHTS[weights](torch.randn(5, 7, dtype=dtype, generator=generator))
    found = products.product(x, w)
    assert found.dtype == dtype
    torch.testing.assert_close(found, x @ w)
    assert found.is_contiguous()
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    out = torch.full_like(found, torch.nan)
    assert products.product(x, w, out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, x @ w)
