"""The machine itself: its matrix products, threads, and what a busy neighbour does."""

from __future__ import annotations

from contextlib import nullcontext

from ..contenders import CONTENDERS, ELU, FAVOR, OURS, Contender
from ..processes import Worker, busy_process
from ..session import Session
from ..timing import Timed, interleave
from ..worker.jobs import DIM, HEADS
from .attention import checked

LENGTH = 4096
PRODUCTS = {
    "mm 2048 x 2048": {"batch": 1, "size": 2048},
    "bmm 8 x 64 x 64 x 64": {"batch": 8, "size": 64},
}
CHUNK = 32


def forward_flops(features: int, projected: int, length: int, batch: int = 1) -> int:
    """Floating point operations of the matrix products in a causal forward pass.

    Per token and head, with C tokens in a chunk, E = M dimensions and F features, a product
    and a sum being two operations:

        phi(q) phi(k)^T     2 C F    within the chunk, without skipping the upper triangle
        weights times v     2 C M
        phi(q) S            2 F M    what came before the chunk
        S += phi(k)^T v     2 F M
        projections         4 E P    of q and of k to P random directions

    Args:
        features: F.
        projected: P.
        length: tokens.
        batch: sequences.
    """
    each = 2 * CHUNK * (features + DIM) + 4 * features * DIM + 4 * DIM * projected
    return each * HEADS * length * batch


FLOPS = {ELU: forward_flops(DIM, 0, LENGTH), FAVOR: forward_flops(256, 128, LENGTH)}


def products(session: Session) -> None:
    """Rates of matrix products, and the fraction of them that our whole forward pass reaches."""
    ours = checked(session, True, [c for c in CONTENDERS if c.name in OURS.values()])
    worker = session.worker("ours")
    assert worker is not None
    for threads in session.settings.threads:
        worker.ask("threads", count=threads)
        for name, shape in PRODUCTS.items():
            worker.ask("prepare", name=name, task="product", options=shape)
        for contender in ours:
            _prepare(session, contender)
        timed = {n: Timed(worker, n, threads) for n in [*PRODUCTS, *(c.name for c in ours)]}
        for one in timed.values():
            one.plan()
        interleave(timed.values(), session.rounds(0.0))
        flops = {name: 2 * s["batch"] * s["size"] ** 3 for name, s in PRODUCTS.items()}
        flops |= {OURS[map]: count for map, count in FLOPS.items()}
        for name, one in timed.items():
            summary = one.summary()
            rate = flops[name] / summary["seconds"]
            session.log.add("products", what=name, flops=flops[name], rate=rate, **summary)
    session.release()


def neighbour(session: Session) -> None:
    """One and two threads, on an idle machine and beside a process that is always busy.

    Time on the wall, for one thread as well. The busy process is on no core in particular.
    """
    maps = [ELU] if session.settings.quick else [ELU, FAVOR]
    linear = [c for c in CONTENDERS if c.home in ("ours", "older") and c.map in maps]
    right = checked(session, True, linear)
    with session.progress("neighbour", 4) as bar:
        for busy in (False, True):
            for threads in (1, 2):
                with busy_process() if busy else nullcontext():
                    timed = []
                    for contender in right:
                        worker = _prepare(session, contender)
                        worker.ask("threads", count=threads)
                        one = Timed(worker, contender.name, threads, clock="wall")
                        one.warm = False  # a call may take seconds beside the busy process
                        one.measure()
                        one.readings.clear()
                        timed.append(one)
                    rounds = session.rounds(0.2)
                    interleave(timed, rounds, patience=5 if session.settings.quick else 15)
                for one in timed:
                    fields = {"contender": one.job, "busy": busy, "length": LENGTH}
                    session.log.add("neighbour", **fields | one.summary())
                session.release()
                bar.update()


def _prepare(session: Session, contender: Contender) -> Worker:
    worker = session.worker(contender.home)
    assert worker is not None
    task, options = contender.job(True, 1, LENGTH, False)
    worker.ask("prepare", name=contender.name, task=task, options=options)
    return worker


def idle_workers(session: Session) -> None:
    """Whether ours takes the same time alone and beside the waiting workers of the others.

    Alone, with the others started and called just before each measurement, and alone again.
    """
    contender = next(c for c in CONTENDERS if c.name == OURS[ELU])
    if not checked(session, True, [contender]):
        return
    peers = [c for c in CONTENDERS if c.home == "older" and c.map == ELU]
    for threads in session.settings.threads:
        readings: dict[bool, list[Timed]] = {True: [], False: []}
        for beside in (False, True, False):
            session.close_workers()
            one = Timed(_prepare(session, contender), contender.name, threads)
            one.worker.ask("threads", count=threads)
            one.plan()
            others = []
            if beside and session.worker("older") is not None:
                others = [Timed(_prepare(session, p), p.name, threads) for p in peers]
                for other in others:
                    other.worker.ask("threads", count=threads)
            interleave([*others, one], session.rounds(0.0))
            readings[beside].append(one)
        for beside, parts in readings.items():
            merged = parts[0]
            merged.readings = [r for part in parts for r in part.readings]
            session.log.add("idle workers", beside=beside, **merged.summary())
    session.release()
