"""Compile a Triton kernel for a GPU that is not here, and read off what came out.

No driver is needed: Triton makes PTX and AMD assembly from the kernel alone, and its wheel ships ptxas, cuobjdump
and nvdisasm.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fi_compile.kernels.gpu import H100, Rates, Variant

# What matrix units multiply for each precision of products.
_OPERANDS = {
    "cuda": {"float32": "tf32", "tf32": "tf32", "bfloat16": "bf16"},
    "hip": {"float32": "f32", "tf32": "xf32", "bfloat16": "bf16"},
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Architecture:
    """What is compiled for: shared memory of a block in bytes, and the datasheet's rates."""

    name: str
    product: str
    target: GPUTarget
    shared: int
    rates: Rates


ARCHITECTURES = (
    Architecture(
        "sm_80", "A100 SXM 80 GB", GPUTarget("cuda", 80, 32), 166_912, Rates(2.039e12, 19.5e12, 156e12 / 3)
    ),
    Architecture("sm_90", "H100 SXM", GPUTarget("cuda", 90, 32), 232_448, H100),
    Architecture("sm_100", "B200", GPUTarget("cuda", 100, 32), 232_448, Rates(8.0e12, 75e12, 1.1e15 / 3)),
    Architecture(
        "gfx942",
        "MI300X",
        GPUTarget("hip", "gfx942", 64),
        65_536,
        Rates(5.3e12, 163.4e12, 163.4e12, tf32=4, bfloat16=8),
    ),
)


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a variant for one architecture.

    registers: of a thread; spilled: bytes of a thread; shared: bytes of a block; matrix: instructions for
    matrix units, `operands` what they multiply; loads: instructions that read global memory, by width in bits.
    """

    variant: Variant
    architecture: Architecture
    registers: int
    spilled: int
    shared: int
    matrix: int
    operands: frozenset[str]
    loads: dict[int, int]

    @property
    def wide(self) -> float:
        """The share of loads that are as wide as they usefully can be: 128 bits, 64 for storage of two bytes."""
        least = 64 if self.variant.narrow else 128
        return sum(n for bits, n in self.loads.items() if bits >= least) / max(1, sum(self.loads.values()))

    @property
    def flaws(self) -> list[str]:
        """Why this must not be offered; empty where it may be."""
        v, found = self.variant, []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > self.architecture.shared:
            found.append(f"needs {self.shared} bytes of shared memory of {self.architecture.shared}")
        if bool(v.by_dot) != bool(self.matrix):
            found.append(f"has {self.matrix} matrix instructions")
        meant = _OPERANDS[self.architecture.target.backend][v.precision]
        if self.matrix and self.operands != {meant}:
            found.append(f"multiplies {', '.join(sorted(self.operands))} on matrix units, {meant} is meant")
        if self.wide < v.wide:
            found.append(f"{self.wide:.0%} of its loads are wide, {v.wide:.0%} are expected")
        return found

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte of memory."""
        return self.variant.flops / (self.variant.reads + self.variant.writes)

    @property
    def predicted(self) -> float:
        """Seconds of a launch at the datasheet's rates; each of these computes float64 at half its float32 rate."""
        v = self.variant
        flops = v.flops * (2 if v.double else 1)
        return self.architecture.rates.at(v.precision).seconds(
            reads=v.reads, writes=v.writes, flops=flops, dots=v.flops * v.by_dot
        )


def compile_variant(variant: Variant, architecture: Architecture) -> Compiled:
    """Compile for an architecture, with the hints the launcher gives for pointers and strides."""
    names = variant.kernel.arg_names
    amd = architecture.target.backend == "hip"
    constants = {**variant.constants, **(variant.hip if amd else {})}
    signature = {name: "constexpr" if name in constants else variant.types[name] for name in names}
    hints = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in variant.aligned
    }
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=hints)
    made = triton.compile(source, target=architecture.target, options={"num_warps": variant.warps})
    read = _read_amd if amd else _read_nvidia
    registers, spilled, matrix, operands, loads = read(made.asm)
    return Compiled(variant, architecture, registers, spilled, made.metadata.shared, matrix, operands, loads)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _read_nvidia(asm: dict) -> tuple[int, int, int, frozenset[str], dict[int, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK", "LOCAL"))
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.M)
    # A local access without a frame would be a spill the frame's size does not show.
    spills = sum(op.startswith(("STL", "LDL")) for op in opcodes)
    matrix = sum(bool(re.match(r"HMMA|HGMMA|DMMA|UTC\w*MMA", op)) for op in opcodes)
    loads = Counter(_bits(op) for op in opcodes if op.startswith(("LDG.", "LDGSTS.")))
    # The fifth generation has one kind of product for both formats of 16 bits.
    ptx = asm["ptx"].replace("kind::f16", "bf16")
    operands = re.findall(r"mma(?:_async)?\.(?:cta_group|sync)\S*?(tf32|bf16|f16|f64)", ptx)
    return registers, stack + local or 4 * spills, matrix, frozenset(operands), dict(loads)


def _bits(opcode: str) -> int:
    found = re.search(r"\.(?:U|S)?(8|16|64|128|256)(?:\.|$)", opcode)
    return int(found[1]) if found else 32


def _read_amd(asm: dict) -> tuple[int, int, int, frozenset[str], dict[int, int]]:
    text = asm["amdgcn"]
    registers, spilled = (
        int(re.search(rf"\.{k}:\s+(\d+)", text)[1]) for k in ("vgpr_count", "vgpr_spill_count")
    )
    private = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
    loads = Counter(
        {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}.get(width, 16)
        for width in re.findall(r"^\s*(?:global|buffer)_load_(\w+)", text, re.M)
    )
    operands = re.findall(r"^\s*v_mfma_\w+x\d+_(\w+?)(?:_1k)?(?:_e64)?\s", text, re.M)
    return registers, private or 4 * spilled, len(operands), frozenset(operands), dict(loads)
