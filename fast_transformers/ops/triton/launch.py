"""From tensors to kernels: the memory, and what is launched.

Triton looks at every argument of a launch to find the compiled kernel, which takes longer than
many of these kernels run. All that decides is the kind of tensors of a call, so a
:class:`Launch` is kept for each kind, and remembers the kernels that it has found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ..call import Settings
from ..choose import INTERPRETED
from ..formula import Formula
from ..kinds import KINDS
from . import backward as backward_kernels
from . import forward as forward_kernels
from . import walks
from .assembler import assembled
from .maps import Map, Rows, rows
from .plans import COLUMNS, WARPS, Plan, config, map_of, operand_of, plan, size_of, tf32
from .scan import scan as scan_kernel
from .sums import Sums
from .tiles import TILES

EACH = (
    forward_kernels.attend,
    backward_kernels.differentiate_queries,
    backward_kernels.differentiate_keys,
)
NOTHING = Sums(None, None, None)
SHORTEST = 512  # rows of a segment
MOST_KINDS = 512  # of calls that are remembered


class Inputs(NamedTuple):
    """Of one call. ``mask`` (N, S) is contiguous along S, ``mask_n`` its stride along N.

    Values are found with the ``whole_map``, all parts of a block at once, gradients with ``map``.
    """

    q: Rows
    k: Rows
    v: Rows
    mask: Tensor | None
    mask_n: int
    map: Map
    whole_map: Map
    walk_map: Map


class Launch:
    """All calls with tensors of the same kind: their map, tiles and compiled kernels.

    Attributes:
        carried: whether the sums of a causal call stay in registers.
        operand: dtype of the factors of products.
    """

    def __init__(
        self, settings: Settings, causal: bool, projection: tuple[int, ...] | None,
        q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        weights = None if projection is None else torch.empty(projection, device="meta")
        formula = Formula(settings.kind, weights, settings.numbers)
        kind = KINDS[settings.kind]
        self.settings, self.causal, self.device = settings, causal, device
        self.exponential = kind.exponential
        self.features, self.m = kind.width(formula, k[3]), v[3]
        operand, _ = operand_of(settings.kind, dtype)
        self.config = config(k[3], self.m, weights is not None, causal, operand)
        self.tile = min(COLUMNS, size_of(self.m))
        inputs, of_rows = (formula, k[3], dtype), (self.config.block, self.config.stages[0])
        self.map, self.dtype = map_of(*inputs, *of_rows)
        self.whole_map, _ = map_of(*inputs, *of_rows, whole=True)
        self.walk_map, _ = map_of(*inputs, self.config.walk_block, self.config.stages[1])
        short = self.map.OPERAND.value == tl.bfloat16
        self.operand = torch.bfloat16 if short else torch.float32
        self.heads, self.q_heads = k[2], q[2]
        self.groups = self.q_heads // self.heads
        self.columns = triton.cdiv(self.m, self.tile)
        self.blocks = self.walk_map.BLOCKS.value * self.walk_map.PARTS.value
        # 4 warps for every 64 features; of 8 warps two programs fit on a multiprocessor
        wide = self.walk_map.BLOCK.value > 64
        self.walkers = dict(num_warps=2 * WARPS if wide else WARPS)
        self.walkers["maxnreg"] = 128 if wide else self.config.registers[3]
        self.carried = causal and not self.exponential and self.blocks == self.columns == 1
        self.compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def inputs(
        self, projection: Tensor | None, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> Inputs:
        maps = self.map, self.whole_map, self.walk_map
        if projection is not None:
            weights = projection.to(self.dtype).contiguous()
            maps = (map._replace(weights=weights) for map in maps)
        mask_n = 0
        if mask is not None:
            mask = (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)
            mask_n = mask.stride(0)
        return Inputs(rows(q), rows(k), rows(v), mask, mask_n, *maps)

    def start(
        self, variant: Any, kernel: Any, grid: tuple[int, int, int], *args: Any, **options: Any
    ) -> None:
        """Launch a kernel; ``variant`` tells its launches of this kind of call apart."""
        key = kernel, variant
        found = self.compiled.get(key)
        if found is not None:
            compiled, constants = found
            compiled[grid](*args, *constants)
            return
        with assembled() as more:
            compiled = kernel[grid](*args, **options, **more)
        if not INTERPRETED:
            names = kernel.arg_names[len(args) :]
            self.compiled[key] = compiled, tuple(options[name] for name in names)

    def options(self, **more: Any) -> dict[str, Any]:
        return dict(M=self.m, CHUNK=self.config.chunk, **{"num_warps": WARPS} | more)

    def parts(self, n: Any, length: Any, heads: int, blocks: int) -> Any:
        """Most segments of a sequence, enough to fill a GPU; of sizes that may be symbolic."""
        filling = self.config.programs // (torch.sym_max(1, n) * heads * blocks)
        return torch.sym_max(1, torch.sym_min(filling, length // SHORTEST))

    def segments(self, n: int, length: int, heads: int, blocks: int, cu: Tensor | None) -> Plan:
        """Parts that programs walk along."""
        wanted = self.parts(n if cu is None else 1, length, heads, blocks)
        chunk = self.config.chunk
        size = max(1, triton.cdiv(triton.cdiv(length, wanted), chunk)) * chunk
        return plan(n, length, size, chunk, cu)

    def kept(self, n: Any, length: Any) -> tuple[Any, Any]:
        """Shape of the memory in which the sums before every segment of keys wait for the
        backward pass; of no size if there is one segment."""
        most = self.parts(n, length, self.heads, self.blocks * self.columns)
        width = self.heads * self.features * (self.m + 1 + int(self.exponential))
        return n, torch.sym_min(most - 1, 1) * most * width

    def sums_in(self, memory: Tensor, plan: Plan) -> Sums | None:
        """Such sums, None where none are needed or kept."""
        if plan.parts == 1 or memory.numel() == 0:
            return None
        count = plan.total * self.heads * self.features
        sizes = [count * self.m, count, count * self.exponential]
        parts = memory.view(-1)[: sum(sizes)].split(sizes)
        kv, z, shift = (
            parts[0].view(-1, self.features, self.m),
            *(x.view(-1, self.features) for x in parts[1:]),
        )
        return Sums(kv, z, shift if self.exponential else None)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def sums(self, count: int, dtype: torch.dtype = torch.float32) -> Sums:
        return Sums(
            self.empty(count, self.features, self.m, dtype=dtype),
            self.empty(count, self.features),
            self.empty(count, self.features) if self.exponential else None,
        )

    def factors(self, sums: Sums) -> Sums:
        """Sums for programs that each read them whole, only to multiply by them."""
        return sums._replace(kv=sums.kv.to(self.operand))

    def walk(
        self, kernel: Any, tensors: tuple[Any, ...], plan: Plan, heads: int, map: Map,
        start: Sums, end: Sums, store: bool, prefix: Sums = NOTHING, skip: bool = False,
    ) -> tuple[Sums, Tensor | None]:  # fmt: skip
        """Sums along all segments, to ``end`` and as factors to ``prefix``, or if to ``store``
        those before every chunk, their flags, and to ``end`` those of whole sequences. The last
        segment of each may be skipped."""
        flags = None
        if store:
            prefix = self.sums(plan.chunks * heads, self.operand)
            if self.exponential:
                flags = self.empty(plan.chunks * heads, dtype=torch.int8).zero_()
        self.start(
            (store, skip, start.kv is None, end.kv is None, prefix.kv is None), kernel,
            (plan.total * heads * self.blocks, self.columns, 1),
            *tensors, heads, plan.table, plan.parts, plan.size, start, prefix, flags, end, map,
            **self.options(
                BLOCK_M=self.tile, EXPONENTIAL=self.exponential, STORE=store, SKIP=skip,
                **self.walkers,
            ),
        )  # fmt: skip
        return prefix, flags

    def before(
        self, kernel: Any, tensors: tuple[Any, ...], plan: Plan, heads: int, map: Map,
        start: Sums, end: Sums = NOTHING, parts: Sums | None = None,
    ) -> Sums:  # fmt: skip
        """Sums before each segment, in ``parts`` if given; those after all of them in ``end``."""
        parts = parts or self.sums(plan.total * heads)
        skip = end.kv is None
        self.walk(kernel, tensors, plan, heads, map, NOTHING, parts, False, skip=skip)
        self.scan(plan, heads, parts, start, end, kernel is walks.walk_queries)
        return parts

    def along(
        self, kernel: Any, tensors: tuple[Any, ...], plan: Plan, heads: int, map: Map,
        start: Sums, end: Sums, store: bool, parts: Sums | None = None,
    ) -> tuple[Sums, Tensor | None]:  # fmt: skip
        """Sums along whole sequences, from ``start`` to ``end``; ``parts`` see ``before``. Those
        before every chunk and their flags, if to ``store``, or the last as factors."""
        if not store:
            if plan.table is not None or plan.parts > 1:
                self.before(kernel, tensors, plan, heads, map, start, end)
                return self.factors(end), None
            factors = end._replace(kv=torch.empty_like(end.kv, dtype=self.operand))
            self.walk(kernel, tensors, plan, heads, map, start, end, False, factors)
            return factors, None
        if plan.parts > 1:
            start = self.before(kernel, tensors, plan, heads, map, start, parts=parts)
        return self.walk(kernel, tensors, plan, heads, map, start, end, True)

    def scan(
        self, plan: Plan, heads: int, sums: Sums, start: Sums, end: Sums, reverse: bool
    ) -> None:
        block_m = size_of(self.m)
        block_f = max(1, min(next_power_of_2(self.features), 2048 // block_m))
        self.start(
            (reverse, start.kv is None, end.kv is None), scan_kernel,
            (plan.sequences * heads, triton.cdiv(self.features, block_f), 1),
            sums, start, end, plan.firsts, heads, plan.parts,
            F=self.features, M=self.m, BLOCK_F=block_f, BLOCK_M=block_m, REVERSE=reverse,
        )  # fmt: skip

    def each(
        self, kernel: Any, inputs: Inputs, n: int, length: int, cu: Tensor | None, sums: Sums,
        flags: Tensor | None, *tensors: Any, whole: bool = True, learned: bool = False,
    ) -> None:  # fmt: skip
        """A kernel for each tile of queries or keys; another one for those that are flagged.

        A ``learned`` projection is another variant: one more gradient is stored.
        """
        which = EACH.index(kernel)
        size = self.config.rows[which]
        cut = plan(n, length, size, self.config.chunk, cu)
        options = self.options(
            BLOCK_M=size_of(self.m) if whole else self.tile, GROUPS=self.groups, C=size,
            EXPONENTIAL=self.exponential, CAUSAL=self.causal, num_stages=self.config.stages[0],
            maxnreg=self.config.registers[which],
        )  # fmt: skip
        tiles, columns = cut.total * self.q_heads, 1 if whole else self.columns
        if which == 0 and self.exponential and flags is None:
            flags = self.empty(tiles, dtype=torch.int8).zero_()
        for flagged in (False, True) if flags is not None else (False,):
            programs = triton.cdiv(tiles, TILES.value) if flagged else tiles
            self.start(
                (flagged, learned), kernel, (programs, columns, 1), *inputs[:5], length,
                self.q_heads, cut.table, cut.parts, tiles, sums, flags, *tensors,
                inputs.map if which else inputs.whole_map, FLAGGED=flagged, **options,
            )  # fmt: skip

    def carry(
        self, kernel: Any, inputs: Inputs, plan: Plan, length: int, *tensors: Any,
        learned: bool = False,
    ) -> None:  # fmt: skip
        """A kernel for each segment, that carries the sums; ``learned`` as for ``each``."""
        self.start(
            learned, kernel, (plan.total * self.q_heads, 1, 1), *inputs[:5], length,
            self.q_heads, plan.table, plan.parts, plan.size, *tensors, inputs.walk_map,
            **self.options(BLOCK_M=size_of(self.m), GROUPS=self.groups),
        )  # fmt: skip


def _kind_of(x: Tensor | None) -> Any:
    """All of a tensor that decides which compiled kernel may be given it."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)


def prepare(settings: Settings, causal: bool, *tensors: Tensor | None) -> Launch:
    """What serves a call of these tensors: projection, key_mask, q, k, v and others."""
    q = tensors[2]
    assert q is not None
    return _prepare(settings, causal, q.device, tf32(), tuple(map(_kind_of, tensors)))


@lru_cache(MOST_KINDS)
def _prepare(
    settings: Settings, causal: bool, device: torch.device, tf32: bool, kinds: tuple[Any, ...]
) -> Launch:
    projection, _, q, k, v = kinds[:5]
    shape = None if projection is None else projection[0]
    return Launch(settings, causal, shape, q[0], k[0], v[0], k[2], device)


forget: Callable[[], None] = _prepare.cache_clear
