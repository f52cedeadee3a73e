"""The parent's side of the worker processes, and a process that keeps a core busy."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_START = (
    "import sys; sys.path.append(sys.argv[1]); from benchmarks.worker.serve import serve; "
    "serve(int(sys.argv[2]), sys.argv[3])"
)


class WorkerError(RuntimeError):
    """A worker could not start, or could not do what it was asked."""


class Worker:
    """A process that waits for one command at a time, and uses no time while it waits.

    Args:
        module: the module of :mod:`.worker` that it runs.
        environment: the virtual environment to run it in; None is that of this process. Another
            environment sees nothing of this one, so that it may hold a package of the same name.

    Raises:
        WorkerError: if it cannot be started; the message says why.
    """

    def __init__(self, module: str, environment: Path | None = None) -> None:
        ours, theirs = socket.socketpair()
        python = [sys.executable]
        if environment is not None:
            python = [str(environment / "bin" / "python"), "-I"]
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                [*python, "-c", _START, str(ROOT), str(theirs.fileno()), module],
                pass_fds=[theirs.fileno()],
                stderr=self._errors,
            )
        except OSError as error:
            raise WorkerError(f"cannot start {python[0]}: {error.strerror}") from None
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())
        self.about: dict[str, str] = self._answer()

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a method of :class:`.worker.serve.Server` and return what it returns.

        Raises:
            WorkerError: if it fails there.
        """
        try:
            self._connection.send_bytes(pickle.dumps((command, arguments)))
        except OSError:
            raise WorkerError(f"the worker has ended\n{self._last_words()}") from None
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            kind, value = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise WorkerError(f"the worker has ended\n{self._last_words()}") from None
        if kind == "error":
            raise WorkerError(value)
        return value

    def _last_words(self) -> str:
        self._process.wait(timeout=5)
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:].strip()


@contextmanager
def busy_process() -> Iterator[None]:
    """Another process computes all the time, on whichever core the system gives it."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], env=os.environ)
    try:
        yield
    finally:
        process.kill()
        process.wait()
