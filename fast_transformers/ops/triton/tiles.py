"""Where the tiles of queries or keys are, and which of them belong to flagged chunks."""

from __future__ import annotations

import triton
import triton.language as tl

from .maps import load_rows
from .sums import is_kept, locate

TILES = tl.constexpr(32)  # of a program that looks for flagged ones


@triton.jit
def place(
    tile, table, parts, length, heads, GROUPS: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """Query head and key head of a tile, batch row, its first row and its end, those of its
    sequence, and the number of the sums it looks at, which are OF_KEYS or of queries."""
    h = tile % heads
    of_key = h // GROUPS
    batch, number, start, end, begin, stop, chunk = locate(
        table, tile // heads, parts, C, length, CHUNK
    )
    if CAUSAL:
        number = chunk
    index = number * heads + h
    if OF_KEYS:
        index = number * (heads // GROUPS) + of_key
    return h, of_key, batch, start, end, begin, stop, index


@triton.jit
def values_of(
    v, mask, mask_n, batch, of_key, begin, start, end, column, map,
    M: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """First key of the chunk in which the queries from ``start`` on lie, how far they are in it,
    which of its keys count, and their values."""
    first_key = begin + (start - begin) // CHUNK * CHUNK
    row = first_key + tl.arange(0, CHUNK)
    kept = is_kept(mask, mask_n, batch, row, first_key, end)
    values = load_rows(v, batch, of_key, first_key, kept, column * BLOCK_M, M, BLOCK_M)
    return first_key, start - first_key, kept, values.to(map.OPERAND)


@triton.jit
def is_flagged(
    tile, flags, table, parts, length, heads, GROUPS: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, CAUSAL: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """Whether a tile, or each of some tiles, is flagged: if CAUSAL with its chunk (see
    ``sums.step``)."""
    index = tile
    if CAUSAL:
        _, _, _, _, _, _, _, index = place(
            tile, table, parts, length, heads, GROUPS, C, CHUNK, True, OF_KEYS
        )
    return tl.load(flags + index) != 0


@triton.jit
def flagged_tiles(
    tiles, flags, table, parts, length, heads, GROUPS: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, CAUSAL: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """First and last tile of a program of a FLAGGED kernel, none if none of them is flagged.

    Such a kernel replaces what another has stored for flagged tiles, of which there are hardly
    ever any: few programs look at many tiles each, since to start one takes time, too.
    """
    first = tl.program_id(0) * TILES
    these = tl.minimum(first + tl.arange(0, TILES), tiles - 1)
    found = is_flagged(
        these, flags, table, parts, length, heads, GROUPS, C, CHUNK, CAUSAL, OF_KEYS
    )
    last = tl.minimum(first + TILES, tiles)
    return first, tl.where(tl.max(found.to(tl.int32), 0) > 0, last, first)
