"""The product that other projects call directly."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fast_transformers.causal_product import CausalDotProduct, causal_dot_product

N, H, L, F, M = 2, 3, 70, 4, 5


def inputs(dtype=torch.float64, length=L):
    return [torch.randn(N, H, length, d, dtype=dtype) for d in (F, F, M)]


def plain(q, k, v):
    return (q @ k.mT).tril() @ v


@pytest.mark.parametrize("apply", [causal_dot_product, CausalDotProduct.apply])
@pytest.mark.parametrize("length", [1, 64, L])
def test_values_and_gradients(apply, length):
    results = []
    for function in (apply, plain):
        torch.manual_seed(1)
        leaves = [x.requires_grad_() for x in inputs(length=length)]
        out = function(*leaves)
        # the gradient of a plain sum is expanded from one number
        results.append((out, *torch.autograd.grad(out.sum() + out.square().sum(), leaves)))
    assert_close(*results)


def test_strides_do_not_matter():
    q, k, v = inputs()
    strided = [x.mT.contiguous().mT for x in (q, k, v)]
    assert_close(causal_dot_product(*strided), plain(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    q, k, v = inputs(dtype)
    out = causal_dot_product(q, k, v)
    assert out.dtype == dtype
    expected = plain(*(x.double() for x in (q, k, v)))
    eps = max(torch.finfo(dtype).eps, 1e-4)
    assert_close(out.double(), expected, rtol=eps, atol=eps)


def test_autocast_keeps_the_sums():
    q, k, v = inputs(torch.float32)
    expected = causal_dot_product(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal_dot_product(q, k, v), expected)


def test_functions_by_device():
    leaves = [x.requires_grad_() for x in inputs()]
    expected = plain(*leaves)
    gradient = torch.randn_like(expected)
    q, k, v = (x.detach() for x in leaves)
    product = torch.empty(N, H, L, M, dtype=torch.float64)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    for device in ("cpu", "cuda"):
        CausalDotProduct.dot[device](q, k, v, product)
        assert_close(product, expected.detach())
        CausalDotProduct.dot_backward[device](q, k, v, gradient, *gradients)
        expected_gradients = torch.autograd.grad(expected, leaves, gradient, retain_graph=True)
        assert_close(gradients, list(expected_gradients))


def test_what_does_not_fit():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="Q and K must have one length, got 69 and 70"):
        causal_dot_product(q[:, :, 1:], k, v)
    with pytest.raises(ValueError, match="values must have as many rows as keys"):
        causal_dot_product(q, k, v[:, :, 1:])
    with pytest.raises(ValueError, match=r"same number of features, got 4 .* 3"):
        causal_dot_product(q, k[..., 1:], v)
