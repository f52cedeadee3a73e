"""What tests of the kernels share: on a GPU if there is one, else run by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fast_transformers import ops
from fast_transformers.feature_maps import features_of
from fast_transformers.ops import Features, Formula, LinearState
from fast_transformers.ops.kinds import KINDS
from tests.ops.test_operators import MAPS
from tests.support import assert_as_accurate, differentiate, make_qkv

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = ops.why_not("triton", causal=True, length=1, keys=1, device=DEVICE)
MARKS = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    # numpy, by which the interpreter computes: of numbers that masks drop, and of its ways
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value) encountered:RuntimeWarning",
        "ignore:Conversion of an array with ndim:DeprecationWarning",
    ),
]
if REASON is None:
    from fast_transformers.ops.triton import launch

OPERATORS = torch.ops.fast_transformers
FUNCTIONS = {"full": ops.linear_attention, "causal": ops.causal_linear_attention}
TWO = ["elu_plus_one", "hyperbolic"]
E, M = 8, 5


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sequences of 65 tokens are already cut in two."""
    config = launch.config
    monkeypatch.setattr(launch, "SHORTEST", 32)
    monkeypatch.setattr(launch, "config", lambda *args: config(*args)._replace(programs=8))
    launch.forget()
    yield
    launch.forget()


def features(kind: str) -> Features:
    if kind in MAPS:
        return features_of(MAPS[kind](E).to(DEVICE))
    exponential = KINDS[kind].exponential
    return Features(exponential=exponential, any_heads=True, formula=Formula(kind))


def make(
    length: int, keys: int | None = None, positive: bool = False, **options: Any
) -> list[Tensor]:
    """Queries, keys and values; features of the kind identity have to be positive."""
    given = make_qkv(length, keys, **{"N": 1, "H": 2, "E": E, "M": M, **options})
    q, k, v = (x.to(DEVICE) for x in given)
    return [q.abs(), k.abs(), v] if positive else [q, k, v]


def check(
    function: Callable[..., ops.Attended], inputs: list[Tensor], log_size: float = 0.0
) -> None:
    """``function(*inputs, impl="triton")`` is as accurate as the reference in its dtype."""
    reference = partial(function, impl="reference")
    exact = differentiate(reference, [x.double() for x in inputs])
    plain = differentiate(reference, inputs)
    actual = differentiate(partial(function, impl="triton"), inputs)
    assert actual[0].dtype == inputs[2].dtype
    largest = max(float(x.abs().max()) for x in exact[2:] if x.numel())
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        size = largest if i >= 2 else None  # gradients are sums of terms that cancel
        operands = inputs[0].dtype
        assert_as_accurate(a, p, e, size=size, log_size=log_size, operands=operands)


def with_state(function: Callable[..., ops.Attended], state: LinearState, **options: Any) -> Any:
    """A function of queries, keys, values, and the sums of a state before them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, z: Tensor, impl: str) -> ops.Attended:
        shift = None if state.shift is None else state.shift.to(kv.dtype)
        given = LinearState(kv, z, shift)
        return function(q, k, v, state=given, impl=impl, **options)

    return attend
