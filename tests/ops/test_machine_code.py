"""What the assembler makes of the kernels, found without a GPU by a process that compiles them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ops.kernels import MARKS

pytestmark = MARKS

CALLS = {
    "few dimensions": ["causal identity 45 8 12", "causal favor:64 45 8 70"],
    "few directions": ["causal favor:8 64 16 2048", "full favor:64 128 8 70"],
    "causal": ["causal elu_plus_one 64 64 2048", "causal favor:256 64 64 2048"],
    "full": ["full elu_plus_one 64 64 2048", "full favor:256 64 64 2048"],
}


def faults(path: Any, *arguments: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.machine_code", *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_nothing_is_wrong_with_the_kernels(tmp_path, calls) -> None:
    answer = faults(tmp_path, *calls)
    assert answer["kernels"] >= 5
    assert answer["faults"] == {}


def test_the_assembler_of_cuda_12_8_gets_them_wrong(tmp_path) -> None:
    answer = faults(tmp_path, "--usual", CALLS["few dimensions"][0])
    wrong = float(answer["usual"]) < 12.9
    assert list(answer["faults"]) == ["attend_along of causal identity 45 8 12"] * wrong


PRODUCT = """
/*0000*/ UIADD3 UR6, UR6, 0x20, URZ ;
/*0010*/ UMOV UR7, 0x40000040 ;
/*0020*/ HGMMA.64x16x16.F32.BF16 R24, R36, gdesc[UR4], RZ, !UPT, gsb0 ;
/*0030*/ {} ;
/*0040*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
/*0050*/ FADD R36, R24, R24 ;
/*0060*/ EXIT ;
"""


@pytest.mark.parametrize(
    ("between", "found"),
    [
        ("NOP", []),
        ("FADD R40, R1, R1", []),
        ("FADD R39, R1, R1", ["0x30 FADD R39, R1, R1: the product at 0x20 is not done"]),
        ("LDS.128 R28, [R1]", ["0x30 LDS.128 R28, [R1]: the product at 0x20 is not done"]),
    ],
)
def test_faults_are_found(between, found) -> None:
    from tests.ops import machine_code

    code = machine_code.read(PRODUCT.format(between))
    assert list(machine_code.overwritten(code)) == found
    missing = "nothing has written [6]"
    assert list(machine_code.unwritten(code)) == [f"{code[0]}: {missing}"]
    assert list(machine_code.unwritten(code[1:])) == [f"{code[2]}: {missing}"]


def test_registers_written_on_any_path_are_not_missed() -> None:
    """A loop, and a branch that not every thread takes."""
    from tests.ops import machine_code

    code = machine_code.read(
        """
        /*0000*/ @P0 BRA 0x20 ;
        /*0010*/ UMOV UR4, 0x1 ;
        /*0020*/ MOV R1, UR4 ;
        /*0030*/ MOV R2, UR5 ;
        /*0040*/ R2UR UR5, R3 ;
        /*0050*/ @!P1 BRA 0x20 ;
        /*0060*/ EXIT ;
        /*0070*/ MOV R2, UR9 ;
        """
    )
    assert list(machine_code.unwritten(code)) == []


@pytest.mark.parametrize(
    ("usual", "later", "taken"),
    [("12.8", "12.9", "12.9"), ("13.1", "12.9", "13.1"), ("12.9", None, "12.9")],
)
def test_the_assembler_that_is_taken(monkeypatch, usual, later, taken) -> None:
    from fast_transformers.ops.triton import assembler

    tools = {"ptxas": usual, "ptxas_blackwell": later}
    found = {k: SimpleNamespace(path=k, version=v) for k, v in tools.items() if v is not None}
    monkeypatch.setattr(assembler.knobs, "nvidia", SimpleNamespace(**found))
    assert assembler.assembler().version == taken


@pytest.mark.parametrize("later", [{}, {"ptxas_blackwell": "12.8"}])
def test_no_assembler_is_right(monkeypatch, later) -> None:
    from fast_transformers.ops.triton import assembler

    tools = {"ptxas": "12.8", **later}
    found = {k: SimpleNamespace(path=k, version=v) for k, v in tools.items()}
    monkeypatch.setattr(assembler.knobs, "nvidia", SimpleNamespace(**found))
    with pytest.raises(RuntimeError, match=r"is of CUDA 12\.8.* set TRITON_PTXAS_PATH"):
        assembler.assembler()
