"""The sum inside a base block on a GPU, for all layers in one launch, with what follows it where that is known.

The reference and the CPU form are in `block`. The position inside the block stays on the device: a launch is the same
at every position, and rows from it on are not read.
"""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels import block
from fi_compile.kernels.gpu import Variant, interpreted, pointer, warp_size

# Rows a program adds at a time, a few to a warp.
ROWS = 32
WARPS = 4


@triton.jit
def block_step_kernel(
    p_out,
    p_pending,
    p_inputs,
    p_table,
    p_local,
    p_source,
    p_x,
    p_skip,
    p_gate,
    block,
    batch,
    channels_in,
    channels,
    s_x_b,
    s_gate_b,
    HAS_SOURCE: tl.constexpr,
    HAS_X: tl.constexpr,
    HAS_GATE: tl.constexpr,
    DOUBLE: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    """A program computes BC channels of one row."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    i_b = tl.program_id(1).to(tl.int64)
    m_c = o_c < channels
    o_in = tl.load(p_source + o_c, mask=m_c, other=0) if HAS_SOURCE else o_c
    o_k = tl.arange(0, BK)
    j = tl.load(p_local)
    acc = tl.load(p_pending + (j * batch + i_b) * channels + o_c, mask=m_c, other=0.0).to(ACC)
    for k in range(0, j, BK):
        o_i = (k + o_k).to(tl.int64)
        m = (o_i < j)[:, None] & m_c[None, :]
        p = p_inputs + (o_i * batch + i_b)[:, None] * channels_in + o_in[None, :]
        y = tl.load(p, mask=m, other=0.0).to(ACC)
        w = tl.load(p_table + (o_i + block - j)[:, None] * channels + o_c[None, :], mask=m, other=0.0)
        acc += tl.sum(y * w.to(ACC), axis=0)
    if HAS_X:
        x = tl.load(p_x + i_b * s_x_b + o_in, mask=m_c, other=0.0).to(ACC)
        acc += x * tl.load(p_skip + o_c, mask=m_c, other=0.0).to(ACC)
    if HAS_GATE:
        acc *= tl.load(p_gate + i_b * s_gate_b + o_c, mask=m_c, other=0.0).to(ACC)
    tl.store(p_out + i_b * channels + o_c, acc.to(p_out.dtype.element_ty), mask=m_c)


def block_step_gpu(
    pending: Tensor,
    inputs: Tensor,
    table: Tensor,
    local: Tensor,
    source: Tensor | None = None,
    x: Tensor | None = None,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """`(pending[j] + sum over i < j of inputs[i] · rho[j - i] + skip · x) · gate`, in one launch: [B, Cout].

    pending [K, B, Cout], inputs [K, B, Cin] and table [2K, Cout] (`block.block_table`) contiguous, of one dtype,
    float32 or float64; local: int64 tensor of one element, j; source: int64 [Cout] or None. x [B, Cin] with
    skip [Cout], and gate [B, Cout], each contiguous in its channels, may be left out.
    """
    rows, batch, channels = pending.shape
    for name, tensor in (("pending", pending), ("inputs", inputs), ("table", table)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; the strides are {tensor.stride()}")
    if (x is None) != (skip is None):
        raise ValueError("x and skip come together")
    out = pending.new_empty(batch, channels)
    if not out.numel():
        return out
    width = 16 // max(4, out.element_size()) * warp_size()
    block_step_kernel[triton.cdiv(channels, width), batch](
        out,
        pending,
        inputs,
        table,
        local,
        pointer(source, inputs),
        pointer(x, inputs),
        pointer(skip, inputs),
        pointer(gate, inputs),
        rows,
        batch,
        inputs.shape[-1],
        channels,
        0 if x is None else x.stride(0),
        0 if gate is None else gate.stride(0),
        HAS_SOURCE=source is not None,
        HAS_X=x is not None,
        HAS_GATE=gate is not None,
        DOUBLE=out.dtype == torch.float64,
        BK=min(ROWS, triton.next_power_of_2(rows)),
        BC=width,
        num_warps=WARPS,
    )
    return out


# Steps are traced: there the launch is one operator.
_library = torch.library.Library("flashinf", "FRAGMENT")
_library.define(
    "block_step(Tensor pending, Tensor inputs, Tensor table, Tensor local, Tensor? source) -> Tensor"
)


def _on_cpu(pending: Tensor, inputs: Tensor, table: Tensor, local: Tensor, source: Tensor | None) -> Tensor:
    form = block_step_gpu if interpreted() else block.block_step
    return form(pending, inputs, table, local, source)


_library.impl("block_step", _on_cpu, "CPU")
_library.impl("block_step", block_step_gpu, "CUDA")


@torch.library.register_fake("flashinf::block_step", lib=_library)
def _shape(pending: Tensor, inputs: Tensor, table: Tensor, local: Tensor, source: Tensor | None) -> Tensor:
    return pending.new_empty(pending.shape[1:])


def block_step(
    pending: Tensor, inputs: Tensor, table: Tensor, local: Tensor, source: Tensor | None = None
) -> Tensor:
    """Row j of `pending` and the block's sum, [B, Cout]: `block_step_gpu` as an operator that can be traced."""
    return torch.ops.flashinf.block_step(pending, inputs, table, local, source)


def block_step_traffic(rows: float, extra: int = 0, size: int = 4) -> dict[str, float]:
    """What one channel of one row costs where `rows` rows are summed: bytes, floating-point operations.

    extra: how many of skip, newest input and gate are read too.
    """
    return {"reads": size * (2 * rows + 1 + extra), "writes": size, "flops": 2 * rows + 1 + extra}


def variants() -> Iterator[Variant]:
    """What is offered: the sum of all layers, and one layer's step with skip and gate."""
    for name, channels, maps, whole in (
        ("block_step", 18 * 768, False, False),
        ("block_step maps", 18 * 768, True, False),
        ("block_step skip gate", 768, False, True),
    ):
        names = block_step_kernel.arg_names
        # At the middle of a block.
        cost = block_step_traffic(16, 3 * whole)
        floats = [n for n in names if n.startswith("p_") and n not in ("p_local", "p_source")]
        integers = ["block", "batch", "channels_in", "channels", "s_x_b", "s_gate_b"]
        yield Variant(
            name=f"{name} K=32",
            kernel=block_step_kernel,
            types={
                **dict.fromkeys(floats, "*fp32"),
                **dict.fromkeys(("p_local", "p_source"), "*i64"),
                **dict.fromkeys(integers, "i32"),
            },
            constants={
                "HAS_SOURCE": maps,
                "HAS_X": whole,
                "HAS_GATE": whole,
                "DOUBLE": False,
                "BK": ROWS,
                "BC": 128,
            },
            hip={"BC": 256},
            aligned=("channels_in", "channels", "s_x_b", "s_gate_b"),
            warps=WARPS,
            work=f"{channels:,} channels",
            reads=channels * cost["reads"],
            writes=channels * cost["writes"],
            flops=channels * cost["flops"],
            # Through a map, a wide load of the table goes with four gathered inputs.
            wide=0.15 if maps else 0.75,
        )
