"""The operators joined to autograd and to ``torch.func``.

Every pass is an autograd function, the backward passes too: their results cannot be
differentiated again, and say so when that is tried. Under ``vmap`` the new dimension joins the
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import operators
from .call import Settings
from .features import Features, transforming

USE_REFERENCE = "pass impl='reference' to the functions in fast_transformers.ops for this"


def run(function: type[Function], differentiable: bool, *args: Any) -> Any:
    """``function.apply(*args)``, where there is something to differentiate.

    Where there is not it takes as long as a dozen operations, and Dynamo of torch 2.13 traces it
    wrongly.
    """
    plain = not (torch.is_grad_enabled() or transforming())
    if not differentiable and (plain or torch.compiler.is_compiling()):
        return function.forward(*args)
    try:
        return function.apply(*args)
    except (NotImplementedError, RuntimeError) as error:
        if "jvp" not in str(error):
            raise
        raise NotImplementedError(
            f"this form of attention has no forward-mode derivatives (jvp); {USE_REFERENCE}"
        ) from error


class BackwardPass(Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"this form of attention has no second derivatives; {USE_REFERENCE}")


def folded(
    function: type[Function],
    size: int,
    in_dims: Sequence[Any],
    args: Sequence[Any],
    batch_in: Sequence[int],
    batch_out: Sequence[int],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Call a pass with the dimension of vmap folded into the batch of every tensor.

    ``batch_in`` and ``batch_out`` tell which dimension the batch is, of the tensors after the
    projection and of the results.
    """
    shared, tensors = args[:3], args[3 : 3 + len(batch_in)]
    if len(args) > 3 + len(batch_in) or in_dims[2] is not None:
        raise NotImplementedError(
            f"vmap over a feature map with trained or batched weights; {USE_REFERENCE}"
        )
    folded = []
    for x, dim, batch in zip(tensors, in_dims[3:], batch_in, strict=True):
        if x is not None:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.movedim(0, batch).flatten(batch, batch + 1)
        folded.append(x)
    results = function.apply(*shared, *folded)
    return (
        tuple(x.unflatten(b, (size, -1)) for x, b in zip(results, batch_out, strict=True)),
        tuple(batch_out),
    )


class Causal(Function):
    @staticmethod
    def forward(
        settings: Settings, features: Features | None, projection: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        return operators.causal(settings, features, projection, *tensors[:7])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.settings, ctx.features = inputs[:2]
        _, *others = output
        ctx.mark_non_differentiable(*others[2:])
        ctx.save_for_backward(*inputs[2:], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        d_out, d_kv, d_z, *_ = gradients
        saved = ctx.saved_tensors
        projection, mask, q, k, v, kv, _, _, *parameters = saved[:-9]
        out, _, _, shift, *kept = saved[-9:]
        d_out = torch.zeros_like(out) if d_out is None else d_out
        dq, dk, dv, d_kv, d_z, *d_parameters = run(
            CausalBackward, False,
            ctx.settings, ctx.features, projection,
            mask, q, k, v, shift, out, *kept, d_out, d_kv, d_z, *parameters,
        )  # fmt: skip
        state = (None, None) if kv is None else (d_kv, d_z)
        return None, None, None, None, dq, dk, dv, *state, None, *d_parameters

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(Causal, info.batch_size, in_dims, args, [0] * 7, [0, 0, 0, 0, 0, 0, 1, 1, 1])


class CausalBackward(BackwardPass):
    @staticmethod
    def forward(
        settings: Settings, features: Features | None, projection: Tensor | None, *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        return operators.causal_backward(settings, features, projection, *tensors[:14])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
        return folded(CausalBackward, info.batch_size, in_dims, args, batch, [0] * 5)


class Accumulate(Function):
    @staticmethod
    def forward(
        settings: Settings, features: Features | None, projection: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        return operators.accumulate(settings, features, projection, *tensors[:6])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.settings, ctx.features = inputs[:2]
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[2:], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        d_kv, d_z, _ = gradients
        saved = ctx.saved_tensors
        projection, mask, k, v, kv, _, first_shift, *parameters = saved[:-3]
        kv_out, z_out, shift = saved[-3:]
        d_kv = torch.zeros_like(kv_out) if d_kv is None else d_kv
        d_z = torch.zeros_like(z_out) if d_z is None else d_z
        dk, dv, *d_parameters = run(
            AccumulateBackward,
            False,
            ctx.settings,
            ctx.features,
            projection,
            mask,
            k,
            v,
            shift,
            d_kv,
            d_z,
            *parameters,
        )
        if kv is None:
            d_kv = d_z = None
        elif first_shift is not None:
            decay = (first_shift - shift).exp2()
            d_kv, d_z = d_kv * decay[..., None], d_z * decay
        return None, None, None, None, dk, dv, d_kv, d_z, None, *d_parameters

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(Accumulate, info.batch_size, in_dims, args, [0] * 6, [0] * 3)


class AccumulateBackward(BackwardPass):
    @staticmethod
    def forward(
        settings: Settings, features: Features | None, projection: Tensor | None, *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        return operators.accumulate_backward(settings, features, projection, *tensors[:6])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(AccumulateBackward, info.batch_size, in_dims, args, [0] * 6, [0] * 2)


class Attend(Function):
    @staticmethod
    def forward(
        settings: Settings, features: Features | None, projection: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        return operators.attend(settings, features, projection, *tensors[:4])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.settings, ctx.features = inputs[:2]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[2:], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        d_out, _ = gradients
        projection, q, kv, z, shift, *parameters, out, norm = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(out)
        dq, d_kv, d_z, *d_parameters = run(
            AttendBackward,
            False,
            ctx.settings,
            ctx.features,
            projection,
            q,
            kv,
            z,
            shift,
            out,
            norm,
            d_out,
            *parameters,
        )
        return None, None, None, dq, d_kv, d_z, None, *d_parameters

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(Attend, info.batch_size, in_dims, args, [0] * 4, [0] * 2)


class AttendBackward(BackwardPass):
    @staticmethod
    def forward(
        settings: Settings, features: Features | None, projection: Tensor | None, *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        return operators.attend_backward(settings, features, projection, *tensors[:7])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(AttendBackward, info.batch_size, in_dims, args, [0] * 7, [0] * 3)
