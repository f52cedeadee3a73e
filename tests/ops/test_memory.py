"""The chunked form never holds all features, an L x L matrix, or a state per token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fast_transformers import ops
from fast_transformers.feature_maps import Favor, elu_feature_map, features_of
from tests.support import make_qkv

L, E, M, F = 2200, 8, 8, 256


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize("function", [ops.linear_attention, ops.causal_linear_attention])
@pytest.mark.parametrize("factory", [elu_feature_map, Favor.factory(n_dims=F)])
def test_no_large_tensor(function, factory) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(L, N=1, H=1, E=E, M=M))
    feature_map = factory(E)
    assert feature_map.feature_dims in (E, F)
    with LargestTensor() as largest:
        function(q, k, v, features_of(feature_map)).values.sum().backward()
    inputs, chunk_of_features = L * max(E, M), 256 * F
    assert largest.elements <= max(inputs, chunk_of_features) < L * F // 8
    with LargestTensor() as largest:
        function(q.exp(), k.exp(), v, impl="reference")
    assert largest.elements >= L * L
