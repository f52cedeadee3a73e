"""What a new process sees: torch is enough, nothing is printed, nothing else is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

CORE = [
    "attention",
    "builders",
    "causal_product",
    "diagnostics",
    "feature_maps",
    "masking",
    "ops",
    "recurrent.transformers",
    "rotary",
    "testing",
    "transformers",
    "utils",
    "weight_mapper",
    "cli",
]
EXTRAS = [
    "transformers",
    "accelerate",
    "sklearn",
    "matplotlib",
    "tabulate",
    "safetensors",
    "triton",
]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )


def test_the_core_needs_only_torch() -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in EXTRAS)
    imports = "".join(f"import fast_transformers.{name}\n" for name in CORE)
    done = run(f"import sys\n{blocked}{imports}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_core_does_not_look_for_extras() -> None:
    imports = "".join(f"import fast_transformers.{name}\n" for name in CORE)
    done = run(
        f"import sys, torch\nbefore = set(sys.modules)\n{imports}"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    new = set(eval(done.stdout))
    assert "fast_transformers" in new
    assert not new & set(EXTRAS)


def test_the_package_itself_does_not_even_import_torch() -> None:
    done = run("import sys, fast_transformers; print('torch' in sys.modules)")
    assert done.stdout == "False\n"


@pytest.mark.parametrize("arguments", [["info"], ["--version"]])
def test_the_command_line_runs_without_extras(arguments: list[str]) -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in EXTRAS)
    done = run(
        f"import sys\n{blocked}from fast_transformers.cli import main\n"
        f"sys.exit(main({arguments!r}))"
    )
    assert done.returncode == 0, done.stderr
    assert "1.0.0" in done.stdout
