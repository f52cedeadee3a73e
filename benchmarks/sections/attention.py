"""Attention over whole sequences: every contender at every length."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from .. import correctness
from ..contenders import NOT_MEASURED, Contender
from ..processes import WorkerError
from ..session import Session
from ..timing import Timed, interleave

PROBE = 1024  # tokens whose time tells whether a first, longer length can be measured at all


@dataclass(frozen=True)
class Case:
    """What all contenders do in turn."""

    causal: bool
    threads: int
    batch: int
    passes: str
    length: int

    @property
    def section(self) -> str:
        return "causal" if self.causal else "full"

    @property
    def fields(self) -> dict[str, object]:
        """As it is logged."""
        fields = asdict(self)
        return {"pass": fields.pop("passes"), **fields}


Known = dict[tuple[Contender, Case], tuple[int, float]]  # by series: a length, and its seconds


def causal(session: Session) -> None:
    """Every query attends to the keys before it."""
    _measure(session, True)


def full(session: Session) -> None:
    """Every query attends to every key."""
    _measure(session, False)


def _measure(session: Session, causal: bool) -> None:
    it = session.settings
    for name, reason in NOT_MEASURED.items():
        session.skip("causal" if causal else "full", reason, contender=name)
    contenders = checked(session, causal, it.contenders)
    known: Known = {}
    cases = [
        Case(causal, *rest)
        for rest in itertools.product(it.threads, it.batches, it.passes, it.lengths)
    ]
    cases = [case for case in cases if case.batch * case.length <= it.largest]
    with session.progress("causal" if causal else "full", len(cases)) as bar:
        for case in cases:
            _measure_case(session, contenders, case, known)
            bar.update()


def checked(session: Session, causal: bool, contenders: Sequence[Contender]) -> list[Contender]:
    """Those that can run here, and whose values and gradients are those of the reference."""
    right = []
    for contender in contenders:
        if (contender, causal) not in session.checked:
            session.checked[contender, causal] = _is_right(session, contender, causal)
        if session.checked[contender, causal]:
            right.append(contender)
    session.release()
    return right


def _is_right(session: Session, contender: Contender, causal: bool) -> bool:
    section = "causal" if causal else "full"
    worker = session.worker(contender.home)
    if worker is None:
        session.skip(section, session.missing[contender.home], contender=contender.name)
        return False
    shape = (correctness.CHECK_BATCH, correctness.CHECK_LENGTH)
    wrong = []
    worker.ask("threads", count=1)
    for backward in (False, True):
        task, options = contender.job(causal, *shape, backward)
        options["tail"] = correctness.CHECK_LENGTH
        try:
            worker.ask("prepare", name="check", task=task, options=options)
            found = worker.ask("results", name="check")
        except WorkerError as error:
            wrong.append(f"{contender.name}, {section}, failed: {error}")
        else:
            wrong += correctness.disagreements(found, contender, causal, *shape)
    if wrong:
        session.fail(section, wrong, contender=contender.name)
    return not wrong


def _measure_case(session: Session, contenders: list[Contender], case: Case, known: Known) -> None:
    timed: dict[Contender, Timed] = {}
    rounds: dict[str, int] = {}
    for contender in contenders:
        series = contender, replace(case, length=0)
        if series not in known and case.length > 2 * PROBE:
            _, _, first = _start(session, contender, replace(case, length=PROBE))
            known[series] = PROBE, first
        expected = _expected(known.get(series), case.length, contender.growth(case.causal))
        fields = {"contender": contender.name, **case.fields}
        if expected > (limit := session.limit):
            reason = f"a call would take about {expected:.2g} s, {limit:.2g} s is the limit by now"
            session.skip(case.section, reason, **fields)
            continue
        one, found, first = _start(session, contender, case)
        shape = (case.causal, case.batch, case.length)
        wrong = correctness.disagreements(found, contender, *shape)
        if wrong:
            session.fail(case.section, wrong, **fields)
            continue
        seconds = one.plan(first)
        timed[contender], rounds[one.job] = one, session.rounds(seconds)
    interleave(timed.values(), rounds)
    for contender, one in timed.items():
        summary = one.summary()
        known[contender, replace(case, length=0)] = case.length, summary["seconds"]
        fields = {"contender": contender.name, "map": contender.map, **case.fields}
        session.log.add(case.section, **fields | summary)
    session.release()


def _start(
    session: Session, contender: Contender, case: Case
) -> tuple[Timed, dict[str, Tensor], float]:
    """Prepare a job; its results and the seconds of this first call."""
    worker = session.worker(contender.home)
    assert worker is not None
    worker.ask("threads", count=case.threads)
    task, options = contender.job(case.causal, case.batch, case.length, case.passes != "forward")
    worker.ask("prepare", name=contender.name, task=task, options=options)
    start = time.perf_counter()
    found = worker.ask("results", name=contender.name)
    return Timed(worker, contender.name, case.threads), found, time.perf_counter() - start


def _expected(known: tuple[int, float] | None, length: int, growth: int) -> float:
    """Seconds of a call, from those of a shorter one."""
    if known is None:
        return 0.0
    shorter, seconds = known
    return seconds * (length / shorter) ** growth
