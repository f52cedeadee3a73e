"""Imports point downwards, and files stay short enough to read in one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fast_transformers"
ORDER = [
    "ops",
    "state",
    "masking",
    "events",
    "feature_maps",
    "specs",
    "rotary",
    "causal_product",
    "testing",
    "attention_registry",
    "attention",
    "blocks",
    "transformers",
    "recurrent",
    "compiled",
    "stepper",
    "builders",
    "utils",
    "weight_mapper",
    "diagnostics",
    "hf",
    "info",
    "recall",
    "compare",
    "cli",
    "__main__",
]
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Absolute names of all modules that a file imports, wherever in the file."""
    package = ["fast_transformers", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    if path.name == "__init__.py" and path.parent == PACKAGE:
        assert not [name for name in imports_of(path) if name.startswith("fast_transformers")]
        return
    here = ORDER.index(layer_of(path))
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "fast_transformers" and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= here, f"{layer_of(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_the_order_is_complete() -> None:
    assert {layer_of(path) for path in FILES} - {"__init__"} == set(ORDER)
