"""What the Triton forms share: where they can run, and how a compiled variant is described.

Names in kernels follow one convention: `p_` pointers, `s_` strides, `o_` offsets, `m_` masks, `i_` program
ids, `b_` blocks of values. Addresses are 64-bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.knobs
from torch import Tensor

# How float32 products of matrices run on the matrix units: three passes keep float32 accuracy on NVIDIA; AMD has
# float32 matrix instructions.
PRECISION = {"cuda": "tf32x3", "hip": "ieee"}


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


def dot_precision() -> str:
    """The `input_precision` of float32 products on the GPU of this process."""
    return PRECISION["hip" if torch.version.hip else "cuda"]


def warp_size() -> int:
    """The threads of a warp on the GPU of this process."""
    return 64 if torch.version.hip else 32


def pointer(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An argument for an optional tensor: itself, or any tensor of the right device that will not be read."""
    return like if tensor is None else tensor


@dataclass(frozen=True)
class Rates:
    """What a GPU's datasheet promises: bytes a second, and operations a second outside and on matrix units.

    `simt` and `matrix` are at float32 accuracy: a third of dense TF32 on NVIDIA, which takes three passes.
    """

    bandwidth: float
    simt: float
    matrix: float

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
    constants that differ on AMD, `architectures` those it is offered for.
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
    architectures: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
