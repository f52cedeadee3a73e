"""The operators as compilers see them, and the formulas inside against the public maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fast_transformers.feature_maps import (
    PROJECTIONS,
    ActivationFunctionFeatureMap,
    Favor,
    FeatureMap,
    GeneralizedRandomFeatures,
    RandomFourierFeatures,
    SmoothedRandomFourierFeatures,
    elu_feature_map,
)
from fast_transformers.ops import Formula
from fast_transformers.ops.call import Settings
from fast_transformers.ops.formula import LOG2E
from fast_transformers.ops.kinds import KINDS
from tests.support import make_qkv

OPERATORS = torch.ops.fast_transformers
TESTED_ELSEWHERE = ("redraw", "step", "step_", "fused", "fused_backward")
E = 8
MAPS: dict[str, Callable[[int], FeatureMap]] = {
    "elu_plus_one": elu_feature_map,
    "relu": ActivationFunctionFeatureMap.factory(torch.relu),
    "projected_relu": GeneralizedRandomFeatures.factory(n_dims=12, softmax_temp=0.7),
    "fourier": RandomFourierFeatures.factory(n_dims=12),
    "smoothed_fourier": SmoothedRandomFourierFeatures.factory(n_dims=9, smoothing=0.3),
    "hyperbolic": Favor.factory(n_dims=12),
}


class Case(NamedTuple):
    """Arguments of the operators, by what they have in them."""

    kind: str
    length: int = 5
    mask: bool = False
    state: bool = False
    groups: int = 1
    keep: bool = True
    chunk: int = 0
    normalised: bool = True
    dtype: torch.dtype = torch.float32
    strided: bool = False

    def __str__(self) -> str:
        given = (f"{n}={x}" for n, x in self._asdict().items() if x != self._field_defaults.get(n))
        return ",".join(given)


def calls(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator and its arguments; those of backward passes come from the forward pass."""
    q, k, v = make_qkv(case.length, H=4, E=E, dtype=case.dtype, strided=case.strided)
    k, v = k[:, :, :: case.groups], v[:, :, :: case.groups]
    formula = MAPS[case.kind](E).formula() if case.kind in MAPS else Formula(case.kind)
    assert formula is not None
    settings = Settings(case.kind, formula.numbers, case.chunk, 0.1, case.normalised, case.keep)
    constants = (*settings, formula.projection)
    mask = torch.rand(k.shape[:2]) > 0.3 if case.mask else None
    state, exponential = (None, None, None), KINDS[case.kind].exponential
    if case.state:
        kv, z, shift = OPERATORS.accumulate(*constants, None, *make_earlier(k, v), *state)
        state = kv, z, shift if exponential else None

    def run(name: str, *args: Any) -> tuple[Tensor, ...]:
        operator = getattr(OPERATORS, name).default
        found.append((operator, (*constants, *args)))
        results = operator(*constants, *args)
        assert not any(x.isnan().any() for x in results)
        return results

    found: list[tuple[Any, tuple[Any, ...]]] = []
    out, kv, z, shift, *kept = run("causal", mask, q, k, v, *state)
    if case.keep:
        given = (torch.randn_like(kv), torch.randn_like(z)) if case.state else (None, None)
        run("causal_backward", mask, q, k, v, shift, out, *kept, torch.randn_like(out), *given)
    kv, z, shift = run("accumulate", mask, k, v, *state)
    d_kv, d_z = torch.randn_like(kv), torch.randn_like(z)
    run("accumulate_backward", mask, k, v, shift, d_kv, d_z)
    final = kv, z, shift if exponential else None
    out, norm = run("attend", q, *final)
    if case.keep:
        run("attend_backward", q, *final, out, norm, torch.randn_like(out))
    return found


def make_earlier(k: Tensor, v: Tensor) -> list[Tensor]:
    """Keys and values that went before."""
    return [torch.randn(x.shape[0], 3, *x.shape[2:]).to(x.dtype) for x in (k, v)]


COMPILED = [
    Case("hyperbolic", length=300, mask=True, state=True, groups=2),
    Case("identity", normalised=False),
    Case("relu", length=0, state=True),
    Case("elu_plus_one", length=70, mask=True, groups=2, dtype=torch.bfloat16),
    Case("logarithm", mask=True, state=True),
    Case("projected_relu", length=1, groups=4),
    Case("smoothed_fourier", state=True, dtype=torch.float64),
    Case("fourier", length=70, chunk=16, strided=True),
]
OPTIONS = [
    {"length": 0, "state": True, "groups": 2},
    {"length": 1, "mask": True, "dtype": torch.bfloat16},
    {"length": 70, "mask": True, "state": True, "groups": 2, "keep": False},
    {"length": 300, "keep": False, "strided": True},
    {"length": 300, "mask": True, "state": True, "groups": 4},
]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_operators_pass_opcheck(case: Case) -> None:
    """All of it; as a run in a compiled graph takes long, of every third operator."""
    first = COMPILED.index(case) % 3
    for operator, args in calls(case)[first::3]:
        opcheck(operator, args)


@pytest.mark.parametrize("options", range(len(OPTIONS)))
@pytest.mark.parametrize("kind", KINDS)
def test_options_pass_opcheck(kind: str, options: int) -> None:
    """All but that run: the schema, and shapes, strides and dtypes of fake results."""
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, args in calls(Case(kind, **OPTIONS[options])):
        opcheck(operator, args, test_utils=utilities)


def test_every_operator_is_checked() -> None:
    names = {operator.name() for operator, _ in calls(COMPILED[0])}
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name for name in registered if name.startswith("fast_transformers::")}
    elsewhere = {f"fast_transformers::{name}" for name in TESTED_ELSEWHERE}
    assert names == ours - elsewhere
    assert sorted(case.kind for case in COMPILED) == sorted(KINDS)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_redraw_passes_opcheck(calls: int, projection: str) -> None:
    """Every second call draws, but for the first."""
    omega, seed = torch.randn(4, 6), torch.tensor(3)
    counter, known = torch.tensor(calls), torch.tensor(-1)
    before, constants = omega.clone(), (seed, 0, 2, projection, 1)
    copies = omega.clone(), counter.clone(), known.clone()
    opcheck(OPERATORS.redraw.default, (*copies, *constants))
    OPERATORS.redraw(omega, counter, known, *constants)
    assert int(counter) == calls + 1
    assert int(known) == (3 if calls == 2 else -1)
    assert torch.equal(omega, before) is (calls != 2)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("of", ["queries", "keys"])
@pytest.mark.parametrize("name", KINDS)
def test_formulas_are_the_public_maps(name: str, of: str, rows: int) -> None:
    """Value and pull-back; exponential kinds give log2 and are pulled back from natural logs."""
    formula, function = Formula(name), torch.clone
    if name in MAPS:
        public = MAPS[name](E).double()
        formula = public.formula()
        assert formula.kind == name
        assert public.exponential is KINDS[name].exponential
        assert KINDS[name].width(formula, E) == public.feature_dims
        function = getattr(public, f"log_{of}" if public.exponential else f"forward_{of}")
    kind = KINDS[name](formula, torch.float64)
    x = torch.randn(2, 3, rows, E, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[0], x[1, 0, 0] = x[0] * 5, 0.0
    expected = function(x)
    weights = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    with torch.no_grad():
        rows_of_x = x.clone()
        phi = getattr(kind, of)(rows_of_x)
        unit = LOG2E if kind.exponential else 1.0
        torch.testing.assert_close(phi, expected * unit, rtol=1e-12, atol=1e-12)
        assert kind.exponential or not kind.positive or (phi >= 0).all()
        if of == "queries" and kind.exponential:
            shift = torch.randn(3, 1, phi.shape[-1], dtype=torch.float64)
            shifted = kind.queries(rows_of_x, shift)
            torch.testing.assert_close(shifted, phi + shift, rtol=1e-12, atol=1e-12)
        found = getattr(kind, f"{of}_back")(weights.clone(), phi, rows_of_x)
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-11)
        assert torch.equal(rows_of_x, x)  # inputs are not overwritten
