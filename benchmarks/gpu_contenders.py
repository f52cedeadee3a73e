"""Who is compared on a GPU, what each has to answer, and what the work costs at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fast_transformers import ops
from fast_transformers.feature_maps import Favor, FeatureMap, elu_feature_map, features_of

from .contenders import ELU, FAVOR
from .worker.ours import FEATURES, SEED

HEADS, DIM, CHUNK = 16, 64, 64
CHECK = (2, 700)  # sequences and tokens that are compared with the reference
LIMIT = 1.5e-2  # relative error of the root mean square, in bfloat16

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One implementation with one feature map.

    Attributes:
        name: how tables call it.
        map: the feature map, None for softmax.
        make: attention over (N, L, H, dim), given whether it is causal.
        forms: causal, full or both.
        needs: a package that has to be installed.
    """

    name: str
    map: str | None
    make: Callable[[bool], Attend]
    forms: tuple[bool, ...] = (True, False)
    needs: str = "torch"

    @property
    def installed(self) -> bool:
        return find_spec(self.needs) is not None


def make_map(name: str) -> FeatureMap:
    """A feature map on the device; every contender with Favor has the same random matrix."""
    favor = Favor(DIM, n_dims=FEATURES, generator=SEED)
    return (elu_feature_map(DIM) if name == ELU else favor).cuda().eval()


def _ours(map: str) -> Callable[[bool], Attend]:
    def make(causal: bool) -> Attend:
        features = features_of(make_map(map))
        function = ops.causal_linear_attention if causal else ops.linear_attention
        return lambda q, k, v: function(q, k, v, features).values

    return make


def _softmax(causal: bool) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            values = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return values.transpose(1, 2)

    return attend


def _fla(map: str) -> Callable[[bool], Attend]:
    """Its kernels take features; those of Favor come from a compiled map."""

    def make(causal: bool) -> Attend:
        from fla.ops.linear_attn import (  # pyright: ignore[reportMissingImports]
            chunk_linear_attn,
        )

        phi = make_map(map)
        if map == FAVOR:
            torch.compiler.reset()
            phi = torch.compile(phi, dynamic=False)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return chunk_linear_attn(phi(q), phi(k), v, normalize=True, scale=1.0)[0]

        return attend

    return make


def _products(map: str) -> Callable[[bool], Attend]:
    """Full attention as anybody would write it."""

    def make(causal: bool) -> Attend:
        phi = make_map(map)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = phi(q), phi(k)
            kv = torch.einsum("nshf,nshm->nhfm", k, v)
            top = torch.einsum("nlhf,nhfm->nlhm", q, kv)
            return top / (torch.einsum("nlhf,nhf->nlh", q, k.sum(1)) + 1e-6)[..., None]

        return attend

    return make


CONTENDERS = [  # what takes longest to compile comes last
    *(Contender(f"ours, {map}", map, _ours(map)) for map in (ELU, FAVOR)),
    Contender("SDPA", None, _softmax),
    *(Contender(f"einsum, {map}", map, _products(map), (False,)) for map in (ELU, FAVOR)),
    *(Contender(f"fla, {map}", map, _fla(map), (True,), "fla") for map in (ELU, FAVOR)),
]


def make_inputs(batch: int, length: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Queries, keys, values, and the gradient of the result."""
    generator = torch.Generator("cuda").manual_seed(length)
    shape = (batch, length, HEADS, DIM)
    draws = (torch.randn(shape, generator=generator, device="cuda") for _ in range(4))
    return [x.to(dtype) for x in draws]


def both_passes(attend: Attend, leaves: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Values and the gradients of queries, keys and values."""
    values = attend(*leaves)
    return [values, *torch.autograd.grad(values, leaves, gradient.to(values.dtype))]


def _exact(contender: Contender, causal: bool) -> Attend:
    """The reference for inputs in float64."""
    if contender.map is not None:
        features = features_of(make_map(contender.map).double())
        function = ops.causal_linear_attention if causal else ops.linear_attention
        return lambda q, k, v: function(q, k, v, features, impl="chunked").values

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("nlhe,nshe->nhls", q, k) * DIM**-0.5
        if causal:
            unseen = torch.ones(logits.shape[-2:], dtype=torch.bool, device="cuda").triu(1)
            logits = logits.masked_fill(unseen, -torch.inf)
        return torch.einsum("nhls,nshm->nlhm", logits.softmax(-1), v)

    return softmax


def disagreements(contender: Contender, causal: bool) -> list[str]:
    """What is wrong with the values and gradients of a contender, a line each."""
    *inputs, gradient = make_inputs(*CHECK)
    found = both_passes(contender.make(causal), [x.requires_grad_() for x in inputs], gradient)
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = both_passes(_exact(contender, causal), inputs, gradient)
    names = ("values", "query gradients", "key gradients", "value gradients")
    return [
        f"{name} of {contender.name}, {'causal' if causal else 'full'}: relative error "
        f"{error:.1e}, allowed {LIMIT:.1e}"
        for name, a, b in zip(names, found, exact, strict=True)
        if not (error := relative_error(a, b)) <= LIMIT  # NaN is wrong, too
    ]


@torch.no_grad()
def relative_error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the error, relative to that of the answer."""
    return float((found.double() - exact).norm() / exact.norm())


def least_bytes(tokens: int, backward: bool) -> int:
    """Bytes of queries, keys, values and results that have to be read or written once.

    The forward pass has 4 such tensors. With the backward pass there are 12: it reads these
    4 and the gradient of the results, and writes 3 gradients.
    """
    return (12 if backward else 4) * tokens * HEADS * DIM * 2


def least_flops(map: str, causal: bool, tokens: int, backward: bool) -> int:
    """Operations of the matrix products in our kernels, a product and a sum being two.

    Per token and head, with F features, M values, C tokens in a chunk, E dimensions projected
    to K directions and P = 2 E K, the sums once in a pass of their own:

        causal, forward     3 P +  6 F M + 2 C (F + M)
        causal, backward    7 P + 12 F M + 6 C (F + M)
        full, forward       2 P +  4 F M
        full, backward      5 P +  8 F M
    """
    f, k = (DIM, 0) if map == ELU else (FEATURES, FEATURES // 2)
    p, fm, chunk = 2 * DIM * k, f * DIM, CHUNK * (f + DIM)
    if causal:
        each = 3 * p + 6 * fm + 2 * chunk + backward * (7 * p + 12 * fm + 6 * chunk)
    else:
        each = 2 * p + 4 * fm + backward * (5 * p + 8 * fm)
    return each * tokens * HEADS
