"""From the sums of segments to those before, or after, each of them."""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import LOWEST


@triton.jit(do_not_specialize=["heads", "parts"])
def scan(
    sums, start, end, firsts, heads, parts,
    F: tl.constexpr, M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Replace the sums of every segment by those of all before it, or all after it; ``start``
    comes before all of them, and ``end`` receives what includes them all."""
    pid = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m = tl.arange(0, BLOCK_M)
    exists = f < F
    inside = exists[:, None] & (m < M)[None, :]
    sequence, h = (pid // heads).to(tl.int64), pid % heads
    if firsts is None:
        low, high = sequence * parts, (sequence + 1) * parts
    else:
        low = tl.load(firsts + sequence).to(tl.int64)
        high = tl.load(firsts + sequence + 1).to(tl.int64)
    kv, z = tl.zeros((BLOCK_F, BLOCK_M), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    shift = tl.full((BLOCK_F,), LOWEST, tl.float32)
    if start.kv is not None:
        at = pid.to(tl.int64) * F + f
        kv += tl.load(start.kv + at[:, None] * M + m[None, :], mask=inside, other=0.0)
        z += tl.load(start.z + at, mask=exists, other=0.0)
        if start.shift is not None:
            shift = tl.load(start.shift + at, mask=exists, other=LOWEST)
    for i in tl.range(0, high - low, num_stages=4):
        index = low + i
        if REVERSE:
            index = high - 1 - i
        at = (index * heads + h) * F + f
        to = at[:, None] * M + m[None, :]
        own_kv = tl.load(sums.kv + to, mask=inside, other=0.0)
        own_z = tl.load(sums.z + at, mask=exists, other=0.0)
        if sums.shift is not None:
            own = tl.load(sums.shift + at, mask=exists, other=LOWEST)
        tl.debug_barrier()  # several threads have read what one overwrites
        tl.store(sums.kv + to, kv, inside)
        tl.store(sums.z + at, z, exists)
        if sums.shift is not None:
            tl.store(sums.shift + at, shift, exists)
            new = tl.maximum(shift, own)
            old, shift, own = tl.exp2(shift - new), new, tl.exp2(own - new)
            kv, z = kv * old[:, None], z * old
            own_kv, own_z = own_kv * own[:, None], own_z * own
        kv += own_kv
        z += own_z
    if end.kv is not None:
        at = pid.to(tl.int64) * F + f
        tl.store(end.kv + at[:, None] * M + m[None, :], kv, inside)
        tl.store(end.z + at, z, exists)
        if end.shift is not None:
            tl.store(end.shift + at, shift, exists)
