"""How times are taken: contenders one call after the other, round after round; medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .processes import Worker

# Seconds of sleep before a measurement. OpenMP threads wait for more work by spinning, which was
# seen to take some 5 ms of CPU time after a call on two threads, sooner or later.
SETTLE = 0.03
SHORT = 0.02  # seconds that a measurement should last at least: shorter calls are repeated
WARM = 0.2  # calls up to this many seconds are preceded by one that is not measured


@dataclass
class Timed:
    """One job whose times are collected.

    Args:
        worker: where it is.
        job: its name there.
        threads: of each call; they decide which clock counts, unless ``clock`` is given.
        clock: "cpu", the CPU time of the process, leaves out the time that other processes have
            the core and equals the time on the wall of an idle machine: for one thread. "wall"
            is for more threads, whose CPU times would add up.
    """

    worker: Worker
    job: str
    threads: int = 1
    clock: str = ""
    calls: int = 1
    warm: bool = True
    readings: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = self.clock or ("cpu" if self.threads == 1 else "wall")

    def plan(self, seconds: float | None = None) -> float:
        """Choose how many calls make one measurement; returns seconds of one call.

        Args:
            seconds: those of a first call, if there was one. Long calls are not made again.
        """
        self.warm = seconds is None or seconds < WARM
        while self.warm:
            seconds = max(self._read()[self.clock], 1e-7)
            calls = max(1, math.ceil(SHORT / seconds))
            if calls <= 2 * self.calls:
                self.warm = seconds < WARM
                break
            self.calls = calls
        assert seconds is not None
        return seconds

    def measure(self) -> None:
        """One measurement."""
        self.readings.append(self._read())

    def _read(self) -> dict[str, float]:
        return self.worker.ask(
            "time", name=self.job, calls=self.calls, settle=SETTLE, warm=self.warm
        )

    def summary(self) -> dict[str, Any]:
        """Median, extremes and raw readings, as they are logged. All times are in seconds."""
        seconds = [reading[self.clock] for reading in self.readings]
        return {
            "threads": self.threads,
            "clock": self.clock,
            "seconds": statistics.median(seconds),
            "low": min(seconds),
            "high": max(seconds),
            "calls": self.calls,
            "wall": [reading["wall"] for reading in self.readings],
            "cpu": [reading["cpu"] for reading in self.readings],
        }


def interleave(
    timed: Iterable[Timed], rounds: int | Mapping[str, int], patience: float = 30.0
) -> None:
    """Measure every job once per round, so that all see the same states of the machine.

    Args:
        timed: the jobs.
        rounds: how many rounds each takes part in, by job.
        patience: seconds after which a job takes part in no further round.
    """
    timed = list(timed)
    left = {one.job: rounds if isinstance(rounds, int) else rounds[one.job] for one in timed}
    spent = dict.fromkeys(left, 0.0)
    while any(left.values()):
        for one in timed:
            if left[one.job]:
                start = time.perf_counter()
                one.measure()
                spent[one.job] += time.perf_counter() - start
                left[one.job] = left[one.job] - 1 if spent[one.job] < patience else 0
