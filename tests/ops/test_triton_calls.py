"""Calls of the kernels: states, masks, packed sequences, and what PyTorch does with operators."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fast_transformers import ops
from fast_transformers.feature_maps import Favor, features_of
from fast_transformers.ops import Features
from fast_transformers.ops.call import Settings
from tests.maps import Asymmetric
from tests.ops.kernels import (
    DEVICE,
    FUNCTIONS,
    MARKS,
    OPERATORS,
    REASON,
    TWO,
    E,
    check,
    features,
    make,
    short_segments,  # noqa: F401  for all tests here
    with_state,
)
from tests.test_compile import compiled

if REASON is None:
    from fast_transformers.ops.triton import passes, plans

pytestmark = MARKS


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


def test_programs_without_a_part() -> None:
    """They read nothing that is not there, store nothing, and end no sequence."""
    cut = plans.plan(1, 70, 16, 32, torch.tensor([0, 10, 20, 70]))
    assert cut.table is not None
    _, start, end, begin, stop, chunk = cut.table[1 + 1 + 4 :].T
    assert len(start) == 1
    assert start >= max(end, stop)
    assert start > begin
    for size in (16, 32):  # the first row of the chunk, which may be read
        assert 0 <= begin + (start - begin) // size * size < 70
    assert chunk + (start - begin) // 32 < cut.chunks


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
