"""A tile for the largest U on a GPU: the products of `tile_fft` in three launches, with one more level.

A transform of n = 2·H·N values with N = A·B no longer fits a program. The first launch multiplies by H × H and by the
twiddles, the second transforms each of the H rows by two more products (A and B), multiplies by the spectrum and
transforms back, the third is the first one's mirror image and adds to the outputs. What lies between them is a scratch
for a few channels at a time, small enough for the cache of a large GPU. The reference and the CPU form are in `tile`,
the mathematics in `monarch`. Source: FlashFFTConv (arXiv 2311.05908), section 3.1 (Monarch decompositions of order 3).
"""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels.gpu import PRECISION, Variant, dot_precision, pointer
from fi_compile.kernels.monarch import LARGE, Split, block_spectrum, has_room, outer_factors, unit
from fi_compile.kernels.tile_fft import dot_pair, load_pair, times

# Bytes of scratch: a large GPU's second-level cache holds as much.
SCRATCH = 32 << 20
# Channels and columns of a program of the first and the last launch, rows of one of the second.
CHANNELS, COLUMNS, ROWS = 8, 16, 4
# Filters whose spectra are made at a time: values in float64.
_QUANTUM = 1 << 24


@dataclass(frozen=True)
class Stream:
    """How a transform length factors, n = 2·H·A·B, and the warps of outer and inner launches.

    `narrow`: fits also where products take both operands from registers (see `monarch.Split`).
    """

    h: int
    a: int
    b: int
    outer: int = 4
    inner: int = 4
    narrow: bool = False

    @property
    def n(self) -> int:
        """The values of a row, N = A·B."""
        return self.a * self.b

    @property
    def side(self) -> int:
        """The most inputs, H·N."""
        return self.h * self.n


STREAMS = {
    s.side: s
    for s in (
        Stream(16, 16, 16, narrow=True),
        Stream(32, 16, 16, narrow=True),
        Stream(32, 32, 16, narrow=True),
        Stream(64, 32, 16, outer=8),
        Stream(64, 32, 32, outer=8, inner=8),
    )
}


def stream_for(side: int, device: torch.device) -> Stream | None:
    """What serves tiles of `side` inputs on a device; None where nothing is offered."""
    found = STREAMS.get(1 << (side - 1).bit_length())
    return found if found is not None and (found.narrow or has_room(device)) else None


@lru_cache
def inner_factors(a: int, b: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices and twiddles of a cyclic transform of A·B values: [2, A, A], [2, A, B], [2, B, B]."""
    with torch.inference_mode(False):
        x, y = torch.arange(a, dtype=torch.float64), torch.arange(b, dtype=torch.float64)
        found = (unit(x[:, None] * x / a), unit(x[:, None] * y / (a * b)), unit(y[:, None] * y / b))
        first, twiddle, second = (f.float().to(device).contiguous() for f in found)
    return first, twiddle, second


def tile_spectrum_stream(filters: Tensor, side: int) -> Tensor:
    """The spectra of the lags 0 ... n - 1 of filters [F, T] in the kernels' order: float32 [F, 2, H, A, B].

    Lags beyond T count as zero; scale and signs as in `monarch.tile_spectrum_gpu`. Raises ValueError where nothing
    serves tiles of `side`.
    """
    stream = STREAMS.get(1 << (side - 1).bit_length())
    if stream is None:
        raise ValueError(f"nothing serves tiles of {side} inputs; there are {sorted(STREAMS)}")
    split = Split(stream.h, stream.n, 1, 1)
    out = filters.new_empty(filters.shape[0], 2, stream.h, stream.a, stream.b, dtype=torch.float32)
    width = max(1, _QUANTUM // split.length)
    for start in range(0, filters.shape[0], width):
        made = block_spectrum(filters[start : start + width, : split.length].double(), split)
        # k2 = ka + A·kb.
        out[start : start + width] = made.unflatten(-1, (stream.b, stream.a)).mT
    return out


@triton.jit
def stream_enter_kernel(
    p_work,
    p_in,
    p_first,
    p_twiddle,
    p_source,
    start,
    side,
    width,
    s_in_b,
    s_in_t,
    HAS_SOURCE: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program transforms BN columns of BC channels of one row along n1: scratch [B, width, 2, H, N]."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    i_b = tl.program_id(2).to(tl.int64)
    m_c = o_c < width
    o_in = tl.load(p_source + start + o_c, mask=m_c, other=0) if HAS_SOURCE else start + o_c
    o_h = tl.arange(0, H)
    o_k = o_h[:, None] * N + o_n[None, :] - (H * N - side)
    p = p_in + i_b * s_in_b + o_k.to(tl.int64)[:, :, None] * s_in_t + o_in[None, None, :]
    x = tl.load(p, mask=(o_k >= 0)[:, :, None] & m_c[None, None, :], other=0.0).to(tl.float32)
    x = tl.reshape(tl.permute(x, (2, 1, 0)), (BC * BN, H))
    fr, fi = load_pair(p_first, o_h[:, None] * H + o_h[None, :], H * H)
    ar = tl.reshape(tl.dot(x, tl.trans(fr), input_precision=PRECISION), (BC, BN, H))
    ai = tl.reshape(tl.dot(x, tl.trans(fi), input_precision=PRECISION), (BC, BN, H))
    ar, ai = tl.permute(ar, (0, 2, 1)), tl.permute(ai, (0, 2, 1))
    o_t = o_h[None, :, None] * N + o_n[None, None, :]
    tr, ti = load_pair(p_twiddle, o_t, H * N)
    ar, ai = times(ar, ai, tr, ti)
    p = p_work + (i_b * width + o_c)[:, None, None] * (2 * H * N) + o_t
    tl.store(p, ar, mask=m_c[:, None, None])
    tl.store(p + H * N, ai, mask=m_c[:, None, None])


@triton.jit
def stream_middle_kernel(
    p_work,
    p_spectrum,
    p_first,
    p_twiddle,
    p_second,
    p_index,
    start,
    width,
    HAS_INDEX: tl.constexpr,
    H: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program multiplies BR rows of one channel of one row by the spectrum, in the frequency domain."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    i_c = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    i_f = tl.load(p_index + start + i_c) if HAS_INDEX else (start + i_c).to(tl.int64)
    o_a, o_b = tl.arange(0, A), tl.arange(0, B)
    o_x = o_r[:, None, None] * (A * B) + o_a[None, :, None] * B + o_b[None, None, :]
    p = p_work + (i_b * width + i_c) * (2 * H * A * B) + o_x
    xr, xi = tl.load(p), tl.load(p + H * A * B)
    fr, fi = load_pair(p_first, o_a[:, None] * A + o_a[None, :], A * A)
    gr, gi = load_pair(p_second, o_b[:, None] * B + o_b[None, :], B * B)
    tr, ti = load_pair(p_twiddle, o_a[None, :, None] * B + o_b[None, None, :], A * B)

    xr = tl.reshape(tl.permute(xr, (0, 2, 1)), (BR * B, A))
    xi = tl.reshape(tl.permute(xi, (0, 2, 1)), (BR * B, A))
    xr, xi = dot_pair(xr, xi, fr, fi, PRECISION)
    xr = tl.permute(tl.reshape(xr, (BR, B, A)), (0, 2, 1))
    xi = tl.permute(tl.reshape(xi, (BR, B, A)), (0, 2, 1))
    xr, xi = times(xr, xi, tr, ti)
    xr, xi = dot_pair(tl.reshape(xr, (BR * A, B)), tl.reshape(xi, (BR * A, B)), gr, gi, PRECISION)

    p_s = p_spectrum + i_f * (2 * H * A * B) + o_x
    sr, si = tl.load(p_s), tl.load(p_s + H * A * B)
    xr, xi = times(tl.reshape(xr, (BR, A, B)), tl.reshape(xi, (BR, A, B)), sr, si)

    xr, xi = dot_pair(tl.reshape(xr, (BR * A, B)), tl.reshape(xi, (BR * A, B)), gr, -gi, PRECISION)
    xr, xi = times(tl.reshape(xr, (BR, A, B)), tl.reshape(xi, (BR, A, B)), tr, -ti)
    xr = tl.reshape(tl.permute(xr, (0, 2, 1)), (BR * B, A))
    xi = tl.reshape(tl.permute(xi, (0, 2, 1)), (BR * B, A))
    xr, xi = dot_pair(xr, xi, fr, -fi, PRECISION)
    tl.store(p, tl.permute(tl.reshape(xr, (BR, B, A)), (0, 2, 1)))
    tl.store(p + H * A * B, tl.permute(tl.reshape(xi, (BR, B, A)), (0, 2, 1)))


@triton.jit
def stream_leave_kernel(
    p_out,
    p_work,
    p_first,
    p_twiddle,
    start,
    length,
    width,
    s_out_b,
    s_out_t,
    H: tl.constexpr,
    N: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program transforms BN columns of BC channels of one row back, and adds them to the outputs."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    i_b = tl.program_id(2).to(tl.int64)
    m_c = o_c < width
    o_h = tl.arange(0, H)
    o_k = o_h[None, :, None] * N + o_n[None, None, :]
    p = p_work + (i_b * width + o_c)[:, None, None] * (2 * H * N) + o_k
    ar = tl.load(p, mask=m_c[:, None, None], other=0.0)
    ai = tl.load(p + H * N, mask=m_c[:, None, None], other=0.0)
    tr, ti = load_pair(p_twiddle, o_k, H * N)
    ar, ai = times(ar, ai, tr, -ti)
    ar = tl.reshape(tl.permute(ar, (0, 2, 1)), (BC * BN, H))
    ai = tl.reshape(tl.permute(ai, (0, 2, 1)), (BC * BN, H))
    fr, fi = load_pair(p_first, o_h[:, None] * H + o_h[None, :], H * H)
    y = tl.dot(ar, fr, input_precision=PRECISION)
    y = tl.dot(ai, fi, acc=y, input_precision=PRECISION)
    y = tl.permute(tl.reshape(y, (BC, BN, H)), (2, 1, 0))
    o_t = o_h[:, None] * N + o_n[None, :]
    p = p_out + i_b * s_out_b + o_t.to(tl.int64)[:, :, None] * s_out_t + (start + o_c)[None, None, :]
    m = (o_t < length)[:, :, None] & m_c[None, None, :]
    before = tl.load(p, mask=m, other=0.0)
    tl.store(p, (before.to(tl.float32) + y).to(before.dtype), mask=m)


def channels_at_once(stream: Stream, batch: int) -> int:
    """The channels for which the scratch has room; a tile takes three launches for each so many."""
    return max(CHANNELS, SCRATCH // (8 * stream.side * batch) // CHANNELS * CHANNELS)


def add_tile_stream_gpu(
    outputs: Tensor,
    inputs: Tensor,
    spectrum: Tensor,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
) -> None:
    """Add the tile to `outputs`: operands as of `tile_fft.add_tile_fft_gpu`, with `tile_spectrum_stream`.

    Raises ValueError for what does not fit.
    """
    batch, channels, length = outputs.shape
    side = inputs.shape[-1]
    stream = STREAMS.get(1 << (side - 1).bit_length())
    if stream is None or tuple(spectrum.shape[1:]) != (2, stream.h, stream.a, stream.b):
        raise ValueError(f"a spectrum of shape {list(spectrum.shape)} does not serve tiles of {side} inputs")
    if length > side:
        raise ValueError(f"a tile of {side} inputs has at most as many outputs, found {length}")
    for name, tensor in (("outputs", outputs), ("inputs", inputs)):
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"channels of {name} must be contiguous; the strides are {tensor.stride()}")
    if 0 in outputs.shape:
        return
    h, n = stream.h, stream.n
    outer, twiddle = outer_factors(h, n, outputs.device)
    inner = inner_factors(stream.a, stream.b, outputs.device)
    most = min(channels, channels_at_once(stream, batch))
    work = torch.empty(batch * most * 2 * h * n, dtype=torch.float32, device=outputs.device)
    shape: dict[str, Any] = {"H": h, "N": n, "BC": CHANNELS, "BN": COLUMNS, "PRECISION": dot_precision()}
    for start in range(0, channels, most):
        width = min(most, channels - start)
        grid = (n // COLUMNS, triton.cdiv(width, CHANNELS), batch)
        stream_enter_kernel[grid](
            work,
            inputs,
            outer,
            twiddle,
            pointer(source, inputs),
            start,
            side,
            width,
            inputs.stride(0),
            inputs.stride(2),
            HAS_SOURCE=source is not None,
            **shape,
            num_warps=stream.outer,
        )
        stream_middle_kernel[h // ROWS, width, batch](
            work,
            spectrum,
            *inner,
            pointer(filter_index, inputs),
            start,
            width,
            HAS_INDEX=filter_index is not None,
            H=h,
            A=stream.a,
            B=stream.b,
            BR=ROWS,
            PRECISION=dot_precision(),
            num_warps=stream.inner,
        )
        stream_leave_kernel[grid](
            outputs,
            work,
            outer,
            twiddle,
            start,
            length,
            width,
            outputs.stride(0),
            outputs.stride(2),
            **shape,
            num_warps=stream.outer,
        )


def tile_stream_traffic(stream: Stream) -> dict[str, float]:
    """What one channel of one row costs for the largest side: bytes, floating-point operations.

    The scratch, written twice and read twice, is counted as if it were not cached.
    """
    side = stream.side
    products = side * (8.0 * stream.h + 16.0 * (stream.a + stream.b))
    return {
        "reads": 4.0 * side * (1 + 2 + 2 + 2 + 1),
        "writes": 4.0 * side * (2 + 2 + 1),
        "dots": products,
        "flops": products + side * 31.0,
    }


def variants() -> Iterator[Variant]:
    """What is offered: each launch for each factor, on `channels` channels, as many as the scratch holds or more."""
    for stream in STREAMS.values():
        yield from _launches(stream)


def _launches(stream: Stream) -> Iterator[Variant]:
    h, n, side = stream.h, stream.n, stream.side
    channels = 64
    outer = {"H": h, "N": n, "BC": CHANNELS, "BN": COLUMNS, "PRECISION": PRECISION["cuda"]}
    first, inner = 4.0 * side * h, 16.0 * side * (stream.a + stream.b)
    for kernel, constants, reads, writes, dots, others, warps in (
        (stream_enter_kernel, {"HAS_SOURCE": False, **outer}, 1, 2, first, 6, stream.outer),
        (
            stream_middle_kernel,
            {
                "HAS_INDEX": False,
                "H": h,
                "A": stream.a,
                "B": stream.b,
                "BR": ROWS,
                "PRECISION": PRECISION["cuda"],
            },
            4,
            2,
            inner,
            18,
            stream.inner,
        ),
        (stream_leave_kernel, outer, 3, 1, first, 7, stream.outer),
    ):
        names = [a for a in kernel.arg_names if a not in constants]
        types = {a: "*fp32" if a.startswith("p_") else "i32" for a in names}
        types |= {a: "*i64" for a in names if a in ("p_source", "p_index")}
        flops = dots + others * side
        yield Variant(
            name=f"{kernel.fn.__name__.removesuffix('_kernel')} U={side}",
            kernel=kernel,
            types=types,
            constants=constants,
            hip={"PRECISION": PRECISION["hip"]},
            aligned=tuple(
                a for a in ("start", "side", "width", "s_in_b", "s_in_t", "s_out_b", "s_out_t") if a in names
            ),
            warps=warps,
            work=f"{channels} channels",
            reads=channels * 4.0 * side * reads,
            writes=channels * 4.0 * side * writes,
            flops=channels * flops,
            by_dot=dots / flops,
            # Twiddles and factors come in narrow pieces where there are fewer of them than threads.
            wide=0.3,
            architectures=("sm_80", *LARGE) if stream.narrow else LARGE,
        )
