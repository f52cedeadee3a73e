"""torch.func and forward mode: right, or an error that names the form which can do it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils._pytree import tree_map

from fast_transformers import ops
from fast_transformers.feature_maps import build_feature_map, features_of
from tests.maps import ALL
from tests.support import make_qkv

E, COPIES = 8, 3
MAPS = {name: ALL[name] for name in ("elu", "favor", "asymmetric")}
NAMED = ("elu", "favor")
FUNCTIONS = {"full": ops.linear_attention, "causal": ops.causal_linear_attention}
REMEDY = r"impl='reference'"
IN_DIMS = (0, None, 1)
pytestmark = [
    pytest.mark.parametrize("kind", FUNCTIONS),
    pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning"),
]
assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def forward_mode(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The derivative in a direction."""
    return lambda x: jvp(function, (x,), (tree_map(torch.cos, x),))[1]


class Attend(nn.Module):
    """Attention as a module, with the map inside."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__()
        self.function, self.map = FUNCTIONS[kind], build_feature_map(MAPS[name], E)
        self.double().eval()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, impl: str = "auto") -> Tensor:
        return self.function(q, k, v, features_of(self.map), impl=impl).values


def loss(model: nn.Module, impl: str = "auto") -> Callable[..., Tensor]:
    return lambda *qkv: model(*qkv, impl).square().sum()


def inputs(length: int = 70, seed: int = 0) -> list[Tensor]:
    return make_qkv(length, N=2, H=2, E=E, dtype=torch.float64, seed=seed)


def copies(length: int = 70) -> list[Tensor]:
    """For ``in_dims=IN_DIMS``: queries of each, keys shared, values with the copies inside."""
    q, k, v = zip(*(inputs(length, seed) for seed in range(COPIES)), strict=True)
    return [torch.stack(q), k[0], torch.stack(v, 1)]


def one_by_one(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Any:
    """What vmap with ``in_dims=IN_DIMS`` computes."""
    results = [function(q[i], k, v[:, i]) for i in range(COPIES)]
    return tree_map(lambda *x: torch.stack(x), *results)


def refused_or_right(run: Callable[[str], Any], message: str = REMEDY) -> bool:
    """Whether it is refused. ``run`` takes the name of the form; the error has the message."""
    try:
        found = run("auto")
    except RuntimeError as error:
        assert re.search(message, str(error)), error  # noqa: PT017
        return True
    assert_close(found, run("reference"))
    return False


@pytest.mark.parametrize("name", MAPS)
def test_grad_and_jacrev(kind: str, name: str) -> None:
    model = Attend(kind, name)
    assert not refused_or_right(lambda i: grad(loss(model, i), (0, 1, 2))(*inputs()))
    refused = refused_or_right(lambda i: jacrev(model, (0, 1, 2))(*inputs(3), i))
    assert refused is (name not in NAMED)


@pytest.mark.parametrize("length", [1, 140])
@pytest.mark.parametrize("name", MAPS)
def test_vmap_and_vmap_of_grad(kind: str, name: str, length: int) -> None:
    model, given = Attend(kind, name), copies(length)
    for function in (model, grad(loss(model), (0, 1, 2))):
        run = vmap(function, IN_DIMS)
        if name in NAMED:
            assert_close(run(*given), one_by_one(function, *given))
        else:
            with pytest.raises(NotImplementedError, match=REMEDY):
                run(*given)


@pytest.mark.parametrize("name", NAMED)
def test_vmap_of_masks_states_and_grouped_queries(kind: str, name: str) -> None:
    features, (q, k, v) = features_of(build_feature_map(MAPS[name], E).double()), copies()
    q, mask = torch.cat([q, -q], 3), torch.rand(COPIES, 2, 70) > 0.3
    past = ops.linear_attention(*inputs(5, seed=9), features).state

    def results(q: Tensor, v: Tensor, mask: Tensor, kv: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        state = ops.LinearState(kv, z, past.shift)
        out = FUNCTIONS[kind](q, k, v, features, key_mask=mask, state=state)
        return out.values, *out.state

    def total(*args: Tensor) -> Tensor:
        return sum(x.square().mean() for x in results(*args))  # type: ignore[return-value]

    kv, z = torch.stack([past.kv, past.kv * 2, past.kv]), torch.stack([past.z] * COPIES)
    for function in (results, grad(total, (0, 1, 3, 4))):
        loops = tree_map(lambda *x: torch.stack(x), *map(function, q, v.unbind(1), mask, kv, z))
        assert_close(vmap(function, (0, 1, 0, 0, 0))(q, v, mask, kv, z), loops)


def functional(kind: str) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """A loss of a trained map's weights, and weights that are not the module's own."""
    model = Attend(kind, "asymmetric")
    weights = {name: x.detach() * 1.1 for name, x in model.named_parameters()}
    return lambda w, *args: functional_call(model, w, args).square().sum(), weights


def test_functional_call(kind: str) -> None:
    function, weights = functional(kind)
    given = inputs()
    assert not refused_or_right(lambda i: grad(function, 1)(weights, *given, i))
    x = [x.requires_grad_() for x in weights.values()]
    assert not refused_or_right(lambda i: torch.autograd.grad(function(weights, *given, i), x))


TRANSFORMS = {"grad": grad, "ensemble": vmap, "forward": forward_mode}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_weights(kind: str, transform: str) -> None:
    function, weights = functional(kind)
    if transform == "ensemble":
        weights = {name: torch.stack([x, -x]) for name, x in weights.items()}

    given = inputs(5)

    def run(impl: str) -> Any:
        return TRANSFORMS[transform](lambda w: function(w, *given, impl))(weights)

    refused_or_right(run)
    assert transform != "forward" or run("reference") != 0.0


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("name", MAPS)
def test_second_and_forward_derivatives(kind: str, name: str, which: int) -> None:
    model, given = Attend(kind, name), inputs(3)
    x = given[which]

    def by(y: Tensor, impl: str) -> Tensor:
        return model(*given[:which], y, *given[which + 1 :], impl)

    def gradient(y: Tensor, impl: str) -> Tensor:
        return grad(lambda y: by(y, impl).square().sum())(y)

    def dual(impl: str) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(by(forward_ad.make_dual(x, x.cos()), impl)).tangent

    refused_or_right(lambda i: grad(lambda y: gradient(y, i).square().sum())(x))
    refused_or_right(lambda i: jacrev(lambda y: gradient(y, i))(x))
    # torch says itself that there is no forward mode
    refused_or_right(lambda i: hessian(lambda y: by(y, i).square().sum())(x), "")
    refused_or_right(lambda i: forward_mode(lambda y: gradient(y, i))(x), "")
    refused_or_right(lambda i: forward_mode(lambda y: by(y, i))(x), "")
    refused_or_right(dual, "")
    assert dual("reference").any()


@pytest.mark.parametrize("name", NAMED)
def test_grad_of_vmap(kind: str, name: str) -> None:
    model, (q, k, v) = Attend(kind, name), copies(5)

    def total(q: Tensor, impl: str) -> Tensor:
        return vmap(partial(model, impl=impl), IN_DIMS)(q, k, v).square().sum()

    refused_or_right(lambda i: grad(total)(q, i))


@pytest.mark.parametrize("transform", [grad, forward_mode], ids=["grad", "forward"])
def test_tensors_the_functions_close_over(kind: str, transform: Any) -> None:
    def total(w: Tensor, impl: str) -> Tensor:
        features = ops.Features(lambda x: (x @ w).exp(), lambda x: (x @ w).exp())
        return FUNCTIONS[kind](*inputs(5), features, impl=impl).values.square().sum()

    refused_or_right(lambda i: transform(partial(total, impl=i))(torch.eye(E).double()))
