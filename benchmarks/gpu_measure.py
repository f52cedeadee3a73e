"""Times and memory on a CUDA device, and what the device can do at best."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from . import machine

Call = Callable[[], object]
FLUSH = 2**28  # bytes written before each reading, more than any cache holds
CYCLES = 2e9  # of a multiprocessor in a second, about


def describe() -> dict[str, Any]:
    """The card and the software, and what :func:`machine.describe` says."""
    properties = torch.cuda.get_device_properties(0)
    return machine.describe() | {
        "card": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "card memory": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "fla": _version("flash-linear-attention"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def measure(call: Call, seconds: float) -> dict[str, Any]:
    """Median seconds of a call on the device, by its events; caches are cold at each.

    The device is kept busy until the host has prepared the call, as in a model, whose host runs
    ahead. How long the host takes is measured apart.

    Args:
        call: what is measured.
        seconds: how long to measure.

    Returns:
        the median, the second and the last but one tenth of the readings, their number, and the
        median seconds until a call returns to the host.
    """
    for _ in range(3):
        call()
    host = _host(call)
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    each = statistics.median(_readings(call, flush, 3, host))
    count = int(min(max(seconds / (each + host + 2e-4), 5), 200))
    readings = sorted(_readings(call, flush, count, host))
    low, high = readings[count // 10], readings[-1 - count // 10]
    found = {"seconds": statistics.median(readings), "low": low, "high": high}
    return found | {"readings": count, "host": host}


def _host(call: Call) -> float:
    """Median seconds until a call returns, while the device waits for it."""
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _readings(call: Call, flush: torch.Tensor, count: int, host: float) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        torch.cuda._sleep(int(2 * host * CYCLES))
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def extra_peak(call: Call) -> int:
    """Bytes that a call allocates at its peak."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(call: Call) -> Call:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ceilings(seconds: float) -> dict[str, float]:
    """Bytes per second of a copy, read and written, and operations per second of a product."""
    size = 2**30
    source = torch.ones(size, dtype=torch.int8, device="cuda")
    to = torch.empty_like(source)
    copy = measure(lambda: to.copy_(source), seconds)["seconds"]
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    product = measure(lambda: torch.mm(a, b, out=out), seconds)["seconds"]
    return {"copy": 2 * size / copy, "product": 2 * 8192**3 / product}
