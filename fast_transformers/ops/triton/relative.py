"""What exponential factors are relative to, so that they and their products stay finite.

In general it is the largest of what they meet, found first: of each feature for keys, of each
row for queries. For values of "hyperbolic" features exp(+-u - |x|^2/2) one number for a tile of
queries will do, the base: the shift of the first feature of the sums. The |x|^2/2 of a key then
multiplies its column of pairs instead of each of its features. A tile with a key further than
2^RANGE from the base, or a denominator out of range, is flagged, to be worked on again in the
general way.

In any other tile nothing that counts is lost below 2^-126. A factor p is at most the denominator,
since z is at least 1; so p times a kappa that is lost is at most 2^(RANGE - 126) of it. A p that
is lost meets at most 2^SLACK, the denominator being at least LEAST.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maps import encode, load_weights, project
from .sums import LOWEST, SLACK, first_of, load_shift

RANGE = tl.constexpr(60.0)  # powers of 2 between a row and the base
LEAST, MOST = tl.constexpr(2.0**-40), tl.constexpr(2.0**90)  # of a denominator


@triton.jit
def anchor_of(a, seen, shift):
    """The shift that includes the rows which are ``seen`` (C,) of features a (C, BLOCK)."""
    return tl.maximum(shift, tl.max(tl.where(seen[:, None], a, float("-inf")), 0))


@triton.jit
def first_far(
    x, n, h, start, valid, given, offset, norms, seen, sums, index, map, BACK: tl.constexpr
):
    """Bounds of the rows that can share a shift that includes the rows ``seen`` by all of them.

    The others exceed it by more than SLACK; forward or BACK, up to the next of those.
    """
    r = tl.arange(0, valid.shape[0])
    bound = tl.full((valid.shape[0],), -1 if BACK else valid.shape[0], tl.int32)
    for block in tl.range(0, map.BLOCKS, num_stages=map.STAGES):
        weights = load_weights(map, block)
        u = project(x, n, h, start, valid, given, weights, block, map, False)
        for part in tl.static_range(map.PARTS):
            shift = load_shift(sums, index, block, part, map)
            if BACK:
                a = encode(u, None, None, block, part, map, False) - norms[:, None]
            else:
                a = encode(u, offset, valid, block, part, map, False)
            anchor = anchor_of(a, seen, shift)
            far = (tl.max(a - anchor[None, :], 1) > SLACK) & ~seen
            if BACK:
                bound = tl.maximum(bound, tl.where(far, r, -1))
            else:
                bound = tl.minimum(bound, tl.where(far, r, valid.shape[0]))
    return tl.max(bound, 0) + 1 if BACK else tl.min(bound, 0)


@triton.jit
def base_of(sums, index, map):
    return tl.load(sums.shift + first_of(index, map))


@triton.jit
def flag_far(flag, x, counts):
    """Set the ``flag`` if a row that ``counts`` is 2^x (C,) away from the base, further than
    2^RANGE."""
    tl.store(flag + tl.zeros(x.shape, tl.int32), 1, counts & ~(tl.abs(x) <= RANGE))


@triton.jit
def within(bottom, offsets, map):
    """Whether denominators, relative to 2^offsets, are in the range; those of no keys are."""
    fits = bottom <= MOST
    if map.KIND == "hyperbolic":
        fits &= (bottom >= LEAST) | (offsets == LOWEST)
    return fits
