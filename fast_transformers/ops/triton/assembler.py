"""The assembler that makes machine code of the kernels.

ptxas of CUDA 12.8 gets some products wrong: it adds the place of a factor's part to a register
that nothing has written, so that values are wrong and now and then a kernel faults. Triton 3.6
calls it for Hopper, and carries that of CUDA 12.9 for later GPUs, in whose code nothing wrong was
found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from triton import knobs
from triton.backends.nvidia.compiler import ptx_get_version
from triton.compiler import make_backend
from triton.runtime import driver

from ..choose import INTERPRETED

OLDEST = (12, 9)  # of CUDA
LOCK = Lock()  # who is done sets back what other threads would compile by


def assembler() -> Any:
    """The one that Triton calls, or a newer one that it carries: path and version.

    Raises:
        RuntimeError: if neither gets kernels right.
    """
    usual = knobs.nvidia.ptxas
    for tool in usual, getattr(knobs.nvidia, "ptxas_blackwell", usual):
        if tuple(map(int, tool.version.split("."))) >= OLDEST:
            return tool
    raise RuntimeError(
        f"the assembler {usual.path} is of CUDA {usual.version}, which gets kernels wrong; set "
        "TRITON_PTXAS_PATH to the ptxas of CUDA 12.9 or later"
    )


@contextmanager
def assembled() -> Iterator[dict[str, Any]]:
    """Kernels compiled inside are assembled right; gives the options that set them apart from
    others in Triton's cache."""
    if INTERPRETED:
        yield {}
        return
    with LOCK, knobs.nvidia.scope():
        options = {}
        if (tool := assembler()) != knobs.nvidia.ptxas:
            # kernels of others are kept by the version of theirs, which is asked for only once
            make_backend(driver.active.get_current_target()).hash()
            knobs.nvidia.ptxas = tool.path
            options["ptx_version"] = ptx_get_version(tool.version)
        yield options
