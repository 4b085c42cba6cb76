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
from fi_compile.kernels.transforms import add_to_rows, dot_pair, enter, leave, load_pair, load_rows, times


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

    # The inputs lie at the end of the lower half.
    x = load_rows(p_in + i_b * s_in_b, o_t - (H * N - side), o_in, m_c, s_in_t)
    ar, ai = enter(x, p_first, p_twiddle, o_t, H * N, H, N, BC, PRECISION)
    gr, gi = load_pair(p_second, o_n[:, None] * N + o_n[None, :], N * N)
    ar, ai = dot_pair(ar, ai, gr, gi, PRECISION)

    o_s = o_f.to(tl.int64)[:, None, None] * (2 * H * N) + o_t[None, :, :]
    sr = tl.load(p_spectrum + o_s, mask=m_c[:, None, None], other=0.0)
    si = tl.load(p_spectrum + o_s + H * N, mask=m_c[:, None, None], other=0.0)
    ar, ai = times(tl.reshape(ar, (BC, H, N)), tl.reshape(ai, (BC, H, N)), sr, si)

    ar, ai = dot_pair(tl.reshape(ar, (BC * H, N)), tl.reshape(ai, (BC * H, N)), gr, -gi, PRECISION)
    y = leave(ar, ai, p_first, p_twiddle, o_t, H * N, H, N, BC, PRECISION)
    add_to_rows(p_out + i_b * s_out_b, y, o_t, o_c, m_c, length, s_out_t)


def check_operands(outputs: Tensor, inputs: Tensor, side: int, fits: bool, spectrum: Tensor) -> None:
    """Raise ValueError where channels are not contiguous, or sizes do not fit a tile of `side` inputs."""
    if not fits:
        raise ValueError(f"a spectrum of shape {list(spectrum.shape)} does not serve tiles of {side} inputs")
    if outputs.shape[-1] > side:
        raise ValueError(f"a tile of {side} inputs has at most as many outputs, found {outputs.shape[-1]}")
    for name, tensor in (("outputs", outputs), ("inputs", inputs)):
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"channels of {name} must be contiguous; the strides are {tensor.stride()}")


def add_tile_fft_gpu(
    outputs: Tensor,
    inputs: Tensor,
    spectrum: Tensor,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
    precision: str = "float32",
) -> None:
    """Add the tile to `outputs`.

    outputs [B, Cout, V <= U] and inputs [B, Cin, U], of one dtype, float32, float16 or bfloat16 (sums in float32),
    their channels contiguous; spectrum: of `monarch.tile_spectrum_gpu` for this side; source, filter_index: int64
    [Cout] or None (see `channels`); precision: one of `gpu.PRECISIONS`. Raises ValueError for what does not fit.

    With `r` the rounding of operands, `gpu.ROUNDING`, an output of a lower precision stays within `r·‖u‖₂·‖k‖₁` of its
    channel, and within `r·‖u‖₂·‖k‖₂` for data like noise: four products in a row, whose roundings are near random.
    """
    batch, channels, length = outputs.shape
    side = inputs.shape[-1]
    split = split_for(side)
    fits = split is not None and tuple(spectrum.shape[1:]) == (2, split.h, split.n)
    check_operands(outputs, inputs, side, fits, spectrum)
    if 0 in outputs.shape or split is None:
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
        PRECISION=dot_precision(precision),
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


def torch_traffic(side: int, blocks: float = 1) -> dict[str, float]:
    """The same for a tile of `side` by torch's transforms, every pass over memory counted.

    Copy the inputs together, transform, multiply by the spectrum, transform back, add the upper half. Further blocks
    are products that are added.
    """
    transforms = 2 * 2.5 * 2 * side * math.log2(2 * side)
    return {
        "reads": 4.0 * side * (1 + 1 + 2 + 2 + 2 + 1 + 1 + 6 * (blocks - 1)),
        "writes": 4.0 * side * (1 + 2 + 2 + 2 + 1 + 2 * (blocks - 1)),
        "flops": transforms + (8 * blocks - 2) * (side + 1) + side,
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
