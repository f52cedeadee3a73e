"""Loops over blocks leave PyTorch's threads alone while the machine is busy, and as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fast_transformers import ops
from fast_transformers.ops import threads
from fast_transformers.ops.threads import Pace, paced, popped
from tests.support import make_qkv


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def run(pace: Pace, blocks: int, one: float, together: float) -> tuple[float, int]:
    """Time of some blocks on a machine of the given speeds, and how many ran on one thread."""
    total, alone_count = 0.0, 0
    for _ in range(blocks):
        alone = pace.alone()
        took = one if alone else together
        pace.record(alone, took)
        total, alone_count = total + took, alone_count + alone
    return total, alone_count


def test_all_threads_on_an_idle_machine() -> None:
    assert run(Pace(), 1000, one=1.0, together=0.6)[1] == 2  # to compare with


def test_one_thread_on_a_busy_machine() -> None:
    """All threads may be 150 times slower, as was measured; twice one thread is what is lost."""
    total, alone = run(Pace(), 2000, one=1.0, together=150.0)
    assert total <= 2 * 2000
    assert alone >= 1990


def test_hiccups_of_an_idle_machine_change_nothing() -> None:
    """A time slice of another program's, many times a block's time, now and then."""
    pace, alone = Pace(), 0
    for _ in range(20):
        alone += run(pace, 50, one=1.0, together=0.6)[1] + run(pace, 1, one=1.0, together=8.0)[1]
    assert alone == 2


def test_a_slow_first_block_is_not_compared_with() -> None:
    pace = Pace()
    run(pace, 1, one=100.0, together=1.0)
    assert run(pace, 100, one=1.0, together=5.0)[0] <= 1.5 * 100


def test_all_threads_again_when_the_machine_is_idle_again() -> None:
    pace = Pace()
    run(pace, 500, one=1.0, together=150.0)
    run(pace, 1000, one=1.0, together=0.6)
    assert run(pace, 100, one=1.0, together=0.6)[1] == 0


def test_the_number_of_threads_is_restored(monkeypatch) -> None:
    monkeypatch.setattr(threads, "_paces", {})
    given = [torch.get_num_threads() for _ in paced(range(20), torch.zeros(1), "test")]
    assert given[0] == 1
    assert set(given) <= {1, 3}
    assert torch.get_num_threads() == 3


def test_one_thread_is_not_timed(monkeypatch) -> None:
    monkeypatch.setattr(threads, "_paces", {})
    torch.set_num_threads(1)
    assert list(paced(popped([1, 2, 3]), torch.zeros(1), "test")) == [3, 2, 1]
    assert threads._paces == {}


@pytest.mark.parametrize("function", [ops.linear_attention, ops.causal_linear_attention])
def test_results_and_threads_of_a_call(function) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(600, dtype=torch.float64))
    results = []
    for impl in ("chunked", "reference"):
        out = function(q.relu(), k.relu(), v, impl=impl).values
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
        assert torch.get_num_threads() == 3
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", [ops.linear_attention, ops.causal_linear_attention])
def test_an_error_restores_the_threads(function, monkeypatch) -> None:
    """In the first block, which is for one thread."""
    monkeypatch.setattr(threads, "_paces", {})
    seen = []

    def fails(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        if x.shape[1] > 1:
            raise RuntimeError("on purpose")
        return x

    q, k, v = make_qkv(100)
    with pytest.raises(RuntimeError, match="on purpose"):
        function(q, k, v, ops.Features(fails, fails))
    assert seen[-1] == 1
    assert torch.get_num_threads() == 3
