"""The kernels: on a GPU if there is one, else run by Triton's interpreter."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fast_transformers import ops
from fast_transformers.feature_maps import (
    ActivationFunctionFeatureMap,
    Favor,
    GeneralizedRandomFeatures,
    elu_feature_map,
    features_of,
)
from fast_transformers.ops import Features, Formula, LinearState
from fast_transformers.ops.call import Settings
from fast_transformers.ops.kinds import KINDS
from tests.maps import Asymmetric
from tests.ops.test_operators import MAPS
from tests.support import LENGTHS, assert_as_accurate, differentiate, make_qkv
from tests.test_compile import compiled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = ops.why_not("triton", causal=True, length=1, keys=1, device=DEVICE)
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    # numpy, by which the interpreter computes: of numbers that masks drop, and of its ways
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value) encountered:RuntimeWarning",
        "ignore:Conversion of an array with ndim:DeprecationWarning",
    ),
]
if REASON is None:
    from fast_transformers.ops.triton import launch, passes

OPERATORS = torch.ops.fast_transformers
FUNCTIONS = {"full": ops.linear_attention, "causal": ops.causal_linear_attention}
TWO = ["elu_plus_one", "hyperbolic"]
E, M = 8, 5
DTYPES = [("full", torch.float32), ("causal", torch.float32)]
DTYPES += [("causal", torch.bfloat16), ("full", torch.float16)]
if DEVICE.type == "cuda":  # the interpreter is slow
    DTYPES += [("full", torch.bfloat16), ("causal", torch.float16)]


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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


@pytest.fixture(scope="module")
def squared_relu() -> Callable[[Tensor], Tensor]:
    return runpy.run_path("examples/squared_relu.py")["squared_relu"]


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


@pytest.mark.parametrize(("function", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(function, kind, dtype) -> None:
    inputs = make(70, H=1, strided=True, dtype=dtype, positive=kind == "identity")
    check(partial(FUNCTIONS[function], features=features(kind)), inputs)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_lengths(function, kind, length) -> None:
    check(partial(FUNCTIONS[function], features=features(kind)), make(length, H=1, M=20))


@pytest.mark.parametrize(("queries", "keys"), [(7, 70), (70, 7), (0, 3), (3, 0)])
@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_cross_lengths(function, kind, queries, keys) -> None:
    check(partial(FUNCTIONS[function], features=features(kind)), make(queries, keys))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wide(function) -> None:
    """Several tiles of values and of query dimensions."""
    favor = features_of(Favor(72, n_dims=140, generator=3).to(DEVICE))
    check(partial(FUNCTIONS[function], features=favor), make(20, H=1, E=72, M=72), log_size=50.0)


@pytest.mark.parametrize(("e", "m"), [(256, 130), (40, 256), (160, 24)])
@pytest.mark.parametrize("kind", ["elu_plus_one", "hyperbolic"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_heads_of_many_dimensions(function, kind, e, m) -> None:
    feature_map = elu_feature_map(e) if kind == "elu_plus_one" else Favor(e, 70, generator=3)
    attend = partial(FUNCTIONS[function], features=features_of(feature_map.to(DEVICE)))
    check(attend, make(70, H=1, E=e, M=m, dtype=torch.bfloat16), log_size=50.0)


@pytest.mark.parametrize("std", [1, 3, 10])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_favor_is_exact_at_any_norm(function, std) -> None:
    favor = features_of(Favor(64, n_dims=32, generator=3).to(DEVICE))
    inputs = make(131, H=1, E=64, std=std)
    logs = float(favor.keys(inputs[1]).abs().max())
    check(partial(FUNCTIONS[function], features=favor), inputs, log_size=logs)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_queries_far_from_the_first_directions(function) -> None:
    """Their largest factors are 2^200 times those of the block that kernels look at first."""
    favor = Favor(64, n_dims=140, generator=3).to(DEVICE)
    q, k, v = make(70, H=1, E=64)
    first, last = favor.omega[:, :32], favor.omega[:, 69]
    last = last - first @ torch.linalg.lstsq(first, last).solution
    q[:, 5] = 60 * last / last.norm()
    logs = favor.log_queries(q[:, 5])[0, 0].unflatten(0, (2, 70))
    assert logs.max() - logs[:, :32].max() > 200 * math.log(2)
    logs = float(logs.abs().max())
    attend = partial(FUNCTIONS[function], features=features_of(favor))
    check(attend, [q, k, v], log_size=logs)


@pytest.mark.parametrize("times", [1.0, 1.3, 1.7])
def test_a_key_far_from_the_others(times) -> None:
    """Its |x|^2/2 is up to 2^130 from theirs, and yet its largest feature is among the largest."""
    favor = Favor(64, n_dims=32, generator=3).to(DEVICE)
    q, k, v = make(131, H=1, E=64)
    k[:, [5, 100]] = times * favor.omega[:, 7] * 64**0.25
    q[:, 20] = k[:, 5] / 8
    logs = float(favor.log_keys(k).abs().max())
    attend = partial(FUNCTIONS["causal"], features=features_of(favor))
    check(attend, [q, k, v], log_size=logs)


def with_state(function: Callable[..., ops.Attended], state: LinearState, **options: Any) -> Any:
    """A function of queries, keys, values, and the sums of a state before them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, z: Tensor, impl: str) -> ops.Attended:
        shift = None if state.shift is None else state.shift.to(kv.dtype)
        given = LinearState(kv, z, shift)
        return function(q, k, v, state=given, impl=impl, **options)

    return attend


@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_states_masks_and_groups(function, kind) -> None:
    """Masked keys and values may hold anything; the final state is that of other forms."""
    phi, attend = features(kind), FUNCTIONS[function]
    q, k, v = make(70, N=2)
    k, v = k[:, :, :1], v[:, :, :1]
    mask = torch.rand(2, 70, device=DEVICE) > 0.3
    mask[0, 40:] = mask[1, :66] = False
    k[~mask] = v[~mask] = torch.nan
    earlier = ops.linear_attention(*make(9, N=2, H=1, seed=1), phi).state
    options = {"features": phi, "key_mask": mask}
    check(with_state(attend, earlier, **options), [q, k, v, earlier.kv, earlier.z])
    states = [
        attend(q, k, v, state=earlier, impl=impl, **options).state for impl in ("triton", "auto")
    ]
    for a, b in zip(*states, strict=True):  # the true sums
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_packed_sequences(function, kind, monkeypatch) -> None:
    """Each with a state; one is empty; keys with boundaries of their own where that can be."""
    phi, attend = features(kind), FUNCTIONS[function]
    starts = torch.tensor([0, 66, 66, 69, 80], device=DEVICE)
    options = {"features": phi, "cu_seqlens": starts}
    keys = 80
    if function == "full":
        keys, options["cu_seqlens_keys"] = 72, starts.new_tensor([0, 3, 69, 69, 72]).int()
    q, k, v = make(80, keys, H=2)
    options["key_mask"] = torch.rand(1, keys, device=DEVICE) > 0.3
    earlier = ops.linear_attention(*make(9, N=4, H=1, seed=1), phi).state
    inputs = [q, k[:, :, :1], v[:, :, :1], earlier.kv, earlier.z]
    check(with_state(attend, earlier, **options), inputs)
    monkeypatch.setattr(ops.packed, "packed", None)  # nothing is gathered
    attend(*inputs[:3], **options, impl="triton")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nested_tensors(function) -> None:
    rows = [make(n, seed=n) for n in (3, 70)]
    inputs = [torch.cat(x, 1)[0] for x in zip(*rows, strict=True)]
    offsets = torch.tensor([0, 3, 73], device=DEVICE)
    nested = [torch.nested.nested_tensor_from_jagged(x, offsets) for x in inputs]
    phi = features("elu_plus_one")
    values, _ = FUNCTIONS[function](*nested, phi, impl="triton")
    for one, alone in zip(values.unbind(), rows, strict=True):
        expected = FUNCTIONS[function](*alone, phi, impl="reference").values[0]
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_maps_without_a_formula(function, exponential) -> None:
    """Torch computes the features; weights inside receive gradients."""
    inner = Asymmetric(E).to(DEVICE)
    q, k, v = make(70)
    mask = torch.rand(1, 70, device=DEVICE) > 0.3

    def attend(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor, impl: str) -> ops.Attended:
        def phi(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, weight, bias).sigmoid() + 0.1

        halves = partial(zip, ("weight", "bias"), strict=True)
        of_queries, of_keys = dict(halves(weights[:2])), dict(halves(weights[2:]))
        maps = partial(phi, **of_queries), partial(phi, **of_keys)
        phi_of = Features(*maps, exponential=exponential, parameters=weights)
        return FUNCTIONS[function](q, k, v, phi_of, key_mask=mask, impl=impl)

    k[~mask] = v[~mask] = torch.nan
    check(attend, [q, k, v, *(x.detach() for x in inner.parameters())])


def test_maps_of_too_many_features() -> None:
    """Known only after torch has computed them; "auto" then takes another form."""
    many = Features(*[lambda x: x.abs().repeat(1, 1, 1, 70)] * 2)
    inputs = make(5)
    with pytest.raises(ValueError, match="kernels take 512 features, there are 560"):
        ops.linear_attention(*inputs, many, impl="triton")
    values, expected = (
        ops.linear_attention(*inputs, many, impl=i)[0] for i in ("auto", "reference")
    )
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_two_runs_are_the_same_to_the_bit(function) -> None:
    run = partial(FUNCTIONS[function], features=features("hyperbolic"), impl="triton")
    inputs = make(70)
    for a, b in zip(differentiate(run, inputs), differentiate(run, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_common_factors_cancel(function) -> None:
    """What multiplies all features of a query, or of all keys, does not change the values."""
    leaves = [x.requires_grad_() for x in make(131, std=2.0)]
    phi = features("logarithm")
    values = FUNCTIONS[function](*leaves, phi, impl="triton").values
    dq, dk, _ = torch.autograd.grad((values * torch.randn_like(values)).sum(), leaves)
    assert (dq.sum(-1).abs() <= 1e-5 * dq.abs().sum(-1) + 1e-6).all()
    assert (dk.sum((1, 3)).abs() <= 1e-5 * dk.abs().sum((1, 3))).all()


@pytest.mark.parametrize(
    ("kind", "causal", "options"),
    [
        ("hyperbolic", True, {"state": True, "mask": True}),
        ("elu_plus_one", False, {"dtype": torch.bfloat16}),
        ("relu", False, {"state": True, "packed": True}),
        ("logarithm", True, {"packed": True, "keep": False}),
    ],
)
def test_operators_pass_opcheck(kind, causal, options) -> None:
    phi, keep = features(kind), options.get("keep", True)
    q, k, v = make(20, H=1, dtype=options.get("dtype", torch.float32))
    assert phi.formula is not None
    constants = (*Settings(kind, phi.formula.numbers, 0, 0.1, True, keep), phi.formula.projection)
    starts = torch.tensor([0, 3, 20], device=DEVICE) if options.get("packed") else None
    state = (None, None, None)
    if options.get("state"):
        earlier = ops.linear_attention(
            *make(9, N=1 if starts is None else 2, H=1, seed=1), phi
        ).state
        state = earlier.kv, earlier.z, earlier.shift
    mask = torch.rand(1, 20, device=DEVICE) > 0.3 if options.get("mask") else None
    tensors = (mask, q, k, v, *state, starts, starts)
    opcheck(OPERATORS.fused.default, (*constants, *tensors, causal))
    if keep:
        out, *rest = OPERATORS.fused(*constants, *tensors, causal)
        given = (torch.randn_like(out), torch.randn_like(rest[0]), torch.randn_like(rest[1]))
        opcheck(
            OPERATORS.fused_backward.default,
            (*constants, *tensors, out, *rest, *given, causal, False),
        )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("name", "packed"), [("favor", True), ("asymmetric", False)])
def test_one_graph_serves_every_length(name, packed) -> None:
    torch._dynamo.reset()
    feature_map = {"favor": Favor, "asymmetric": Asymmetric}[name](E).to(DEVICE)

    def loss(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        phi = features_of(feature_map)
        attended = ops.causal_linear_attention(q, k, v, phi, cu_seqlens=cu_seqlens, impl="triton")
        return attended.values.square().sum() + attended.state.z.mean()

    in_one_graph, counter = compiled(loss)
    for length in (3, 9, 5):
        leaves = [x.requires_grad_() for x in make(length)]
        starts = torch.tensor([0, 2, length], device=DEVICE) if packed else None
        results = []
        for function in (in_one_graph, loss):
            value = function(*leaves, starts)
            results.append([value, *torch.autograd.grad(value, leaves)])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 2  # one for the first length, one for any


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_torch_func() -> None:
    phi = features("hyperbolic")
    q, k, v = (torch.stack([a, b]) for a, b in zip(make(9), make(9, seed=1), strict=True))

    def loss(q: Tensor, k: Tensor, v: Tensor, impl: str = "triton") -> Tensor:
        return ops.causal_linear_attention(q, k, v, phi, impl=impl).values.square().sum()

    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(q, k, v)
    for i in range(2):
        expected = torch.func.grad(partial(loss, impl="chunked"), (0, 1, 2))(q[i], k[i], v[i])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"forward-mode.*impl='reference'"):
        torch.func.jvp(lambda q: loss(q, k[0], v[0]), (q[0],), (q[0],))
    x = q[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, k[0], v[0]), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives.*impl='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("projected", [False, True])
def test_registered_function(function, projected, squared_relu) -> None:
    """On chip, in both directions, in kernels and in the chunked form."""
    if projected:
        feature_map = GeneralizedRandomFeatures(E, 12, kernel_fn=squared_relu, generator=1)
    else:
        feature_map = ActivationFunctionFeatureMap(E, squared_relu)
    attend = partial(FUNCTIONS[function], features=features_of(feature_map.to(DEVICE)))
    inputs = make(70, H=1)
    assert attend.keywords["features"].formula is not None
    check(attend, inputs)
    exact = differentiate(partial(attend, impl="reference"), [x.double() for x in inputs])
    for a, e in zip(differentiate(partial(attend, impl="chunked"), inputs), exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "packed"), [(1, False), (3, False), (1, True)])
def test_sums_of_queries_in_portions(rows, packed, monkeypatch) -> None:
    """Sequences, or the heads of one, whose sums would take more memory than they may."""
    q, k, v = make(70, N=rows, H=4)
    mask = torch.arange(70, device=DEVICE) < torch.tensor([[70], [50], [1]], device=DEVICE)[:rows]
    cu_seqlens = torch.tensor([0, 30, 70], device=DEVICE) if packed else None
    attend = partial(
        ops.causal_linear_attention,
        features=features("hyperbolic"), key_mask=mask, cu_seqlens=cu_seqlens, impl="triton",
    )  # fmt: skip

    def gradients() -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in (q, k[:, :, :2].detach(), v[:, :, :2].detach())]
        return torch.autograd.grad(attend(*leaves).values.square().sum(), leaves)

    portions = []
    cut = passes._portions
    monkeypatch.setattr(passes, "_portions", lambda *args: portions.extend(cut(*args)) or portions)
    whole = gradients()
    assert len(portions) == 1
    portions.clear()
    monkeypatch.setattr(passes, "MOST_BYTES", 1)
    for found, expected in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(found, expected)
    assert len(portions) == (3 if rows == 3 else 2)
