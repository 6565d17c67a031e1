"""Compiles recorded launches for GPUs that are not here, and reads what came out."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Largest dynamic shared memory of one program, from the makers' tables."""
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One recorded launch: kernel, grid and arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def identity(self) -> str:
        """Equal for launches that Triton compiles to the same program."""
        signature, constants, divisible, options = self.specialisation()
        return repr((self.kernel.__name__, signature, constants, divisible, options))

    def specialisation(
        self,
    ) -> tuple[dict[str, str], dict[str, Any], tuple[int, ...], dict[str, int]]:
        """Types, constants, arguments divisible by 16 and options, as Triton's launcher has it."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        divisible: list[int] = []
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and _is_one(value)):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                divisible.append(index)
            else:
                signature[name] = "i64" if value >= 2**31 else "i32"
                if special and value % 16 == 0:
                    divisible.append(index)
        options = {name: self.arguments[name] for name in OPTIONS if name in self.arguments}
        return signature, constants, tuple(divisible), options


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiler says about one compiled kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: Counter[str]
    """Tensor-core instructions by name: HMMA, HGMMA, UTCHMMA, v_mfma."""
    wide_loads: int
    """Loads of 16 bytes at once from global memory, straight to shared memory on NVIDIA."""


def compile_launch(launch: Launch, arch: str, folder: Path) -> Program:
    """Compile for `arch` and read registers, spills, shared memory and instructions."""
    signature, constants, divisible, options = launch.specialisation()
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in divisible},
    )
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    shared = int(compiled.metadata.shared)
    if arch.startswith("gfx"):
        return _amd_program(str(compiled.asm["amdgcn"]), shared)
    return _nvidia_program(str(compiled.asm["ptx"]), compiled.asm["cubin"], arch, shared, folder)


def _nvidia_program(ptx: str, cubin: bytes, arch: str, shared: int, folder: Path) -> Program:
    (folder / "kernel.ptx").write_text(ptx)
    (folder / "kernel.cubin").write_bytes(cubin)
    number = int(arch.removeprefix("sm_"))
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    listing = subprocess.run(
        [get_ptxas(number).path, "-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "again"],
        cwd=folder, check=True, capture_output=True, text=True,
    ).stderr  # fmt: skip
    registers = re.search(r"Used (\d+) registers", listing)
    assert registers, listing
    spills = re.findall(r"(\d+) bytes spill", listing)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    code = subprocess.run(
        [tools / "nvdisasm", "-c", "kernel.cubin"],
        cwd=folder, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return Program(
        registers=int(registers[1]),
        spilled_bytes=sum(map(int, spills)),
        shared_bytes=shared,
        matrix_instructions=Counter(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA)", code)),
        wide_loads=len(re.findall(r"LDGSTS\.E\.\S*128", code)),
    )


def _amd_program(assembly: str, shared: int) -> Program:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}: *(\d+)", assembly)
        assert found, name
        return int(found[1])

    return Program(
        registers=number("vgpr_count"),
        spilled_bytes=4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        shared_bytes=shared,
        matrix_instructions=Counter(re.findall(r"\bv_mfma", assembly)),
        wide_loads=len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
    )


def _is_one(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and value == 1
