"""The sum inside a base block on a GPU, for all layers in one launch, with what follows it where that is known.

The reference and the CPU form are in `block`. The position inside the block stays on the device: a launch is the same
at every position, and rows from it on are not read.
"""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels import block
from fi_compile.kernels.channels import Fan
from fi_compile.kernels.gpu import Variant, interpreted, pointer, warp_size
from fi_compile.kernels.transforms import read_pair

# Rows a program adds at a time, a few to a warp; fewer where both inputs and weights are gathered.
ROWS, FAN_ROWS = 32, 8
WARPS = 4


@triton.jit
def block_step_kernel(
    p_out,
    p_pending,
    p_inputs,
    p_table,
    p_local,
    p_source,
    p_pairs,
    p_x,
    p_skip,
    p_gate,
    block,
    batch,
    channels_in,
    channels,
    pairs,
    most,
    s_x_b,
    s_gate_b,
    HAS_SOURCE: tl.constexpr,
    HAS_FAN: tl.constexpr,
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
    o_k = tl.arange(0, BK)
    j = tl.load(p_local)
    acc = tl.load(p_pending + (j * batch + i_b) * channels + o_c, mask=m_c, other=0.0).to(ACC)
    for i_p in range(0, most):
        o_p, m_p = read_pair(p_pairs, o_c, m_c, i_p, HAS_FAN)
        o_in = tl.load(p_source + o_p, mask=m_p, other=0) if HAS_SOURCE else o_p
        for k in range(0, j, BK):
            o_i = (k + o_k).to(tl.int64)
            m = (o_i < j)[:, None] & m_p[None, :]
            p = p_inputs + (o_i * batch + i_b)[:, None] * channels_in + o_in[None, :]
            y = tl.load(p, mask=m, other=0.0).to(ACC)
            w = tl.load(p_table + (o_i + block - j)[:, None] * pairs + o_p[None, :], mask=m, other=0.0)
            acc += tl.sum(y * w.to(ACC), axis=0)
        if HAS_X:
            x = tl.load(p_x + i_b * s_x_b + o_in, mask=m_p, other=0.0).to(ACC)
            acc += x * tl.load(p_skip + o_p, mask=m_p, other=0.0).to(ACC)
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
    fan: Fan | None = None,
) -> Tensor:
    """`(pending[j] + sum over i < j of inputs[i] · rho[j - i] + skip · x) · gate`, in one launch: [B, Cout].

    pending [K, B, Cout], inputs [K, B, Cin] and table [2K, P] (`block.block_table`) contiguous, of one dtype,
    float32 or float64; local: int64 tensor of one element, j; source: int64 [P] or None. x [B, Cin] with
    skip [P], and gate [B, Cout], each contiguous in its channels, may be left out. P pairs are as many as outputs, or
    what `fan` says.
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
        pointer(None if fan is None else fan.first, inputs),
        pointer(x, inputs),
        pointer(skip, inputs),
        pointer(gate, inputs),
        rows,
        batch,
        inputs.shape[-1],
        channels,
        table.shape[1],
        1 if fan is None else fan.most,
        0 if x is None else x.stride(0),
        0 if gate is None else gate.stride(0),
        HAS_SOURCE=source is not None,
        HAS_FAN=fan is not None,
        HAS_X=x is not None,
        HAS_GATE=gate is not None,
        DOUBLE=out.dtype == torch.float64,
        BK=min(ROWS if fan is None else FAN_ROWS, triton.next_power_of_2(rows)),
        BC=width,
        num_warps=WARPS,
    )
    return out


# Steps are traced: there the launch is one operator.
_library = torch.library.Library("flashinf", "FRAGMENT")
_library.define(
    "block_step(Tensor pending, Tensor inputs, Tensor table, Tensor local, Tensor? source, Tensor? first, int most)"
    " -> Tensor"
)


def _on_gpu(
    pending: Tensor,
    inputs: Tensor,
    table: Tensor,
    local: Tensor,
    source: Tensor | None,
    first: Tensor | None,
    most: int,
) -> Tensor:
    fan = None if first is None else Fan(first, most, table.shape[1] / pending.shape[2])
    return block_step_gpu(pending, inputs, table, local, source, fan=fan)


def _on_cpu(*operands: Any) -> Tensor:
    """As `_on_gpu`; torch's form needs no bound on the pairs of a channel, which comes last."""
    return _on_gpu(*operands) if interpreted() else block.block_step(*operands[:-1])


_library.impl("block_step", _on_cpu, "CPU")
_library.impl("block_step", _on_gpu, "CUDA")


@torch.library.register_fake("flashinf::block_step", lib=_library)
def _shape(pending: Tensor, *rest: object) -> Tensor:
    return pending.new_empty(pending.shape[1:])


def block_step(
    pending: Tensor,
    inputs: Tensor,
    table: Tensor,
    local: Tensor,
    source: Tensor | None = None,
    first: Tensor | None = None,
    most: int = 1,
) -> Tensor:
    """Row j of `pending` and the block's sum, [B, Cout]: `block_step_gpu` as an operator that can be traced.

    first, most: of a `channels.Fan`, where channels meet.
    """
    return torch.ops.flashinf.block_step(pending, inputs, table, local, source, first, most)


def block_step_traffic(rows: float, extra: int = 0, size: int = 4) -> dict[str, float]:
    """What one channel of one row costs where `rows` rows are summed: bytes, floating-point operations.

    extra: how many of skip, newest input and gate are read too.
    """
    return {"reads": size * (2 * rows + 1 + extra), "writes": size, "flops": 2 * rows + 1 + extra}


def variants() -> Iterator[Variant]:
    """What is offered: the sum of all layers, and one layer's step with skip and gate."""
    for name, channels, maps, fan, whole in (
        ("block_step", 18 * 768, False, False, False),
        ("block_step maps", 18 * 768, True, False, False),
        ("block_step pairs", 18 * 768, True, True, False),
        ("block_step skip gate", 768, False, False, True),
    ):
        names = block_step_kernel.arg_names
        # At the middle of a block.
        cost = block_step_traffic(16, 3 * whole)
        floats = [n for n in names if n.startswith("p_") and n not in ("p_local", "p_source", "p_pairs")]
        integers = ["block", "batch", "channels_in", "channels", "pairs", "most", "s_x_b", "s_gate_b"]
        yield Variant(
            name=f"{name} K=32",
            kernel=block_step_kernel,
            types={
                **dict.fromkeys(floats, "*fp32"),
                **dict.fromkeys(("p_local", "p_source", "p_pairs"), "*i64"),
                **dict.fromkeys(integers, "i32"),
            },
            constants={
                **({} if fan else {"most": 1}),
                "HAS_SOURCE": maps,
                "HAS_FAN": fan,
                "HAS_X": whole,
                "HAS_GATE": whole,
                "DOUBLE": False,
                "BK": FAN_ROWS if fan else ROWS,
                "BC": 128,
            },
            hip={"BC": 256},
            aligned=("channels_in", "channels", "pairs", "s_x_b", "s_gate_b"),
            warps=WARPS,
            work=f"{channels:,} channels",
            reads=channels * cost["reads"],
            writes=channels * cost["writes"],
            flops=channels * cost["flops"],
            # Through a map, a wide load of the table goes with four gathered inputs; that of pairs is gathered too.
            wide=0.0 if fan else 0.15 if maps else 0.75,
        )
