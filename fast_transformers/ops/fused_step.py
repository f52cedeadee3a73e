"""The recurrent form as one kernel for a GPU: which steps it serves, and its operators.

Generation is bound by the memory that a step moves and by the number of kernels it is made of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_state_width
from .choose import INTERPRETED, why_not
from .features import Features
from .formula import Formula, Kind
from .kinds import KINDS
from .state import LinearState

DEVICES = ("cuda",)
_INPUTS = (
    "(str kind, float[] numbers, float eps, Tensor? projection, Tensor q, Tensor k, Tensor v, "
)


def why_not_fused_step(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    features: Features,
    kind: Kind | None,
    state: LinearState | None,
) -> str | None:
    """The reason why the kernel cannot serve a step, or None if it can.

    Args:
        q: (N, H, E) query.
        k: (N, H, E) key.
        v: (N, H, M) value.
        features: the feature map.
        kind: what evaluates it; None if autograd differentiates it, or it has no formula.
        state: earlier sums.
    """
    device = q.device.type
    if device not in DEVICES:
        return f"the tensors are on a device of type {device}, kernels need cuda"
    if INTERPRETED and device == "cuda":
        return "Triton is interpreted"
    if kind is None:
        return "the feature map has no formula, or gradients are wanted"
    if k is None or v is None:
        return "there is no key to absorb"
    if q.shape[1] != k.shape[1]:
        return "several queries share a key"
    sums = () if state is None else (state.kv, state.z, state.shift)
    if not all(x is None or x.is_contiguous() for x in sums):
        return "the state is not contiguous"
    same = q.dtype == k.dtype == v.dtype
    return why_not(
        "triton",
        causal=True,
        length=1,
        keys=1,
        device=q.device,
        dtype=q.dtype if same else None,
        dims=(q.shape[-1], v.shape[-1]),
        features=features,
    )


def fused_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features,
    state: LinearState | None,
    *,
    eps: float,
    inplace: bool,
) -> tuple[Tensor, LinearState]:
    """Values (N, H, M) in the dtype of ``q`` and the state that includes the key."""
    formula = features.formula
    assert formula is not None
    settings = (formula.kind, formula.numbers, eps, formula.projection, q, k, v)
    if state is None:
        return _with_state(*_step(*settings, None, None, None))
    check_state_width(state.z.shape[-1], KINDS[formula.kind].width(formula, k.shape[-1]))
    sums = (state.kv, state.z, state.shift)
    if inplace:
        return _step_in_place(*settings, *sums), state
    return _with_state(*_step(*settings, *sums))


def _with_state(
    values: Tensor, kv: Tensor, z: Tensor, shift: Tensor
) -> tuple[Tensor, LinearState]:
    return values, LinearState(kv, z, shift if shift.shape == z.shape else None)


def _allocate(
    kind: str, projection: Tensor | None, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums; operators have no optional results, so no shift is an empty one."""
    (n, h, e), m = k.shape, v.shape[-1]
    f = KINDS[kind].width(Formula(kind, projection), e)
    like = {"dtype": torch.float32, "device": k.device}
    width = f if KINDS[kind].exponential else 0
    return (
        torch.empty(n, h, f, m, **like),
        torch.empty(n, h, f, **like),
        torch.empty(n, h, width, **like),
    )


@torch.library.custom_op(
    "fast_transformers::step",
    mutates_args=(),
    schema=f"{_INPUTS}Tensor? kv, Tensor? z, Tensor? shift) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _step(
    kind: str, numbers: list[float], eps: float, projection: Tensor | None, q: Tensor, k: Tensor,
    v: Tensor, kv: Tensor | None, z: Tensor | None, shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from .triton.step import launch

    formula = Formula(kind, projection, tuple(numbers))
    to = _allocate(kind, projection, k, v)
    state = None if kv is None or z is None else (kv, z, shift)
    exponential = KINDS[kind].exponential
    with torch.cuda.device_of(q):
        out = launch(formula, eps, q, k, v, state, to if exponential else (*to[:2], None))
    return out, *to


@_step.register_fake
def _(
    kind: str, numbers: list[float], eps: float, projection: Tensor | None, q: Tensor, k: Tensor,
    v: Tensor, kv: Tensor | None, z: Tensor | None, shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    return out, *_allocate(kind, projection, k, v)


@torch.library.custom_op(
    "fast_transformers::step_",
    mutates_args=("kv", "z", "shift"),
    schema=f"{_INPUTS}Tensor(a!) kv, Tensor(b!) z, Tensor(c!)? shift) -> Tensor",
)
def _step_in_place(
    kind: str, numbers: list[float], eps: float, projection: Tensor | None, q: Tensor, k: Tensor,
    v: Tensor, kv: Tensor, z: Tensor, shift: Tensor | None,
) -> Tensor:  # fmt: skip
    from .triton.step import launch

    sums = (kv, z, shift)
    with torch.cuda.device_of(q):
        return launch(Formula(kind, projection, tuple(numbers)), eps, q, k, v, sums, sums)


@_step_in_place.register_fake
def _(
    kind: str, numbers: list[float], eps: float, projection: Tensor | None, q: Tensor, k: Tensor,
    v: Tensor, kv: Tensor, z: Tensor, shift: Tensor | None,
) -> Tensor:  # fmt: skip
    return torch.empty(v.shape, dtype=q.dtype, device=q.device)
