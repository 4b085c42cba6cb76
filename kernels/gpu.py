"""What the Triton forms share: where they can run, and how a compiled variant is described.

Names in kernels follow one convention: `p_` pointers, `s_` strides, `o_` offsets, `m_` masks, `i_` program
ids, `b_` blocks of values. Addresses are 64-bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton.knobs
from torch import Tensor

# How products of matrices run on the matrix units. "float32" keeps float32 accuracy: by three passes on NVIDIA, while
# AMD has float32 matrix instructions. The others round operands first, to 11 and to 8 bits; sums are float32 in all.
PRECISIONS: dict[str, dict[str, str]] = {
    "float32": {"cuda": "tf32x3", "hip": "ieee"},
    "tf32": {"cuda": "tf32", "hip": "tf32"},
    "bfloat16": {"cuda": "bf16", "hip": "bf16"},
}
PRECISION = PRECISIONS["float32"]
# The largest relative error of an operand.
ROUNDING = {"float32": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-9}


def interpreted() -> bool:
    """Whether this process interprets Triton kernels (TRITON_INTERPRET=1 before the first import of triton)."""
    return bool(triton.knobs.runtime.interpret)


def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of `device`: a GPU, or anything while interpreting."""
    return device.type == "cuda" or interpreted()


def capable(device: torch.device) -> bool:
    """Whether a device that kernels run on has the matrix units that they use: sm_80 and later, AMD."""
    if device.type != "cuda" or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(device)[0] >= 8


def dot_precision(precision: str = "float32") -> str:
    """How `transforms.product` multiplies on the GPU of this process for one of PRECISIONS.

    Where kernels are interpreted the rounding of operands is modelled: products there are float32 whatever they are
    asked for. Raises ValueError for another precision, and where this GPU has no such instructions.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if interpreted():
        return "ieee" if precision == "float32" else f"{precision} modelled"
    if torch.version.hip and precision == "tf32" and not _has_tf32():
        raise ValueError("precision 'tf32': of AMD's GPUs only gfx942 has it; use 'float32' or 'bfloat16'")
    return PRECISIONS[precision]["hip" if torch.version.hip else "cuda"]


def _has_tf32() -> bool:
    return "gfx942" in torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName


def warp_size() -> int:
    """The threads of a warp on the GPU of this process."""
    return 64 if torch.version.hip else 32


def pointer(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An argument for an optional tensor: itself, or any tensor of the right device that will not be read."""
    return like if tensor is None else tensor


@dataclass(frozen=True)
class Rates:
    """What a GPU's datasheet promises: bytes a second, and operations a second outside and on matrix units.

    `simt` and `matrix` are at float32 accuracy: a third of dense TF32 on NVIDIA, which takes three passes. `tf32` and
    `bfloat16` are how many times that other precisions do.
    """

    bandwidth: float
    simt: float
    matrix: float
    tf32: float = 3.0
    bfloat16: float = 6.0

    def at(self, precision: str) -> Rates:
        """The rates with products in one of PRECISIONS."""
        more = {"float32": 1.0, "tf32": self.tf32, "bfloat16": self.bfloat16}[precision]
        return replace(self, matrix=self.matrix * more, tf32=self.tf32 / more, bfloat16=self.bfloat16 / more)

    def seconds(self, *, reads: float, writes: float, flops: float, dots: float = 0.0, **_: float) -> float:
        """The time of a launch: the slowest of memory, arithmetic and matrix units, `dots` of `flops` on those."""
        return max((reads + writes) / self.bandwidth, (flops - dots) / self.simt, dots / self.matrix)


H100 = Rates(3.35e12, 67e12, 494.7e12 / 3)


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: what the static gate compiles for every architecture.

    types: Triton's type of each argument that is no constant; pointers, and integers named in `aligned`, are
    multiples of 16. `reads`, `writes` (bytes) and `flops` are of one launch, `work` its size in words. `by_dot` is
    the share of flops that belongs on matrix units. At least the share `wide` of its loads must be 128 bits wide,
    or 64 where storage of two bytes makes it `narrow`; `double` says that it computes in float64. `hip` are
    constants that differ on AMD, `architectures` those it is offered for. `precision`: of products on matrix
    units, of all `precisions` that are offered.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    warps: int
    work: str
    reads: float
    writes: float
    flops: float
    by_dot: float = 0.0
    wide: float = 1.0
    narrow: bool = False
    double: bool = False
    hip: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    architectures: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")

    def at(self, precision: str) -> Variant:
        """The same with products in another of PRECISIONS."""
        how = PRECISIONS[precision]
        return replace(
            self,
            name=f"{self.name} {precision}",
            constants={**self.constants, "PRECISION": how["cuda"]},
            hip={**self.hip, "PRECISION": how["hip"]},
            precision=precision,
        )
