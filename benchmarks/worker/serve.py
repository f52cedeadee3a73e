"""The loop of a worker: one command comes in, one answer goes out, nothing runs in between."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pickle
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from .jobs import Job


class Server:
    """What can be asked of a worker. All arguments and answers are built-in types and tensors.

    Args:
        tasks: makes a job from its name and options; the name is a key.
        about: what is measured here, by package.
    """

    def __init__(self, tasks: dict[str, Callable[..., Job]], about: dict[str, str]) -> None:
        self.tasks, self.versions = tasks, about
        self.jobs: dict[str, Job] = {}

    def about(self) -> dict[str, str]:
        """Versions and places of the packages."""
        return self.versions

    def threads(self, count: int) -> None:
        """Threads of every later call."""
        torch.set_num_threads(count)

    def prepare(self, name: str, task: str, options: dict[str, Any]) -> None:
        """Make a job and its inputs."""
        self.jobs[name] = self.tasks[task](**options)

    def results(self, name: str) -> dict[str, torch.Tensor]:
        """Call a job once and return what there is to check."""
        return self.jobs[name].results()

    def release(self) -> None:
        """Forget all jobs."""
        self.jobs.clear()
        gc.collect()

    def time(self, name: str, calls: int, settle: float, warm: bool) -> dict[str, float]:
        """Seconds per call, mean over some calls without a pause.

        Args:
            name: the job.
            calls: how many.
            settle: seconds to sleep first. Threads of any process that wait for OpenMP work spin
                for some milliseconds after a call; by then they are asleep.
            warm: whether to make one call before the clock starts.

        Returns:
            "wall" and "cpu", the time of the process in all its threads.
        """
        job = self.jobs[name]
        time.sleep(settle)
        if warm:
            job()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            job()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall": wall / calls, "cpu": cpu / calls}

    def peak(self, task: str, options: dict[str, Any], warm_up: int) -> dict[str, float]:
        """Extra memory of one call, in a fork of this process that then ends.

        Args:
            task: the job, as in :meth:`prepare`.
            options: of the job.
            warm_up: length of a job that is called before, to start what is started once.

        Returns:
            "bytes", and the "seconds" of the call.

        Raises:
            MemoryError: if the fork does not survive.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            for length in (warm_up, options["length"]):
                job = self.tasks[task](**options | {"length": length})
                size, seconds = _extra_memory(job)
            os.write(writer, pickle.dumps({"bytes": size, "seconds": seconds}))
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        if status or not answer:
            raise MemoryError(f"the process of the call ended with status {status}")
        return pickle.loads(answer)


def _extra_memory(job: Job) -> tuple[int, float]:
    """Bytes by which one call raises the resident memory at most, and its seconds.

    The high-water mark of the process is set back to what is resident (Linux's clear_refs), and
    read after the call. (``ru_maxrss`` will not do: it starts at the peak of the process that
    started this one.)
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, start = _status("VmRSS"), time.perf_counter()
    kept = job()
    seconds, after = time.perf_counter() - start, _status("VmHWM")
    del kept
    return after - before, seconds


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.M)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def serve(descriptor: int, module: str) -> None:
    """Answer commands until the other end of the socket is closed.

    Args:
        descriptor: an open socket.
        module: which module of this package has the ``TASKS`` and ``ABOUT``.
    """
    connection = Connection(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process when interrupted
    os.dup2(2, 1)  # some packages print while they are imported

    def answer(kind: str, value: object) -> None:
        connection.send_bytes(pickle.dumps((kind, value)))  # send() would share tensors' memory

    try:
        home = importlib.import_module(f"{__package__}.{module}")
    except ImportError as error:
        answer("error", f"{type(error).__name__}: {error}")
        return
    server = Server(home.TASKS, home.ABOUT)
    answer("ready", home.ABOUT)
    while True:
        try:
            command, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            result = getattr(server, command)(**arguments)
        except Exception as error:
            answer("error", f"{type(error).__name__}: {error}")
        else:
            answer("ok", result)
