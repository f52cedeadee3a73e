"""Machine code of the kernels for Hopper, made and read without a GPU.

``python -m tests.ops.machine_code [--usual] CALL...`` compiles what calls launch, by the assembler
that the package takes or by Triton's ``--usual`` one, and prints what is wrong as JSON. A call is
"FORM MAP E M LENGTH", such as "causal favor:256 64 64 2048".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from fast_transformers import ops
from fast_transformers.feature_maps import Favor, features_of
from fast_transformers.ops import Features, Formula, choose

LINE = re.compile(r"\s*/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([^\s;]+)\s*(.*?)\s*;")
UNIFORM = re.compile(r"(gdesc|desc)?\[?\bUR(\d+)\b(\.64)?")
# opcodes that begin with U and write no uniform register
NO_RESULT = ("UISETP", "UPLOP3", "UTMA", "UCGABAR", "UBLKCP", "USETMAXREG")


class Instruction(NamedTuple):
    """``condition`` is the predicate it depends on."""

    address: int
    condition: str | None
    name: str
    operands: list[str]

    def __str__(self) -> str:
        return f"{self.address:#x} {self.name} {', '.join(self.operands)}"

    @property
    def width(self) -> int:
        """Registers of its result."""
        if self.name.startswith("LDSM"):
            return int(self.name[-1]) if self.name[-1] in "24" else 1
        return 4 if ".128" in self.name else 2 if re.search(r"\.64|WIDE", self.name) else 1

    @property
    def target(self) -> int | None:
        """Of a branch."""
        found = re.search(r"0x([0-9a-f]+)", self.operands[-1]) if self.operands else None
        return int(found[1], 16) if found else None


def read(sass: str) -> list[Instruction]:
    found = (LINE.match(line) for line in sass.splitlines())
    split = re.compile(r",\s*(?![^\[]*\])").split
    return [
        Instruction(int(m[1], 16), m[2], m[3], split(m[4]) if m[4] else []) for m in found if m
    ]


def uniform_registers(x: Instruction) -> tuple[set[int], set[int]]:
    """Uniform registers that an instruction writes, and those that it reads."""
    wrote, reads = set(), set()
    writes = x.name.startswith(("R2UR", "S2UR", "VOTEU", "REDUX"))
    writes |= x.name.startswith("U") and not x.name.startswith(NO_RESULT)
    for i, operand in enumerate(x.operands):
        for kind, number, wide in UNIFORM.findall(operand):
            first = int(number)
            if i == 0 and writes and not kind:
                wrote |= set(range(first, first + x.width))
            elif kind == "gdesc":  # two for each factor in shared memory, the second one's last
                first += 2 * x.operands[1].startswith("R")
                reads |= set(range(first, int(number) + 4))
            else:
                both = kind or wide or ("WIDE" in x.name and i == len(x.operands) - 1)
                reads |= {first, first + 1} if both else {first}
    return wrote, reads


def unwritten(code: list[Instruction]) -> Iterator[str]:
    """Reads of uniform registers that no instruction before them can have written."""
    at = {x.address: i for i, x in enumerate(code)}
    registers = [uniform_registers(x) for x in code]
    before: dict[int, frozenset[int]] = {0: frozenset()}
    todo = [0]
    while todo:
        i = todo.pop()
        after = before[i] | registers[i][0]
        name, next_ones = code[i].name, {i + 1}
        if name.startswith(("BRA", "CALL")):
            conditional = code[i].condition or len(code[i].operands) > 1 or name.startswith("CALL")
            target = code[i].target
            next_ones = {i + 1} if conditional else set()
            next_ones |= {at[target]} if target in at else set()
        elif name.startswith(("EXIT", "RET")) and not code[i].condition:
            next_ones = set()
        for j in next_ones:
            if j < len(code) and (j not in before or not after <= before[j]):
                before[j] = before.get(j, frozenset()) | after
                todo.append(j)
    for i in sorted(before):
        if missing := registers[i][1] - before[i]:
            yield f"{code[i]}: nothing has written {sorted(missing)}"


def overwritten(code: list[Instruction]) -> Iterator[str]:
    """Writes to registers of a product that goes on: of its left factor, or of its result."""
    groups: list[list[tuple[int, set[int]]]] = [[]]  # the last one is not closed yet
    for x in code:
        results = [int(n) for n in re.findall(r"^R(\d+)", x.operands[0])] if x.operands else []
        if x.name.startswith("HGMMA"):
            columns = int(x.name.split("x")[1])
            busy = set(range(results[0], results[0] + columns // 2))
            if left := re.match(r"R(\d+)", x.operands[1]):
                busy |= set(range(int(left[1]), int(left[1]) + 4))
            groups[-1].append((x.address, busy))
            if "gsb0" in x.operands:
                groups.append([])
        elif x.name.startswith("WARPGROUP.DEPBAR"):
            left_over = int(x.operands[1], 16)
            groups = groups[len(groups) - 1 - left_over :] if left_over < len(groups) else groups
        elif results and not x.name.startswith(("ST", "RED")):
            wrote = set(range(results[0], results[0] + x.width))
            for address, busy in (product for group in groups for product in group):
                if wrote & busy:
                    yield f"{x}: the product at {address:#x} is not done"


def faults_of(machine_code: bytes) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        code = read(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert code
    return [*unwritten(code), *overwritten(code)]


class Hopper:
    """As much of a driver as compiling asks for."""

    launcher_cls = None
    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32,
            "max_num_regs": 65536,
        }
    )  # fmt: skip

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def compiled(calls: list[str]) -> dict[str, tuple[str, bytes]]:
    """Call and machine code of every kernel that the calls and their backward passes launch."""
    found, now = {}, ""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found[kernel.hash] = f"{self.__name__} of {now}", kernel.asm["cubin"]
        return kernel

    JITFunction.run = compile_only
    CompiledKernel.__getitem__ = lambda self, grid: lambda *args: None  # of one that is at hand
    choose._not_installed = lambda device: None  # pyright: ignore[reportAttributeAccessIssue]
    driver.set_active(Hopper())
    for now in calls:
        form, name, *sizes = now.split()
        e, m, length = map(int, sizes)
        name, _, n_dims = name.partition(":")
        if name == "favor":
            features = features_of(Favor(e, n_dims=int(n_dims)))
        else:
            features = Features(exponential=False, any_heads=True, formula=Formula(name))
        q, k, v = (
            torch.rand(2, length, 2, d, dtype=torch.bfloat16, requires_grad=True)
            for d in (e, e, m)
        )
        attend = ops.causal_linear_attention if form == "causal" else ops.linear_attention
        values, state = attend(q, k, v, features, impl="triton")
        (values.sum() + state.kv.sum()).backward()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--usual", action="store_true")
    parser.add_argument("calls", nargs="+", metavar="CALL")
    options = parser.parse_args()
    if options.usual:
        from fast_transformers.ops.triton import launch

        launch.assembled = lambda: contextlib.nullcontext({})
    kernels = compiled(options.calls).values()
    faults = {name: faults for name, code in kernels if (faults := faults_of(code))}
    ptxas = knobs.nvidia.ptxas.version
    answer = {"triton": triton.__version__, "usual": ptxas, "kernels": len(kernels)}
    print(json.dumps(answer | {"faults": faults}))


if __name__ == "__main__":
    main()
