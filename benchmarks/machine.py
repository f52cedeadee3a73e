"""Where and when something was measured."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch


def cpu_model() -> str:
    """Name of the processor, as the system gives it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """The machine, the software and the date; every log begins with it."""
    variables = ("OMP_", "MKL_", "GOMP_", "KMP_", "MALLOC_", "TORCH")
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parallel": torch.__config__.parallel_info().strip(),
        "load average": os.getloadavg(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(variables)},
    }


def log_name(description: dict[str, Any]) -> str:
    """``<date>-<cpu>``, fit for a file name."""
    cpu = re.sub(r"\(r\)|\(tm\)|processor|cpu", "", description["cpu"], flags=re.I)
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    return f"{description['date'][:10]}-{cpu}-{description['cores']}-cores"
