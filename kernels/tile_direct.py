"""A tile for small U on a GPU: sums in registers, all channels of all layers in one launch.

The reference and the CPU form are in `tile`. Channels are contiguous: the lanes of a warp hold neighbouring
channels, so every load is wide, and a thread keeps R outputs of its channels while it walks over the inputs R
at a time. An R × R product needs R inputs and 2R - 1 lags, of which R - 1 are left from the previous one: 2R
loads for R² multiply-adds.
"""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels.channels import Fan
from fi_compile.kernels.gpu import Variant, pointer, warp_size
from fi_compile.kernels.transforms import read_pair

# Outputs a thread holds, groups of them a program has (a warp each), bytes a thread loads at once as float32.
REGISTERS = 8
GROUPS = (1, 2, 4)
LOAD = 16
# The largest side that is worth multiplying out.
LARGEST = 256


@triton.jit
def _load_rows(p_x, o_t, m_t, s_t, o_c, m_c):
    """Rows o_t [G] of channels o_c [BC] from a position-major array: [G, BC], zero where masked."""
    p = p_x + o_t.to(tl.int64)[:, None] * s_t + o_c[None, :]
    return tl.load(p, mask=m_t[:, None] & m_c[None, :], other=0.0)


@triton.jit
def tile_direct_kernel(
    p_out,
    p_in,
    p_lags,
    p_source,
    p_index,
    p_pairs,
    side,
    length,
    lags,
    channels,
    most,
    s_out_b,
    s_out_t,
    s_in_b,
    s_in_t,
    s_lags,
    HAS_SOURCE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_FAN: tl.constexpr,
    DOUBLE: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BC: tl.constexpr,
):
    """A program adds the tile's contributions to outputs i_s·G·R ... of BC channels of one row."""
    i_s, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < channels
    o_s = i_s * (G * R) + tl.arange(0, G) * R
    p_in += i_b.to(tl.int64) * s_in_b
    p_out += i_b.to(tl.int64) * s_out_b
    acc = ()
    for _ in tl.static_range(R):
        acc = acc + (tl.zeros([G, BC], ACC),)
    for i_p in range(0, most):
        o_p, m_p = read_pair(p_pairs, o_c, m_c, i_p, HAS_FAN)
        o_in = tl.load(p_source + o_p, mask=m_p, other=0) if HAS_SOURCE else o_p
        o_f = tl.load(p_index + o_p, mask=m_p, other=0) if HAS_INDEX else o_p
        upper = ()
        for j in tl.static_range(1, R):
            o_l = o_s + side + j
            upper = upper + (_load_rows(p_lags, o_l, o_l < lags, s_lags, o_f, m_p).to(ACC),)
        for k in range(0, side, R):
            # w[R - 1 + d] holds lag side + o_s - k + d.
            w, y, total = (), (), ()
            for j in tl.static_range(R):
                o_l = o_s + (side - k - R + 1 + j)
                w = w + (_load_rows(p_lags, o_l, (o_l > 0) & (o_l < lags), s_lags, o_f, m_p).to(ACC),)
            w = w + upper
            for q in tl.static_range(R):
                o_k = tl.zeros([G], tl.int32) + (k + q)
                y = y + (_load_rows(p_in, o_k, o_k < side, s_in_t, o_in, m_p).to(ACC),)
            for r in tl.static_range(R):
                a = acc[r]
                for q in tl.static_range(R):
                    a += y[q] * w[R - 1 + r - q]
                total = total + (a,)
            acc, upper = total, w[: R - 1]
    for r in tl.static_range(R):
        o_t = o_s + r
        p = p_out + o_t.to(tl.int64)[:, None] * s_out_t + o_c[None, :]
        m = (o_t < length)[:, None] & m_c[None, :]
        before = tl.load(p, mask=m, other=0.0)
        tl.store(p, (before.to(ACC) + acc[r]).to(before.dtype), mask=m)


def channels_for(dtype: torch.dtype, lanes: int) -> int:
    """The channels of a program: what the lanes of a warp load at once, widened to the dtype of the sums."""
    return lanes * LOAD // max(4, dtype.itemsize)


def lag_table(filters: Tensor, side: int) -> Tensor:
    """The lags 0 ... 2·side - 1 of filters [F, T] position-major, [min(2·side, T), F] contiguous."""
    return filters[:, : 2 * side].t().contiguous()


def add_tile_direct_gpu(
    outputs: Tensor,
    inputs: Tensor,
    lags: Tensor,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
    fan: Fan | None = None,
) -> None:
    """Add the tile to `outputs`.

    outputs [B, Cout, V], inputs [B, Cin, U] and lags [T, F], T >= U + V (see `lag_table`), of one dtype: float32
    or float64 (sums in it), float16 or bfloat16 (sums in float32); their channels are contiguous, other strides
    are free. source, filter_index: int64 [Cout] or None, of pairs where there is a `fan` (see `channels`). Raises
    ValueError for channels that are not contiguous, and for too few lags.
    """
    batch, channels, length = outputs.shape
    side = inputs.shape[-1]
    if lags.shape[0] < side + length:
        raise ValueError(
            f"a tile of {side} inputs and {length} outputs reads {side + length} lags, found {lags.shape[0]}"
        )
    for name, tensor, dim in (("outputs", outputs, 1), ("inputs", inputs, 1), ("lags", lags, 1)):
        if tensor.shape[dim] > 1 and tensor.stride(dim) != 1:
            raise ValueError(f"channels of {name} must be contiguous; the strides are {tensor.stride()}")
    if 0 in outputs.shape or side == 0:
        return
    groups = next((g for g in GROUPS if g * REGISTERS >= length), GROUPS[-1])
    width = channels_for(outputs.dtype, warp_size())
    grid = (triton.cdiv(length, groups * REGISTERS), triton.cdiv(channels, width), batch)
    tile_direct_kernel[grid](
        outputs,
        inputs,
        lags,
        pointer(source, inputs),
        pointer(filter_index, inputs),
        pointer(None if fan is None else fan.first, inputs),
        side,
        length,
        lags.shape[0],
        channels,
        1 if fan is None else fan.most,
        outputs.stride(0),
        outputs.stride(2),
        inputs.stride(0),
        inputs.stride(2),
        lags.stride(0),
        HAS_SOURCE=source is not None,
        HAS_INDEX=filter_index is not None,
        HAS_FAN=fan is not None,
        DOUBLE=outputs.dtype == torch.float64,
        R=REGISTERS,
        G=groups,
        BC=width,
        num_warps=groups,
    )


def tile_direct_traffic(side: int, length: int, size: int = 4) -> dict[str, float]:
    """What one channel of one row costs: bytes read and written in memory, floating-point operations.

    Inputs, lags and outputs are counted once: programs of one channel block meet in the cache. `cached` counts
    what all of them load from there.
    """
    programs = -(-length // (REGISTERS * GROUPS[-1]))
    return {
        "reads": size * (side + (side + length) + length),
        "writes": size * length,
        "cached": size * (programs * side * (1 + GROUPS[-1]) + length),
        "flops": 2.0 * side * length,
    }


def variants() -> Iterator[Variant]:
    """What is offered: the storage types, channel maps, pairs, for full programs and the smallest."""
    channels = 18 * 768
    for dtype, how, groups, side in (
        (torch.float32, "", 1, 8),
        (torch.float32, "", 4, 32),
        (torch.float32, "", 4, 256),
        (torch.float32, " maps", 4, 256),
        (torch.float32, " pairs", 4, 256),
        (torch.bfloat16, "", 4, 256),
        (torch.float16, "", 4, 256),
        (torch.float64, "", 4, 256),
    ):
        maps, pairs = bool(how), how == " pairs"
        storage = {torch.bfloat16: "bf16"}.get(dtype, f"fp{8 * dtype.itemsize}")
        cost = tile_direct_traffic(side, side, dtype.itemsize)
        pointers = dict.fromkeys(("p_out", "p_in", "p_lags"), f"*{storage}")
        strides = [a for a in tile_direct_kernel.arg_names if a.startswith("s_")]
        integers = ["side", "length", "lags", "channels", "most", *strides]
        yield Variant(
            name=f"tile_direct U={side} {storage}{how}",
            kernel=tile_direct_kernel,
            types={
                **pointers,
                **dict.fromkeys(("p_source", "p_index", "p_pairs"), "*i64"),
                **dict.fromkeys(integers, "i32"),
            },
            constants={
                **({} if pairs else {"most": 1}),
                "HAS_SOURCE": maps,
                "HAS_INDEX": maps,
                "HAS_FAN": pairs,
                "DOUBLE": dtype == torch.float64,
                "R": REGISTERS,
                "G": groups,
                "BC": channels_for(dtype, 32),
            },
            hip={"BC": channels_for(dtype, 64)},
            aligned=("channels", *strides),
            warps=groups,
            work=f"{channels:,} channels",
            reads=channels * cost["reads"],
            writes=channels * cost["writes"],
            flops=channels * cost["flops"],
            # Through maps, inputs and lags are gathered one by one.
            wide=0.0 if maps else 1.0,
            narrow=dtype.itemsize == 2,
            double=dtype == torch.float64,
        )
