"""How long the first call of a shape takes: from a cold cache of kernels, and from a warm one.

Each number is of a process of its own, so that nothing is remembered:
``python -m benchmarks.gpu_compile MAP FORM`` prints one as a JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .contenders import ELU, FAVOR
from .gpu_contenders import CONTENDERS, both_passes, make_inputs

if TYPE_CHECKING:
    from .gpu_sections import Session

FORMS = ("causal", "full")
LENGTHS = (4096, 5000)  # the second one is of the same kind and must compile nothing
BATCH = 4


def first_calls(session: Session) -> None:
    """Forward and backward passes of our maps, all kernels compiled or all loaded."""
    for map in (ELU, FAVOR):
        for form in FORMS:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    case = {"map": map, "form": form, "cache": state}
                    try:
                        session.log.add("compile", **case, **_in_a_process(map, form, cache))
                    except subprocess.CalledProcessError as error:
                        last = error.stderr.strip().splitlines()[-1:]
                        session.fail("compile", [f"{map}, {form}: {' '.join(last)}"], **case)


def _in_a_process(map: str, form: str, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.gpu_compile", map, form]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_CACHE_DIR": cache},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of(map: str, form: str) -> dict[str, float]:
    """Of the first forward pass, the first backward pass, and both at another length."""
    ours = next(c for c in CONTENDERS if c.name == f"ours, {map}")
    attend = ours.make(form == "causal")
    *leaves, gradient = make_inputs(BATCH, LENGTHS[0])
    others = make_inputs(BATCH, LENGTHS[1])
    leaves, rest = ([x.requires_grad_() for x in xs] for xs in (leaves, others[:3]))
    values = [torch.empty(0)]

    def forward() -> None:
        values[0] = attend(*leaves)

    steps: dict[str, Callable[[], object]] = {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(values[0], leaves, gradient),
        "another length": lambda: both_passes(attend, rest, others[3]),
    }
    found = {}
    for name, step in steps.items():
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        found[name] = time.perf_counter() - start
    return found


if __name__ == "__main__":
    print(json.dumps(seconds_of(*sys.argv[1:])))
