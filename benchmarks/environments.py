"""The virtual environment of the libraries that this one is compared with.

The older library has this library's import name and compiles C++ while it is installed, so it
cannot be a dependency; it needs a compiler, and four minutes or more. performer-pytorch goes into
the same environment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from .processes import Worker, WorkerError

DEFAULT = Path(__file__).parent / ".older"
OLDER = "pytorch-fast-transformers==0.4.0"
PEERS = ["performer-pytorch==1.1.4"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks older-library``."""
    parser.add_argument("--make", action="store_true", help="make the environment")
    parser.add_argument("--path", type=Path, default=DEFAULT, help="where (%(default)s)")
    parser.add_argument(
        "--torch",
        default=f"torch=={torch.__version__}",
        help="what to compile against; the same build as here by default (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Make the environment if asked to; say what it holds."""
    if args.make:
        make(args.path, args.torch)
    for home in ("older", "performer"):
        try:
            with Worker(home, args.path) as worker:
                for package, version in worker.about.items():
                    print(f"{home}: {package} {version}")
        except WorkerError as error:
            print(f"{home}: cannot be used: {error}")
            return 1
    return 0


def make(path: Path, torch_requirement: str) -> None:
    """Create the environment and compile the older library, at low priority.

    Its setup.py compiles for CUDA wherever it finds ``nvcc``, which fails beside a CPU build of
    torch, so folders with ``nvcc`` are hidden from it.

    Raises:
        subprocess.CalledProcessError: if a step fails; its output is on the terminal.
    """
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    visible = [str(path / "bin"), *(f for f in folders if not Path(f, "nvcc").exists())]
    # a PYTHONPATH that shows this library would hide the older one
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join(visible)

    def install(*what: str) -> None:
        pip = [path / "bin" / "python", "-m", "pip", "install", *what]
        subprocess.run(["nice", "-n", "19", *pip], check=True, env=environment)

    install(torch_requirement, "setuptools", "wheel", "numpy")
    install("--no-build-isolation", OLDER)
    install(*PEERS)
