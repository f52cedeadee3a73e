"""One token of generation: this library, the older one, and softmax over a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..contenders import CONTENDERS, ELU, FAVOR, SDPA, Contender, map_options
from ..correctness import disagreements
from ..session import Session
from ..timing import Timed, interleave
from ..worker.jobs import TAIL

BATCHES = [1, 4, 16]
CACHED = 4096


@dataclass(frozen=True)
class Step:
    """One way to decode a token.

    Attributes:
        name: how tables call it.
        home: the worker that runs it.
        task: the worker's name of it.
        like: the contender over whole sequences that has to give the same values.
    """

    name: str
    home: str
    task: str
    like: Contender

    def options(self, batch: int) -> dict[str, Any]:
        """The task's options."""
        if self.like.map is None:
            return {"batch": batch, "length": CACHED}
        return {"batch": batch, **map_options(self.like.map)}


def _like(home: str, map: str | None) -> Contender:
    return next(c for c in CONTENDERS if (c.home, c.map) == (home, map))


STEPS = [
    step
    for map in (ELU, FAVOR)
    for step in (
        Step(f"ours, {map}, module", "ours", "decode", _like("ours", map)),
        Step(f"ours, {map}, function", "ours", "step", _like("ours", map)),
        Step(f"ours, {map}, function in place", "ours", "step in place", _like("ours", map)),
        Step(f"older library, {map}, module", "older", "decode", _like("older", map)),
    )
] + [Step(f"{SDPA}, cache of {CACHED:,}", "ours", "cached", _like("ours", None))]


def decode(session: Session) -> None:
    """Batches of 1, 4 and 16, on one thread."""
    with session.progress("decode", len(BATCHES)) as bar:
        for batch in BATCHES:
            _one_batch(session, batch)
            bar.update()


def _one_batch(session: Session, batch: int) -> None:
    timed = []
    for step in STEPS:
        case = {"contender": step.name, "map": step.like.map, "batch": batch}
        worker = session.worker(step.home)
        if worker is None:
            session.skip("decode", session.missing[step.home], **case)
            continue
        worker.ask("threads", count=1)
        worker.ask("prepare", name=step.name, task=step.task, options=step.options(batch))
        found = worker.ask("results", name=step.name)
        causal, length = (False, CACHED) if step.like.map is None else (True, TAIL)
        wrong = disagreements(found, step.like, causal, batch, length)
        if wrong:
            session.fail("decode", wrong, **case)
            continue
        one = Timed(worker, step.name)
        one.plan()
        timed.append((case, one))
    interleave([one for _, one in timed], session.rounds(0.0))
    for case, one in timed:
        session.log.add("decode", **case | one.summary())
    session.release()
