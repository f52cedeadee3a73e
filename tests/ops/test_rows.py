"""Blocks of rows: views of many at once, whatever order they are asked for in."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fast_transformers.ops.layout import Block, blocks
from fast_transformers.ops.rows import AHEAD, Rows, ungroup

LENGTH, DIM = 300, 3


class Calls(TorchDispatchMode):
    """Counts the operations of torch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def grouped(x: torch.Tensor, block: Block, groups: int) -> torch.Tensor:
    """(T, N*H, R*C, D), one key head of one sequence after the other."""
    rows = x[:, block.at].unflatten(1, (block.t, block.c)).unflatten(3, (-1, groups))
    heads = [rows[i, :, :, h] for i in range(len(rows)) for h in range(rows.shape[3])]
    return torch.stack([head.transpose(1, 2).flatten(1, 2) for head in heads], 1)


def some_blocks(order: str) -> list[Block]:
    found = list(blocks(0, LENGTH, 4, 8))
    assert len(found) < AHEAD
    if order == "backward":
        return found[::-1]
    if order == "halves":
        halves = [half for block in found if block.t * block.c > 1 for half in block.halves()]
        return [x for three in zip(found, halves, halves[1:], strict=False) for x in three]
    return found


@pytest.mark.parametrize("order", ["forward", "backward", "halves"])
@pytest.mark.parametrize(("n", "heads", "groups"), [(1, 2, 1), (2, 2, 1), (1, 4, 2), (2, 6, 3)])
def test_blocks_in_any_order(n, heads, groups, order) -> None:
    x = torch.randn(n, LENGTH + 1, heads, DIM)[:, 1:]
    rows, factors = Rows(x, groups), torch.randn(n, LENGTH, heads, 1)
    written, scaled = torch.zeros_like(x), torch.zeros_like(x)
    for block in some_blocks(order):
        found = rows[block]
        assert torch.equal(found, grouped(x, block, groups))
        copy = torch.empty(found.shape)
        rows.copy_to(copy, block)
        assert torch.equal(copy, found)
        assert torch.equal(ungroup(copy, block, n, groups), block.of(x))
        factor = grouped(factors, block, groups)
        Rows(written, groups).write(block, copy)
        Rows(scaled, groups).write_product(block, copy, factor)
        torch.testing.assert_close(
            rows.dot(Rows(scaled, groups), block), (found * found * factor).sum(-1, keepdim=True)
        )
    assert torch.equal(written, x)
    assert torch.equal(scaled, x * factors)


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_views_are_made_at_once(order) -> None:
    x, asked = torch.randn(1, AHEAD * 5, 2, DIM), list(blocks(0, AHEAD * 5, 1, 5))
    assert len(asked) == AHEAD
    rows = Rows(x)
    with Calls() as calls:
        found = [rows[block] for block in (asked if order == "forward" else asked[::-1])]
    assert calls.count < 10
    assert len({view.data_ptr() for view in found}) == AHEAD
