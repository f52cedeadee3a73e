"""How many threads a loop over blocks gets, from how long its blocks take.

An operation on several threads ends with the slowest of them. When another program has taken a
core, that is a time slice later, and a block consists of dozens of small operations: loops that
take 20 ms on two threads were seen to take 5 s then, and 40 ms on one. So each loop compares, and
stays on one thread while that is faster.

Heads side by side in threads of Python, each with operations on one thread, were slower: 31 ms for
26 on two threads (8 heads, N=4,096, elu+1), 29 for 15 on 16, as they wait for the interpreter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Pace:
    """Decides between one thread and all of them, block by block.

    What blocks on all threads lose against one thread is added up, less what they gain. A few
    blocks' time of gains is credit, so that a hiccup of an idle machine changes nothing. When
    it is used up, so many blocks are left to one thread that losses take a fifth of the time.
    """

    credit, pause = 16, 4  # blocks of one thread; for every one that was lost
    longest = 8192  # blocks before another try

    def __init__(self) -> None:
        self._one = math.inf  # seconds of a block on one thread
        self._lost = 0.0  # seconds
        self._left = 2  # blocks until all threads are tried; the very first one loads code

    def alone(self) -> bool:
        """Whether the next block is for one thread."""
        return self._left > 0

    def record(self, alone: bool, seconds: float) -> None:
        """What the block took."""
        if alone:
            self._one = min(seconds, (3 * self._one + seconds) / 4)
            self._left -= 1
            return
        self._lost = max(self._lost + seconds - self._one, -self.credit * self._one)
        if self._lost > 0:
            blocks = self.pause * self._lost / max(self._one, 1e-9)
            self._left, self._lost = math.ceil(min(blocks, self.longest)), 0.0


_paces: dict[Hashable, Pace] = {}


def paced(items: Iterable[T], like: Tensor, *work: Hashable) -> Iterator[T]:
    """Iterate; what the loop's body does with an item is timed, and given threads accordingly.

    ``work`` tells loops apart whose bodies take different times. On other devices than the CPU,
    and where PyTorch has one thread, nothing is timed.
    """
    threads = torch.get_num_threads()
    if like.device.type != "cpu" or threads == 1:
        yield from items
        return
    pace = _paces.setdefault((threads, *work), Pace())
    given = threads
    for item in items:
        alone = pace.alone()
        if given != (1 if alone else threads):
            given = 1 if alone else threads
            torch.set_num_threads(given)
        start = time.perf_counter()
        yield item
        pace.record(alone, time.perf_counter() - start)
    if given != threads:
        torch.set_num_threads(threads)


@contextmanager
def same_threads(like: Tensor) -> Iterator[None]:
    """The number of threads is afterwards what it was, even if a loop ends in an error."""
    if like.device.type != "cpu":
        yield
        return
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def popped(stack: list[T]) -> Iterator[T]:
    """Items from the end of a list that may grow meanwhile."""
    while stack:
        yield stack.pop()
