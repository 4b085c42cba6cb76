"""One step of a short convolution on a GPU, in one launch: the ring's update and the sum over its taps.

The reference and the CPU form are in `short_conv`. The position stays on the device. A launch writes the row of the new
position and reads rows of older ones, of which none is the same: a ring has at least as many rows as there are taps.
"""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels import short_conv
from fi_compile.kernels.gpu import Variant, interpreted, pointer, warp_size

WARPS = 1


@triton.jit
def short_conv_step_kernel(
    p_out,
    p_ring,
    p_x,
    p_kernel,
    p_position,
    p_source,
    rows,
    batch,
    channels_in,
    channels,
    taps,
    HAS_SOURCE: tl.constexpr,
    FAN: tl.constexpr,
    DOUBLE: tl.constexpr,
    BC: tl.constexpr,
):
    """A program computes BC output channels of one row, and writes as many input channels to the ring."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    i_b = tl.program_id(1).to(tl.int64)
    position = tl.load(p_position)
    m_in = o_c < channels_in
    x = tl.load(p_x + i_b * channels_in + o_c, mask=m_in, other=0.0)
    tl.store(p_ring + (position % rows * batch + i_b) * channels_in + o_c, x, mask=m_in)
    m_c = o_c < channels
    acc = tl.zeros([BC], ACC)
    for f in tl.static_range(FAN):
        o_p = o_c * FAN + f
        o_in = tl.load(p_source + o_p, mask=m_c, other=0) if HAS_SOURCE else o_p
        now = tl.load(p_x + i_b * channels_in + o_in, mask=m_c, other=0.0)
        acc += now.to(ACC) * tl.load(p_kernel + o_p, mask=m_c, other=0.0).to(ACC)
        p_w = p_kernel + o_p
        for lag in range(1, taps):
            p_w += channels * FAN
            # No negative dividends: their remainders differ between C and Python.
            row = (position + rows - lag) % rows
            y = tl.load(p_ring + (row * batch + i_b) * channels_in + o_in, mask=m_c, other=0.0)
            w = tl.load(p_w, mask=m_c, other=0.0)
            acc += y.to(ACC) * w.to(ACC)
    tl.store(p_out + i_b * channels + o_c, acc.to(p_out.dtype.element_ty), mask=m_c)


def short_conv_step_gpu(
    ring: Tensor, position: Tensor, x: Tensor, kernel: Tensor, source: Tensor | None = None, fan_in: int = 1
) -> Tensor:
    """The output [B, Cout]; writes x into the ring. Operands as in `short_conv`, contiguous.

    Raises ValueError for operands that are not, and for a ring of fewer rows than taps.
    """
    taps, pairs = kernel.shape
    rows, batch, channels_in = ring.shape
    if rows < taps:
        raise ValueError(f"{taps} taps need a ring of as many rows, found {rows}")
    for name, tensor in (("ring", ring), ("kernel", kernel)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; the strides are {tensor.stride()}")
    channels, x = pairs // fan_in, x.contiguous()
    out = x.new_empty(batch, channels)
    if not batch or not max(channels, channels_in):
        return out
    width = 16 // max(4, out.element_size()) * warp_size()
    short_conv_step_kernel[triton.cdiv(max(channels, channels_in), width), batch](
        out,
        ring,
        x,
        kernel,
        position,
        pointer(source, x),
        rows,
        batch,
        channels_in,
        channels,
        taps,
        HAS_SOURCE=source is not None,
        FAN=fan_in,
        DOUBLE=out.dtype == torch.float64,
        BC=width,
        num_warps=WARPS,
    )
    return out


# Steps are traced: there the launch is one operator.
_library = torch.library.Library("flashinf", "FRAGMENT")
_library.define(
    "short_conv_step(Tensor(a!) ring, Tensor position, Tensor x, Tensor kernel, Tensor? source, int fan_in) -> Tensor"
)


def _on_cpu(
    ring: Tensor, position: Tensor, x: Tensor, kernel: Tensor, source: Tensor | None, fan_in: int
) -> Tensor:
    form = short_conv_step_gpu if interpreted() else short_conv.short_conv_step
    return form(ring, position, x, kernel, source, fan_in)


_library.impl("short_conv_step", _on_cpu, "CPU")
_library.impl("short_conv_step", short_conv_step_gpu, "CUDA")


@torch.library.register_fake("flashinf::short_conv_step", lib=_library)
def _shape(
    ring: Tensor, position: Tensor, x: Tensor, kernel: Tensor, source: Tensor | None, fan_in: int
) -> Tensor:
    return x.new_empty(x.shape[0], kernel.shape[1] // fan_in)


def short_conv_step(
    ring: Tensor, position: Tensor, x: Tensor, kernel: Tensor, source: Tensor | None = None, fan_in: int = 1
) -> Tensor:
    """`short_conv_step_gpu` as an operator that can be traced."""
    return torch.ops.flashinf.short_conv_step(ring, position, x, kernel, source, fan_in)


def short_conv_step_traffic(taps: int, size: int = 4) -> dict[str, float]:
    """What one channel of one row costs: bytes read and written, floating-point operations."""
    return {"reads": size * (1.0 + taps - 1 + taps), "writes": 2.0 * size, "flops": 2.0 * taps}


def variants() -> Iterator[Variant]:
    """What is offered: three taps for each channel, of one layer of width 768 with its three projections."""
    channels, taps = 3 * 768, 3
    for maps in (False, True):
        names = short_conv_step_kernel.arg_names
        cost = short_conv_step_traffic(taps)
        yield Variant(
            name=f"short_conv_step M={taps}{' maps' if maps else ''}",
            kernel=short_conv_step_kernel,
            types={
                **{n: "*fp32" for n in names if n.startswith("p_")},
                **dict.fromkeys(("p_position", "p_source"), "*i64"),
                **dict.fromkeys(("rows", "batch", "channels_in", "channels", "taps"), "i32"),
            },
            constants={"HAS_SOURCE": maps, "FAN": 1, "DOUBLE": False, "BC": 128},
            hip={"BC": 256},
            aligned=("channels_in", "channels"),
            warps=WARPS,
            work=f"{channels:,} channels",
            reads=channels * cost["reads"],
            writes=channels * cost["writes"],
            flops=channels * cost["flops"],
            # The position is one number. Through a map, inputs are gathered one by one.
            wide=0.3 if maps else 0.7,
        )
