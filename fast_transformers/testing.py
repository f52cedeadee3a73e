"""One conformance suite for feature maps, the package's own and yours.

    from fast_transformers.testing import check_feature_map

    def test_my_map():
        check_feature_map(MyMap.factory(n_dims=64), query_dimensions=16)

needs no test framework: a failed check raises ``AssertionError`` with a sentence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ops
from .feature_maps import build_feature_map, draw, features_of, with_positions


def check_feature_map(
    factory: Callable[[int], Any] | None, query_dimensions: int = 16, *, draws: int = 400
) -> None:
    """Put the map that ``factory`` makes through every check of this module.

    Args:
        factory: what an attention would be given as ``feature_map``.
        query_dimensions: E of the trial.
        draws: how often a random map is redrawn to estimate its mean.

    Raises:
        AssertionError: with a sentence that says what does not hold.
    """
    make = partial(build_feature_map, factory, query_dimensions)
    for check in (check_shapes, check_tokens_are_independent, check_forms_agree, check_redraws):
        check(make())
    if _has_kernel(make()):
        check_kernel(make(), draws)


def check_shapes(feature_map: Any) -> None:
    """Queries and keys get the same number of features, whole sequences and single tokens."""
    draw(feature_map, torch.device("cpu"))
    x = _vectors(feature_map, 2, 5, 3)
    phi_q, phi_k = feature_map.forward_queries(x), feature_map.forward_keys(x)
    step = feature_map.forward_queries(x[:, 0])
    dims = getattr(feature_map, "feature_dims", phi_q.shape[-1])
    shape = (*x.shape[:-1], dims)
    _hold(phi_q.shape == shape, f"queries {tuple(x.shape)} must become {dims} features")
    _hold(phi_k.shape == phi_q.shape, f"keys must become {dims} features, as queries do")
    _hold(step.shape == (2, *shape[2:]), "a single token (N, H, E) must become (N, H, F)")


def check_tokens_are_independent(feature_map: Any) -> None:
    """The features of a token do not depend on the other tokens of the call."""
    draw(feature_map, torch.device("cpu"))
    x = _vectors(feature_map, 2, 6, 3)
    for encode in (feature_map.forward_queries, feature_map.forward_keys):
        whole, start, token = encode(x), encode(x[:, :4]), encode(x[:, 5])
        _close(start, whole[:, :4], "the first tokens, alone and in a longer sequence")
        _close(token, whole[:, 5], "one token, alone and in a sequence")


def check_forms_agree(feature_map: Any) -> None:
    """Chunked, quadratic and recurrent attention agree, and so do the gradients, in float64."""
    if isinstance(feature_map, torch.nn.Module):
        feature_map = copy.deepcopy(feature_map).double()
    draw(feature_map, torch.device("cpu"))
    inputs = [_vectors(feature_map, 2, 13, 2, seed).double() for seed in range(2)]
    inputs.append(_directions(feature_map, 2, 13, 2, seed=2).double())
    weights = [p for p in getattr(feature_map, "parameters", list)() if p.requires_grad]
    for function in (ops.linear_attention, ops.causal_linear_attention):
        results = {}
        for impl in ("reference", "chunked", "recurrent"):
            leaves = [x.clone().requires_grad_() for x in inputs]
            # eps differs in meaning between features and their logarithms
            call = partial(function, features=features_of(feature_map), eps=0.0, impl=impl)
            options = {} if impl == "recurrent" else {"chunk_size": 4}
            out = call(*leaves, **options).values
            gradients = torch.autograd.grad(
                out.square().sum(), [*leaves, *weights], materialize_grads=True
            )
            results[impl] = [out, *gradients]
        for impl in ("chunked", "recurrent"):
            for got, expected in zip(results[impl], results["reference"], strict=True):
                _close(got, expected, f"{function.__name__}, {impl} and reference form")


def check_redraws(feature_map: Any) -> None:
    """Queries and keys share one draw, evaluation is repeatable, checkpoints carry the draw."""
    device = torch.device("cpu")
    if not hasattr(feature_map, "state_dict"):
        return
    draw(feature_map, device)
    feature_map.train(False)
    x = _vectors(feature_map, 1, 3, 1)
    draw(feature_map, device)
    first = feature_map.forward_keys(x)
    _close(feature_map.forward_keys(x), first, "two encodings after one new_feature_map")
    twin = copy.deepcopy(feature_map)
    draw(feature_map.train(), device)
    draw(feature_map, device)
    twin.load_state_dict(feature_map.state_dict())
    _close(twin.forward_keys(x), feature_map.forward_keys(x), "a map and its checkpoint")


def check_kernel(feature_map: Any, draws: int = 400) -> None:
    """phi(x).phi(y) is the kernel: exactly, or on average within five standard errors.

    Half of the pairs are those where a wrong scale, sign or sampler shows: y = x, where some
    features have no variance, and vectors whose entries have one sign, where a projection with a
    mean is biased. They are short: the mean of 400 draws of exponentials of long ones is far from
    normal, and right maps would fail.
    """
    x = 0.4 * _directions(feature_map, 8, 1, 1)
    y = 0.4 * _directions(feature_map, 8, 1, 1, seed=1)
    y[:2] = x[:2]
    x[2:4], y[2:4] = x[2:4].abs(), y[2:4].abs()
    x[4:5], y[4:5] = -x[4:5].abs(), -y[4:5].abs()
    x, y = with_positions(feature_map, x), with_positions(feature_map, y, 1)
    estimates = []
    for _ in range(draws):
        draw(feature_map, torch.device("cpu"))
        with torch.no_grad():
            phi = feature_map.forward_queries(x) * feature_map.forward_keys(y)
            estimates.append(phi.sum(-1).flatten())
    estimate = torch.stack(estimates).double()
    kernel = feature_map.kernel(x, y).detach().double().flatten()
    allowed = 5 * estimate.std(0) / draws**0.5 + 1e-5 * kernel.abs() + 1e-6
    error = (estimate.mean(0) - kernel).abs()
    worst = int((error / allowed).argmax())
    _hold(
        bool((error <= allowed).all()),
        f"phi(x).phi(y) must be {kernel[worst]:.5g} on average, is {estimate.mean(0)[worst]:.5g} "
        f"in {draws} draws, {float(error[worst] / allowed[worst]) * 5:.1f} standard errors off",
    )


def _has_kernel(feature_map: Any) -> bool:
    x = _vectors(feature_map, 1, 1, 1)
    try:
        feature_map.kernel(x, x)
    except (AttributeError, NotImplementedError):
        return False
    return True


def _vectors(feature_map: Any, n: int, length: int, heads: int, seed: int = 0) -> Tensor:
    """Inputs (n, length, heads, E), with positions behind for a map that uses them."""
    return with_positions(feature_map, _directions(feature_map, n, length, heads, seed))


def _directions(feature_map: Any, n: int, length: int, heads: int, seed: int = 0) -> Tensor:
    """Normal vectors; of as many heads as the map tells apart, if it does."""
    generator = torch.Generator().manual_seed(seed)
    heads = getattr(feature_map, "heads", None) or heads
    dims = getattr(feature_map, "query_dimensions", None) or feature_map.query_dims
    return torch.randn(n, length, heads, dims, generator=generator)


def _close(got: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        got, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{what} must agree: {text}"
    )


def _hold(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)
