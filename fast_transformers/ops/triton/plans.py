"""How a call is cut up: the sizes of tiles, the feature map as kernels take it, the programs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ..choose import INTERPRETED
from ..kinds import KINDS, LOG2E, Formula
from .functions import FUNCTIONS
from .maps import Map


class Config(NamedTuple):
    """Sizes of tiles and of their programs, chosen by measurements on an H200.

    Attributes:
        block: directions that a program with rows of its own works on at a time.
        walk_block: directions of a program that walks along a sequence.
        rows: queries or keys of a program.
        chunk: rows between two stored sums, a multiple of ``rows``.
        columns: value dimensions of a program, where they can be worked on apart.
        registers: most of them a thread, None to leave it to the compiler.
        stages: of programs with rows, and of those that walk.
        programs: segments are made until there are that many.
    """

    block: int
    walk_block: int
    rows: int
    chunk: int
    columns: int
    registers: int | None
    stages: int
    walk_stages: int
    programs: int


WARPS = 4


def config(m: int, projected: bool, dtype: torch.dtype) -> Config:
    columns = min(64, size_of(m))
    if dtype != torch.bfloat16:  # products of float32 factors, which take twice the memory
        return Config(32, 32, 32, 64, columns, None, 1, 1, 1024)
    if projected:
        return Config(32, 64, 64, 64, columns, 168, 2, 3, 1024)
    return Config(64, 64, 64, 64, columns, None, 2, 3, 1024)


def size_of(n: int) -> int:
    """Of a tile that products can take."""
    return max(16, next_power_of_2(n))


def map_of(formula: Formula, x: Tensor, block: int) -> Map:
    kind, dims, dtype = formula.kind, x.shape[-1], x.dtype
    features = KINDS[kind].width(formula, dims)
    weights, scale, back, first, second = None, 1.0, 1.0, 0.0, 0.0
    name, function, parts, pairs = "elementwise", kind, 1, features
    if INTERPRETED and dtype == torch.bfloat16:  # whose products the interpreter gets wrong
        dtype = torch.float32
    if formula.projection is not None:
        weights = formula.projection.to(dtype).contiguous()
        pairs, parts = weights.shape[1], features // weights.shape[1]
        scale = back = formula.numbers[0] ** 0.5
        name, _, function = kind.partition("_")
        if kind == "hyperbolic":
            scale = back * LOG2E
            first, second = back**2 * LOG2E / 2, math.log2(features) / 2
        elif name != "projected":
            name, first = "fourier", pairs**-0.5
            second = formula.numbers[1] ** 0.5 if kind == "smoothed_fourier" else 0.0
    elif kind == "logarithm":
        name = kind
    value, slope = FUNCTIONS.get(function, FUNCTIONS["identity"])
    directions = pairs + (features > parts * pairs)
    block = min(block, size_of(directions))
    operand = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    precision = "tf32" if dtype == torch.float16 or _tf32() else "tf32x3"
    constants = (
        name, value, slope, dims, features, size_of(dims), parts, pairs, block,
        triton.cdiv(directions, block), operand, precision,
    )  # fmt: skip
    return Map(weights, scale, back, first, second, *map(tl.constexpr, constants))


def _tf32() -> bool:
    return torch.backends.cuda.matmul.allow_tf32


class Plan(NamedTuple):
    """How sequences are cut into parts.

    Attributes:
        sequences: number of sequences.
        parts: of every sequence, or of all packed ones together at most.
        size: rows of a part.
        chunks: in all sequences together, at most.
        table, firsts: for packed sequences, see ``sums.locate`` and ``sums.scan``.
    """

    sequences: int
    parts: int
    size: int
    chunks: int
    table: Tensor | None = None
    firsts: Tensor | None = None

    @property
    def total(self) -> int:
        return self.sequences * self.parts if self.table is None else self.parts


def plan(x: Tensor, size: int, chunk: int, cu: Tensor | None) -> Plan:
    """Parts of ``size`` rows."""
    n, length = x.shape[:2]
    if cu is None:
        return Plan(
            n, max(1, triton.cdiv(length, size)), size, n * max(1, triton.cdiv(length, chunk))
        )
    sequences = cu.shape[0] - 1
    cu = cu.clamp(0, length).to(torch.int32)
    starts, lengths = cu[:-1], cu.diff().clamp(min=0)
    firsts, first_chunks = (
        torch.nn.functional.pad(((lengths + rows - 1) // rows).clamp(min=1).cumsum(0), (1, 0))
        for rows in (size, chunk)
    )
    total = length // size + sequences
    index = torch.arange(total, device=x.device)
    at = torch.searchsorted(firsts[1:], index, right=True).clamp(max=sequences - 1)
    begin, stop = starts[at], starts[at] + lengths[at]
    start = begin + (index - firsts[at]) * size
    table = torch.stack(
        [at, start, torch.minimum(start + size, stop), begin, stop, first_chunks[at]], 1
    )
    # there may be fewer parts than programs, which are given no rows and no sequence that ends
    table = torch.where(
        (index < firsts[-1])[:, None], table, table.new_tensor([0, 0, 0, -1, -1, 0])
    )
    return Plan(sequences, total, size, length // chunk + sequences, table.int(), firsts.int())
