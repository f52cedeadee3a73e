"""What all the sections of a run share: settings, workers, the log, and who answered wrongly."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .contenders import Contender
from .log import Log, select
from .processes import Worker, WorkerError


@dataclass(frozen=True)
class Settings:
    """What to measure, and for how long.

    Attributes:
        lengths: N of the whole sequences.
        batches: B.
        threads: numbers of threads, one after the other.
        passes: "forward", "forward+backward".
        limit: skip calls that are expected to take longer, in seconds.
        minutes: of the whole run; when they run out, shorter calls are skipped, too.
        largest: skip batches of more tokens.
        quick: fewer rounds.
        repeat: how many times as many rounds, for a machine whose speed changes all the time.
        peers: environment of the older library and performer-pytorch.
        contenders: who takes part in attention over whole sequences.
    """

    lengths: list[int]
    batches: list[int]
    threads: list[int]
    passes: list[str]
    limit: float
    minutes: float
    largest: int
    quick: bool
    repeat: int
    peers: Path
    contenders: list[Contender]


@dataclass
class Session(AbstractContextManager["Session"]):
    """Starts each worker when it is first needed, and ends them all.

    Attributes:
        settings: what to measure.
        log: where it goes.
        failures: what was wrong, a line each.
        missing: why a worker cannot run here, by its name.
        checked: who gives the right answers, causal and full.
    """

    settings: Settings
    log: Log
    failures: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    checked: dict[tuple[Contender, bool], bool] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)
    _workers: dict[str, Worker] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def rounds(self, seconds: float) -> int:
        """How often a call of this length is measured."""
        if self.settings.quick or seconds > 0.5:
            return 3 * self.settings.repeat
        return (5 if seconds > 0.1 else 7) * self.settings.repeat

    @property
    def limit(self) -> float:
        """Seconds that a call may take now: less and less when time runs out."""
        share = (time.monotonic() - self._start) / (60 * self.settings.minutes)
        return self.settings.limit * min(1.0, max(0.02, 4 - 5 * share))

    def worker(self, home: str) -> Worker | None:
        """The worker of a contender, or None if it cannot run here; :attr:`missing` says why."""
        if home not in self._workers and home not in self.missing:
            try:
                worker = self.new_worker(home)
            except WorkerError as error:
                self.missing[home] = str(error)
                self.log.add("missing", home=home, reason=str(error))
                self.say(f"{home}: not measured: {error}")
            else:
                self._workers[home] = self._stack.enter_context(worker)
                worker.ask("threads", count=1)
                if not select(self.log.records, "versions", home=home):
                    self.log.add("versions", home=home, versions=worker.about)
        return self._workers.get(home)

    def new_worker(self, home: str) -> Worker:
        """A fresh process of the same kind, which the caller ends."""
        if home == "ours":
            return Worker(home)
        if not (self.settings.peers / "bin" / "python").exists():
            raise WorkerError(
                f"there is no environment in {self.settings.peers}; "
                "make it with: python -m benchmarks older-library --make"
            )
        return Worker(home, self.settings.peers)

    def close_workers(self) -> None:
        """End all workers; they start again when they are needed."""
        self._workers.clear()
        self._stack.close()

    def release(self) -> None:
        """Have all workers forget their jobs."""
        for worker in self._workers.values():
            worker.ask("release")

    def skip(self, section: str, reason: str, **case: Any) -> None:
        """Log that something is not measured."""
        self.log.add(section, **case, skipped=reason)

    def fail(self, section: str, wrong: list[str], **case: Any) -> None:
        """Log answers that are wrong: there will be no speed, and the run will fail."""
        self.failures += wrong
        self.log.add(section, **case, wrong=wrong)
        for line in wrong:
            self.say(f"WRONG: {line}")

    def say(self, line: str) -> None:
        """Print above the progress bar, to standard error."""
        tqdm.write(line, file=sys.stderr)

    def progress(self, what: str, total: int) -> tqdm:
        """A progress bar for one section."""
        return tqdm(total=total, desc=what, unit="case", leave=False, dynamic_ncols=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close_workers()
