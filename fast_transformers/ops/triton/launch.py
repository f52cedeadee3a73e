"""From tensors to kernels: the memory, and what is launched."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ..call import Settings
from ..kinds import KINDS, Formula
from . import backward as backward_kernels
from . import forward as forward_kernels
from . import sums as sum_kernels
from .maps import Rows
from .plans import WARPS, Plan, config, map_of, plan, size_of
from .sums import Sums

NOTHING = Sums(None, None, None)
SHORTEST = 512  # rows of a segment


def rows(x: Tensor) -> Rows:
    return Rows(x, *x.stride())


class Launch:
    """One call: its map, tiles and masks, and the kernels."""

    def __init__(
        self, settings: Settings, projection: Tensor | None, mask: Tensor | None,
        q: Tensor, k: Tensor, v: Tensor,
    ) -> None:  # fmt: skip
        formula = Formula(settings.kind, projection, settings.numbers)
        self.exponential = KINDS[settings.kind].exponential
        self.features, self.m = KINDS[settings.kind].width(formula, k.shape[-1]), v.shape[-1]
        self.config = config(self.m, projection is not None, k.dtype)
        self.map = map_of(formula, k, self.config.block)
        self.walk_map = map_of(formula, k, self.config.walk_block)
        self.eps = settings.eps
        self.q, self.k, self.v = q, k, v
        self.mask, self.mask_n = mask, 0
        if mask is not None:
            self.mask = (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)
            self.mask_n = self.mask.stride(0)
        self.heads, self.q_heads = k.shape[2], q.shape[2]
        self.columns = triton.cdiv(self.m, self.config.columns)
        self.blocks = self.walk_map.BLOCKS.value * self.walk_map.PARTS.value

    def options(self, whole: bool, **more: Any) -> dict[str, Any]:
        c = self.config
        return dict(
            M=self.m, BLOCK_M=size_of(self.m) if whole else c.columns, CHUNK=c.chunk,
            EXPONENTIAL=self.exponential, num_warps=WARPS, **more,
        )  # fmt: skip

    def plan(self, x: Tensor, cu: Tensor | None) -> Plan:
        return plan(x, self.config.rows, self.config.chunk, cu)

    def segments(self, x: Tensor, heads: int, cu: Tensor | None) -> Plan:
        """Parts that programs walk along, enough of them to fill a GPU."""
        n, length = (x.shape[0] if cu is None else 1), x.shape[1]
        others = max(1, n * heads * self.blocks * self.columns)
        wanted = max(1, min(self.config.programs // others, length // SHORTEST))
        chunk = self.config.chunk
        return plan(x, max(1, triton.cdiv(triton.cdiv(length, wanted), chunk)) * chunk, chunk, cu)

    def sums(self, count: int, dtype: torch.dtype = torch.float32) -> Sums:
        new = self.v.new_empty
        return Sums(
            new(count, self.features, self.m, dtype=dtype),
            new(count, self.features, dtype=torch.float32),
            new(count, self.features, dtype=torch.float32) if self.exponential else None,
        )

    def walk(
        self, walk: Any, tensors: tuple[Any, ...], plan: Plan, heads: int, start: Sums, end: Sums,
        store: bool,
    ) -> tuple[Sums, Tensor | None]:  # fmt: skip
        """Sums along all segments; those before every chunk, and their flags, if to ``store``."""
        prefix, flags = NOTHING, None
        if store:
            operand = torch.bfloat16 if self.map.OPERAND.value == tl.bfloat16 else torch.float32
            prefix = self.sums(plan.chunks * heads, operand)
            if self.exponential:
                flags = self.v.new_zeros(plan.chunks * heads, dtype=torch.int8)
        walk[plan.total * heads, self.blocks, self.columns](
            *tensors, heads, plan.table, plan.parts, plan.size, start, prefix, flags, end,
            self.walk_map, STORE=store, **self.options(False, num_stages=self.config.walk_stages),
        )  # fmt: skip
        return prefix, flags

    def along(
        self, walk: Any, tensors: tuple[Any, ...], plan: Plan, heads: int, start: Sums, end: Sums,
        reverse: bool, store: bool,
    ) -> tuple[Sums, Tensor | None]:  # fmt: skip
        """Sums along whole sequences, from ``start`` to ``end``."""
        if plan.parts > 1 or not store:
            parts = self.sums(plan.total * heads)
            self.walk(walk, tensors, plan, heads, NOTHING, parts, False)
            self.scan(plan, heads, parts, start, NOTHING if store else end, reverse)
            start = parts
        return self.walk(walk, tensors, plan, heads, start, end, True) if store else (end, None)

    def keys(self, cu: Tensor | None, start: Sums, end: Sums, store: bool) -> Any:
        tensors = (rows(self.k), rows(self.v), self.mask, self.mask_n, self.k.shape[1])
        plan = self.segments(self.k, self.heads, cu)
        return self.along(
            sum_kernels.walk_keys, tensors, plan, self.heads, start, end, False, store
        )

    def queries(
        self, cu: Tensor | None, d_out: Tensor, norm: Tensor, delta: Tensor, start: Sums,
        end: Sums, store: bool,
    ) -> Any:  # fmt: skip
        tensors = (rows(self.q), rows(d_out), norm, delta, self.q.shape[1])
        plan = self.segments(self.q, self.q_heads, cu)
        return self.along(
            sum_kernels.walk_queries, tensors, plan, self.q_heads, start, end, True, store
        )

    def scan(
        self, plan: Plan, heads: int, sums: Sums, start: Sums, end: Sums, reverse: bool
    ) -> None:
        block_m = size_of(self.m)
        block_f = max(1, min(next_power_of_2(self.features), 2048 // block_m))
        sum_kernels.scan[plan.sequences * heads, triton.cdiv(self.features, block_f)](
            sums, start, end, plan.firsts, heads, plan.parts,
            F=self.features, M=self.m, BLOCK_F=block_f, BLOCK_M=block_m, REVERSE=reverse,
        )  # fmt: skip

    def each(
        self, kernel: Any, x: Tensor, cu: Tensor | None, causal: bool, sums: Sums,
        flags: Tensor | None, *tensors: Any, whole: bool = True,
    ) -> None:  # fmt: skip
        """A kernel for each tile of queries or keys; another one for those of flagged chunks."""
        plan = self.plan(x, cu)
        free = kernel is backward_kernels.differentiate_keys  # the one that needs them all
        options = self.options(
            whole, GROUPS=self.q_heads // self.heads, C=self.config.rows,
            num_stages=self.config.stages, maxnreg=None if free else self.config.registers,
        )  # fmt: skip
        for flagged in (False, True) if flags is not None else (False,):
            kernel[plan.total * self.q_heads, 1 if whole else self.columns](
                rows(self.q), rows(self.k), rows(self.v), self.mask, self.mask_n, x.shape[1],
                self.q_heads, plan.table, plan.parts, sums, flags, *tensors, self.map,
                CAUSAL=causal, FLAGGED=flagged, **options,
            )  # fmt: skip

    def row_dots(self, x: Tensor, y: Tensor) -> Tensor:
        n, length, heads, m = x.shape
        to = x.new_empty(n, length, heads, dtype=torch.float32)
        backward_kernels.row_dots[n * heads * triton.cdiv(length, 64),](
            rows(x), rows(y), to, length, heads, M=m, BLOCK_M=next_power_of_2(m), C=64
        )
        return to

    def seed(self, final: Sums, d_kv: Tensor | None, d_z: Tensor | None) -> Sums:
        """Gradients of the final sums as sums over later queries, of the first head of a group."""
        if d_kv is None and d_z is None:
            return NOTHING
        d_kv = torch.zeros_like(final.kv) if d_kv is None else d_kv.flatten(0, 1)
        z = torch.zeros_like(final.z) if d_z is None else -d_z.flatten(0, 1)
        shift = None if final.shift is None else -final.shift
        groups = self.q_heads // self.heads
        if groups > 1:
            pad = (0, groups - 1)
            d_kv, z = (
                torch.nn.functional.pad(x[..., None], pad).movedim(-1, 1).flatten(0, 1)
                for x in (d_kv, z)
            )
            shift = None if shift is None else shift.repeat_interleave(groups, 0)
        return Sums(d_kv.contiguous(), z.contiguous(), shift)

    def gradient(self, x: Tensor) -> Tensor:
        """Of keys or values, for each query head."""
        if self.heads == self.q_heads:
            return torch.empty_like(x)
        return x.new_empty(*x.shape[:2], self.q_heads, x.shape[3], dtype=torch.float32)


def forward(
    settings: Settings, causal: bool, projection: Tensor | None, mask: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, state: Sums, cu: Tensor | None, cu_keys: Tensor | None,
) -> tuple[Tensor, Sums, Tensor | None]:  # fmt: skip
    """Values (N, L, H*R, M) in the dtype of ``v``, the final sums, (sequences * H, F, M) and
    (sequences * H, F), and norms (N, L, H*R) for the backward pass, if ``settings.keep``."""
    call = Launch(settings, projection, mask, q, k, v)
    sequences = k.shape[0] if cu_keys is None else cu_keys.shape[0] - 1
    out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=v.dtype)
    norm = q.new_empty(*q.shape[:3], dtype=torch.float32) if settings.keep else None
    final = call.sums(sequences * call.heads)
    before, flags = call.keys(cu_keys, state, final, store=causal)
    tensors = rows(out), norm, call.eps
    call.each(forward_kernels.attend, q, cu, causal, before, flags, *tensors, whole=False)
    return out, final, norm


def backward(
    settings: Settings, causal: bool, projection: Tensor | None, mask: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, state: Sums, out: Tensor, norm: Tensor, final: Sums,
    d_out: Tensor, d_kv: Tensor | None, d_z: Tensor | None,
    cu: Tensor | None, cu_keys: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, and of the initial kv and z if there are any."""
    call = Launch(settings, projection, mask, q, k, v)
    delta = call.row_dots(out, d_out)
    before, flags = call.keys(cu_keys, state, NOTHING, True) if causal else (final, None)
    dq, given = torch.empty_like(q), (rows(d_out), norm, delta)
    kernel = backward_kernels.differentiate_queries
    call.each(kernel, q, cu, causal, before, flags, *given, rows(dq))
    del before  # its memory serves what follows
    start = call.seed(final, d_kv, d_z)
    total = NOTHING
    if state.kv is not None or not causal:
        total = call.sums(final.kv.shape[0] // call.heads * call.q_heads)
    after, flags = call.queries(cu, d_out, norm, delta, start, total, causal)
    dk, dv = call.gradient(k), call.gradient(v)
    kernel = backward_kernels.differentiate_keys
    call.each(kernel, k, cu_keys, causal, after, flags, *given, rows(dk), rows(dv))
    if call.heads != call.q_heads:
        dk, dv = (x.unflatten(2, (call.heads, -1)).sum(3).to(k.dtype) for x in (dk, dv))
    if state.kv is None:
        return dq, dk, dv, None, None
    d_kv, d_z = total.kv, -total.z
    if total.shift is not None:
        groups = call.q_heads // call.heads
        past = state.shift.flatten(0, 1).repeat_interleave(groups, 0)
        factor = (total.shift + past).exp2()
        d_kv, d_z = d_kv * factor[..., None], d_z * factor
    d_kv, d_z = (x.unflatten(0, (*state.kv.shape[:2], -1)).sum(2) for x in (d_kv, d_z))
    return dq, dk, dv, d_kv, d_z
