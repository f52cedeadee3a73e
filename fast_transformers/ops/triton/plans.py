"""How a call is cut up: the sizes of tiles, the feature map as kernels take it, the programs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ..call import Settings
from ..choose import INTERPRETED
from ..formula import LOG2E, Formula
from ..kinds import KINDS
from .functions import functions_of
from .maps import Map


class Config(NamedTuple):
    """Sizes of tiles and of their programs, chosen by measurements on an H200.

    Attributes:
        block: features that a program with rows of its own works on at a time.
        walk_block: directions of a program that walks along a sequence.
        rows: of a program: queries for their values, queries for their gradients, and keys.
        chunk: rows between two stored sums, a multiple of ``rows`` in causal attention.
        registers: most of them a thread, of programs with rows of their own as in ``rows``, and
            of those that walk with 4 warps; None to leave it to the compiler.
        stages: of loops over features, and of those along a sequence.
        programs: segments are made until there are that many.
    """

    block: int
    walk_block: int
    rows: tuple[int, int, int]
    chunk: int
    registers: tuple[int | None, int | None, int | None, int | None]
    stages: tuple[int, int]
    programs: int


WARPS = 4
COLUMNS = 64  # value dimensions of a program, where they can be worked on apart
# factors of 32 bits
PRECISE = Config(32, 32, (32, 32, 32), 64, (None,) * 4, (2, 2), 1024)
# as much as two stages of a program with more than 128 dimensions may hold
WIDE = Config(32, 32, (32, 32, 32), 64, (None,) * 4, (2, 2), 1024)
# whether maps multiply by weights, and whether attention is causal
SHORT = {
    (True, True): Config(32, 128, (64, 64, 64), 64, (128, 168, None, 168), (3, 3), 264),
    (True, False): Config(32, 128, (128, 64, 64), 64, (168, 128, 168, 168), (3, 3), 264),
    (False, True): Config(64, 64, (64, 64, 64), 64, (128, 128, 128, None), (2, 3), 256),
    (False, False): Config(64, 64, (64, 128, 64), 128, (None,) * 4, (2, 3), 256),
}


def config(e: int, m: int, projected: bool, causal: bool, operand: torch.dtype) -> Config:
    """For E and M dimensions; rows of a program are whole, but where maps are element-wise."""
    if operand == torch.float32:
        return PRECISE
    if m > 128 or (projected and e > 128):
        return WIDE
    return SHORT[projected, causal]


def operand_of(kind: str, dtype: torch.dtype) -> tuple[torch.dtype, str]:
    """Dtype of the factors of products for inputs of a dtype, and precision of those in float32.

    Denominators that may be small make the errors of features larger, which then get more
    precision than the inputs have.
    """
    exact = not KINDS[kind].never_zero
    if dtype == torch.bfloat16:
        return (torch.float32, "tf32") if exact else (dtype, "tf32")
    short = tf32() or (dtype == torch.float16 and not exact)
    return torch.float32, "tf32" if short else "tf32x3"


def keeps(settings: Settings, causal: bool, cu: Tensor | None) -> bool:
    """Whether the backward pass starts from sums of the forward pass."""
    return settings.keep and causal and cu is None


def size_of(n: int) -> int:
    """Of a tile that products can take."""
    return max(16, next_power_of_2(n))


def map_of(
    formula: Formula, dims: int, dtype: torch.dtype, block: int, stages: int, whole: bool = False
) -> tuple[Map, torch.dtype]:
    """The map of inputs (..., dims) of a dtype, without its weights, and their dtype.

    Blocks are of so many features of one part, or of all parts together if they are ``whole``.
    """
    kind, features = formula.kind, KINDS[formula.kind].width(formula, dims)
    scale, back, first, second = 1.0, 1.0, 0.0, 0.0
    name, function, parts, pairs = "elementwise", kind, 1, features
    if INTERPRETED and dtype == torch.bfloat16:  # whose products the interpreter gets wrong
        dtype = torch.float32
    operand, precision = operand_of(kind, dtype)
    if formula.projection is not None:
        pairs = formula.projection.shape[1]
        parts = features // pairs
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
    value, slope = functions_of(function)
    directions = pairs + (features > parts * pairs)
    block = min(block // parts if whole else block, size_of(directions))
    constants = (
        name, value, slope, dims, features, size_of(dims), parts, pairs, block,
        triton.cdiv(directions, block),
        tl.bfloat16 if operand == torch.bfloat16 else tl.float32, precision, stages,
    )  # fmt: skip
    return Map(None, scale, back, first, second, *map(tl.constexpr, constants)), dtype


def tf32() -> bool:
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


def plan(n: int, length: int, size: int, chunk: int, cu: Tensor | None) -> Plan:
    """Parts of ``size`` rows."""
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
    index = torch.arange(total, device=cu.device)
    at = torch.searchsorted(firsts[1:], index, right=True).clamp(max=sequences - 1)
    begin, stop = starts[at], starts[at] + lengths[at]
    start = begin + (index - firsts[at]) * size
    table = torch.stack(
        [at, start, torch.minimum(start + size, stop), begin, stop, first_chunks[at]], 1
    )
    # there may be fewer parts than programs, which are given no rows: they begin after the first
    # row, which may be read, of a sequence that neither begins nor ends there
    table = torch.where((index < firsts[-1])[:, None], table, table.new_tensor([0, 1, 1, 0, 0, 0]))
    return Plan(sequences, total, size, length // chunk + sequences, table.int(), firsts.int())
