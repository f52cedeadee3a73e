"""Extra peak memory of one call, each in a fresh process."""

from __future__ import annotations

from contextlib import ExitStack

from ..contenders import CONTENDERS, Contender
from ..processes import Worker, WorkerError
from ..session import Session
from ..worker.ours import MAPS
from .attention import checked

LENGTHS, QUICK_LENGTHS = [1024, 4096, 16384], [4096]
WARM_UP = 128  # tokens of a first call
PATIENCE = 4  # a single call may take this many times the limit of repeated ones


def memory(session: Session) -> None:
    """Every map of this library and every peer that answers rightly; batches of one."""
    ours = [Contender(f"ours, {name}", "ours", name) for name in MAPS]
    peers = [c for c in CONTENDERS if c.home != "ours" or c.map is None]
    quick = session.settings.quick
    both = (True,) if quick else (True, False)
    right = {causal: checked(session, causal, CONTENDERS) for causal in both}
    series = [
        (contender, causal, backward)
        for causal in both
        for contender in [*ours, *peers]
        for backward in (False, True)
        if contender in right[causal] or contender not in CONTENDERS  # nobody else's maps
        if session.worker(contender.home) is not None
        if not (quick and contender.home == "performer")  # it takes seconds, and gigabytes
    ]
    with session.progress("memory", len(series)) as bar, ExitStack() as stack:
        # these workers only fork: they have called nothing that would count for less later
        homes = {contender.home for contender, _, _ in series}
        workers = {home: stack.enter_context(session.new_worker(home)) for home in homes}
        for worker in workers.values():
            worker.ask("threads", count=1)
        for one in series:
            _measure(session, workers[one[0].home], *one)
            bar.update()


def _measure(
    session: Session, worker: Worker, contender: Contender, causal: bool, backward: bool
) -> None:
    case = {
        "contender": contender.name,
        "map": contender.map,
        "causal": causal,
        "batch": 1,
        "pass": "forward+backward" if backward else "forward",
    }
    expected = 0.0
    for length in QUICK_LENGTHS if session.settings.quick else LENGTHS:
        if expected > PATIENCE * session.settings.limit:
            reason = f"the call would take about {expected:.0f} s"
            session.skip("memory", reason, **case, length=length)
            return
        task, options = contender.job(causal, 1, length, backward)
        try:
            found = worker.ask("peak", task=task, options=options, warm_up=WARM_UP)
        except WorkerError as error:
            session.skip("memory", str(error), **case, length=length)
            return
        session.log.add("memory", **case, length=length, bytes=found["bytes"])
        expected = found["seconds"] * 4 ** contender.growth(causal)
