"""A tile for large U on a GPU: one cyclic convolution a channel, its transforms as products on matrix units.

The reference and the CPU form are in `tile`, the mathematics in `monarch`. Sources: FlashFFTConv (arXiv 2311.05908),
section 3; Flash Inference (arXiv 2410.12982), algorithm 2.
"""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import math
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels.gpu import PRECISION, Variant, dot_precision, pointer
from fi_compile.kernels.monarch import LARGE, SPLITS, Split, factors, split_for


@triton.jit
def load_pair(p, o, gap):
    """The real parts at offsets o, and the imaginary parts `gap` further on."""
    return tl.load(p + o), tl.load(p + o + gap)


@triton.jit
def times(ar, ai, br, bi):
    """The complex product (ar + i·ai) · (br + i·bi)."""
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def dot_pair(ar, ai, br, bi, PRECISION: tl.constexpr):
    """The complex matrix product (ar + i·ai) @ (br + i·bi)."""
    re = tl.dot(ar, br, input_precision=PRECISION)
    re = tl.dot(-ai, bi, acc=re, input_precision=PRECISION)
    im = tl.dot(ar, bi, input_precision=PRECISION)
    return re, tl.dot(ai, br, acc=im, input_precision=PRECISION)


@triton.jit
def tile_fft_kernel(
    p_out,
    p_in,
    p_spectrum,
    p_first,
    p_twiddle,
    p_second,
    p_source,
    p_index,
    side,
    length,
    channels,
    s_out_b,
    s_out_t,
    s_in_b,
    s_in_t,
    HAS_SOURCE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program adds the tile's contributions to all outputs of BC channels of one row."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    i_b = tl.program_id(1).to(tl.int64)
    m_c = o_c < channels
    o_in = tl.load(p_source + o_c, mask=m_c, other=0) if HAS_SOURCE else o_c
    o_f = tl.load(p_index + o_c, mask=m_c, other=0) if HAS_INDEX else o_c
    o_h, o_n = tl.arange(0, H), tl.arange(0, N)
    o_t = o_h[:, None] * N + o_n[None, :]

    # x[(c, n2), n1], the inputs at the end of the lower half. All products are tall, and factors stand on their right.
    o_k = o_t - (H * N - side)
    p = p_in + i_b * s_in_b + o_k.to(tl.int64)[:, :, None] * s_in_t + o_in[None, None, :]
    m = (o_k >= 0)[:, :, None] & m_c[None, None, :]
    x = tl.load(p, mask=m, other=0.0).to(tl.float32)
    x = tl.reshape(tl.permute(x, (2, 1, 0)), (BC * N, H))

    fr, fi = load_pair(p_first, o_h[:, None] * H + o_h[None, :], H * H)
    ar = tl.permute(tl.reshape(tl.dot(x, tl.trans(fr), input_precision=PRECISION), (BC, N, H)), (0, 2, 1))
    ai = tl.permute(tl.reshape(tl.dot(x, tl.trans(fi), input_precision=PRECISION), (BC, N, H)), (0, 2, 1))
    tr, ti = load_pair(p_twiddle, o_t[None, :, :], H * N)
    ar, ai = times(ar, ai, tr, ti)
    gr, gi = load_pair(p_second, o_n[:, None] * N + o_n[None, :], N * N)
    ar, ai = tl.reshape(ar, (BC * H, N)), tl.reshape(ai, (BC * H, N))
    ar, ai = dot_pair(ar, ai, gr, gi, PRECISION)

    o_s = o_f.to(tl.int64)[:, None, None] * (2 * H * N) + o_t[None, :, :]
    sr = tl.load(p_spectrum + o_s, mask=m_c[:, None, None], other=0.0)
    si = tl.load(p_spectrum + o_s + H * N, mask=m_c[:, None, None], other=0.0)
    ar, ai = times(tl.reshape(ar, (BC, H, N)), tl.reshape(ai, (BC, H, N)), sr, si)

    ar, ai = tl.reshape(ar, (BC * H, N)), tl.reshape(ai, (BC * H, N))
    ar, ai = dot_pair(ar, ai, gr, -gi, PRECISION)
    ar, ai = times(tl.reshape(ar, (BC, H, N)), tl.reshape(ai, (BC, H, N)), tr, -ti)
    ar = tl.reshape(tl.permute(ar, (0, 2, 1)), (BC * N, H))
    ai = tl.reshape(tl.permute(ai, (0, 2, 1)), (BC * N, H))
    y = tl.dot(ar, fr, input_precision=PRECISION)
    y = tl.dot(ai, fi, acc=y, input_precision=PRECISION)
    y = tl.permute(tl.reshape(y, (BC, N, H)), (2, 1, 0))

    p = p_out + i_b * s_out_b + o_t.to(tl.int64)[:, :, None] * s_out_t + o_c[None, None, :]
    m = (o_t < length)[:, :, None] & m_c[None, None, :]
    before = tl.load(p, mask=m, other=0.0)
    tl.store(p, (before.to(tl.float32) + y).to(before.dtype), mask=m)


def add_tile_fft_gpu(
    outputs: Tensor,
    inputs: Tensor,
    spectrum: Tensor,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
) -> None:
    """Add the tile to `outputs`.

    outputs [B, Cout, V <= U] and inputs [B, Cin, U], of one dtype, float32, float16 or bfloat16 (sums in float32),
    their channels contiguous; spectrum: of `monarch.tile_spectrum_gpu` for this side; source, filter_index: int64
    [Cout] or None (see `channels`). Raises ValueError for what does not fit.
    """
    batch, channels, length = outputs.shape
    side = inputs.shape[-1]
    split = split_for(side)
    if split is None or tuple(spectrum.shape[1:]) != (2, split.h, split.n):
        raise ValueError(f"a spectrum of shape {list(spectrum.shape)} does not serve tiles of {side} inputs")
    if length > side:
        raise ValueError(f"a tile of {side} inputs has at most as many outputs, found {length}")
    for name, tensor in (("outputs", outputs), ("inputs", inputs)):
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"channels of {name} must be contiguous; the strides are {tensor.stride()}")
    if 0 in outputs.shape:
        return
    first, twiddle, second = factors(split.h, split.n, outputs.device)
    tile_fft_kernel[triton.cdiv(channels, split.channels), batch](
        outputs,
        inputs,
        spectrum,
        first,
        twiddle,
        second,
        pointer(source, inputs),
        pointer(filter_index, inputs),
        side,
        length,
        channels,
        outputs.stride(0),
        outputs.stride(2),
        inputs.stride(0),
        inputs.stride(2),
        HAS_SOURCE=source is not None,
        HAS_INDEX=filter_index is not None,
        H=split.h,
        N=split.n,
        BC=split.channels,
        PRECISION=dot_precision(),
        num_warps=split.warps,
    )


def tile_fft_traffic(split: Split) -> dict[str, float]:
    """What one channel of one row costs for the largest side of a split: bytes, floating-point operations.

    A spectrum is read once for all rows of a batch only as far as the cache holds it; it is counted here.
    """
    h, n, side = split.h, split.n, split.length // 2
    products = 8.0 * h * h * n + 16.0 * h * n * n
    return {
        "reads": 4.0 * (side + side + split.length),
        "writes": 4.0 * side,
        "dots": products,
        "flops": products + 18.0 * h * n + side,
    }


def torch_traffic(side: int) -> dict[str, float]:
    """The same for a tile of `side` by torch's transforms, every pass over memory counted.

    Copy the inputs together, transform, multiply by the spectrum, transform back, add the upper half.
    """
    transforms = 2 * 2.5 * 2 * side * math.log2(2 * side)
    return {
        "reads": 4.0 * side * (1 + 1 + 2 + 2 + 2 + 1 + 1),
        "writes": 4.0 * side * (1 + 2 + 2 + 2 + 1),
        "flops": transforms + 6 * (side + 1) + side,
    }


def variants() -> Iterator[Variant]:
    """What is offered: every split, and maps for one."""
    channels = 18 * 768
    for split in SPLITS.values():
        cost = tile_fft_traffic(split)
        side = split.length // 2
        for maps in (False, True) if side == 512 else (False,):
            floats = ("p_out", "p_in", "p_spectrum", "p_first", "p_twiddle", "p_second")
            integers = ("side", "length", "channels", "s_out_b", "s_out_t", "s_in_b", "s_in_t")
            yield Variant(
                name=f"tile_fft U={side}{' maps' if maps else ''}",
                kernel=tile_fft_kernel,
                types={
                    **dict.fromkeys(floats, "*fp32"),
                    **dict.fromkeys(("p_source", "p_index"), "*i64"),
                    **dict.fromkeys(integers, "i32"),
                },
                constants={
                    "HAS_SOURCE": maps,
                    "HAS_INDEX": maps,
                    "H": split.h,
                    "N": split.n,
                    "BC": split.channels,
                    "PRECISION": PRECISION["cuda"],
                },
                hip={"PRECISION": PRECISION["hip"]},
                aligned=integers[2:],
                warps=split.warps,
                work=f"{channels:,} channels",
                reads=channels * cost["reads"],
                writes=channels * cost["writes"],
                flops=channels * cost["flops"],
                by_dot=cost["dots"] / cost["flops"],
                # Twiddles and factors come in narrow pieces where there are fewer of them than threads.
                wide=0.4,
                architectures=("sm_80", *LARGE) if split.narrow else LARGE,
            )
