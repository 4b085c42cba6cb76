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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels.gpu import PRECISION, Variant, dot_precision, pointer
from fi_compile.kernels.monarch import LARGE, STREAMS, Stream, inner_factors, outer_factors
from fi_compile.kernels.tile_fft import check_operands
from fi_compile.kernels.transforms import add_to_rows, dot_pair, enter, leave, load_pair, load_rows, times

# Bytes of scratch: a large GPU's second-level cache holds as much.
SCRATCH = 32 << 20
# Channels and columns of a program of the first and the last launch, rows of one of the second.
CHANNELS, COLUMNS, ROWS = 8, 16, 4


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
    s_work_b,
    s_in_b,
    s_in_t,
    HAS_SOURCE: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program transforms BN columns of BC channels of one row along n1: work [B, width, 2, H, N]."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    i_b = tl.program_id(2).to(tl.int64)
    m_c = o_c < width
    o_in = tl.load(p_source + start + o_c, mask=m_c, other=0) if HAS_SOURCE else start + o_c
    o_t = tl.arange(0, H)[:, None] * N + o_n[None, :]
    x = load_rows(p_in + i_b * s_in_b, o_t - (H * N - side), o_in, m_c, s_in_t)
    ar, ai = enter(x, p_first, p_twiddle, o_t, H * N, H, BN, BC, PRECISION)
    p = p_work + i_b * s_work_b + o_c.to(tl.int64)[:, None, None] * (2 * H * N) + o_t[None, :, :]
    tl.store(p, tl.reshape(ar, (BC, H, BN)), mask=m_c[:, None, None])
    tl.store(p + H * N, tl.reshape(ai, (BC, H, BN)), mask=m_c[:, None, None])


@triton.jit
def load_inner(p_first, p_twiddle, p_second, A: tl.constexpr, B: tl.constexpr):
    """Both parts of the inner matrices and twiddles: [A, A], [1, A, B], [B, B]."""
    o_a, o_b = tl.arange(0, A), tl.arange(0, B)
    fr, fi = load_pair(p_first, o_a[:, None] * A + o_a[None, :], A * A)
    tr, ti = load_pair(p_twiddle, o_a[None, :, None] * B + o_b[None, None, :], A * B)
    gr, gi = load_pair(p_second, o_b[:, None] * B + o_b[None, :], B * B)
    return fr, fi, tr, ti, gr, gi


@triton.jit
def transform_rows(
    xr,
    xi,
    fr,
    fi,
    tr,
    ti,
    gr,
    gi,
    A: tl.constexpr,
    B: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of A·B values, [BR, A, B], by both inner products and the twiddles between them."""
    xr = tl.reshape(tl.permute(xr, (0, 2, 1)), (BR * B, A))
    xi = tl.reshape(tl.permute(xi, (0, 2, 1)), (BR * B, A))
    xr, xi = dot_pair(xr, xi, fr, fi, PRECISION)
    xr = tl.permute(tl.reshape(xr, (BR, B, A)), (0, 2, 1))
    xi = tl.permute(tl.reshape(xi, (BR, B, A)), (0, 2, 1))
    xr, xi = times(xr, xi, tr, ti)
    xr, xi = dot_pair(tl.reshape(xr, (BR * A, B)), tl.reshape(xi, (BR * A, B)), gr, gi, PRECISION)
    return tl.reshape(xr, (BR, A, B)), tl.reshape(xi, (BR, A, B))


@triton.jit
def transform_rows_back(
    xr,
    xi,
    fr,
    fi,
    tr,
    ti,
    gr,
    gi,
    A: tl.constexpr,
    B: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The mirror image of `transform_rows`."""
    xr, xi = dot_pair(tl.reshape(xr, (BR * A, B)), tl.reshape(xi, (BR * A, B)), gr, -gi, PRECISION)
    xr, xi = times(tl.reshape(xr, (BR, A, B)), tl.reshape(xi, (BR, A, B)), tr, -ti)
    xr = tl.reshape(tl.permute(xr, (0, 2, 1)), (BR * B, A))
    xi = tl.reshape(tl.permute(xi, (0, 2, 1)), (BR * B, A))
    xr, xi = dot_pair(xr, xi, fr, -fi, PRECISION)
    xr = tl.permute(tl.reshape(xr, (BR, B, A)), (0, 2, 1))
    return xr, tl.permute(tl.reshape(xi, (BR, B, A)), (0, 2, 1))


@triton.jit
def stream_middle_kernel(
    p_work,
    p_spectrum,
    p_first,
    p_twiddle,
    p_second,
    p_index,
    start,
    s_work_b,
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
    p = p_work + i_b * s_work_b + i_c.to(tl.int64) * (2 * H * A * B) + o_x
    xr, xi = tl.load(p), tl.load(p + H * A * B)
    fr, fi, tr, ti, gr, gi = load_inner(p_first, p_twiddle, p_second, A, B)
    xr, xi = transform_rows(xr, xi, fr, fi, tr, ti, gr, gi, A, B, BR, PRECISION)
    sr, si = load_pair(p_spectrum + i_f * (2 * H * A * B), o_x, H * A * B)
    xr, xi = times(xr, xi, sr, si)
    xr, xi = transform_rows_back(xr, xi, fr, fi, tr, ti, gr, gi, A, B, BR, PRECISION)
    tl.store(p, xr)
    tl.store(p + H * A * B, xi)


@triton.jit
def stream_leave_kernel(
    p_out,
    p_work,
    p_first,
    p_twiddle,
    start,
    length,
    width,
    s_work_b,
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
    o_t = tl.arange(0, H)[:, None] * N + o_n[None, :]
    p = p_work + i_b * s_work_b + o_c.to(tl.int64)[:, None, None] * (2 * H * N) + o_t[None, :, :]
    ar = tl.reshape(tl.load(p, mask=m_c[:, None, None], other=0.0), (BC * H, BN))
    ai = tl.reshape(tl.load(p + H * N, mask=m_c[:, None, None], other=0.0), (BC * H, BN))
    y = leave(ar, ai, p_first, p_twiddle, o_t, H * N, H, BN, BC, PRECISION)
    add_to_rows(p_out + i_b * s_out_b, y, o_t, start + o_c, m_c, length, s_out_t)


def channels_at_once(stream: Stream, batch: int) -> int:
    """The channels for which the scratch has room; a tile takes three launches for each so many."""
    return max(CHANNELS, SCRATCH // (8 * stream.side * batch) // CHANNELS * CHANNELS)


def add_tile_stream_gpu(
    outputs: Tensor,
    inputs: Tensor,
    spectrum: Tensor,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
    precision: str = "float32",
) -> None:
    """Add the tile to `outputs`: operands as of `tile_fft.add_tile_fft_gpu`, with `tile_spectrum_stream`.

    Raises ValueError for what does not fit.
    """
    batch, channels, _ = outputs.shape
    side = inputs.shape[-1]
    stream = STREAMS.get(1 << (side - 1).bit_length())
    fits = stream is not None and tuple(spectrum.shape[1:]) == (2, stream.h, stream.a, stream.b)
    check_operands(outputs, inputs, side, fits, spectrum)
    if 0 in outputs.shape or stream is None:
        return
    inner = inner_factors(stream.a, stream.b, outputs.device)
    most = min(channels, channels_at_once(stream, batch))
    work = scratch(stream, batch, most, outputs)
    for start in range(0, channels, most):
        width = min(most, channels - start)
        enter_stream(work[:, :width], inputs, stream, source, start, precision)
        stream_middle_kernel[stream.h // ROWS, width, batch](
            work,
            spectrum,
            *inner,
            pointer(filter_index, inputs),
            start,
            work.stride(0),
            HAS_INDEX=filter_index is not None,
            H=stream.h,
            A=stream.a,
            B=stream.b,
            BR=ROWS,
            PRECISION=dot_precision(precision),
            num_warps=stream.inner,
        )
        leave_stream(outputs, work[:, :width], stream, start, precision)


def scratch(stream: Stream, batch: int, width: int, like: Tensor) -> Tensor:
    """Room for what lies between launches, float32 [B, width, 2, H, A, B]."""
    shape = (batch, width, 2, stream.h, stream.a, stream.b)
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def enter_stream(
    work: Tensor,
    inputs: Tensor,
    stream: Stream,
    source: Tensor | None = None,
    start: int = 0,
    precision: str = "float32",
) -> None:
    """The first launch: channels of inputs, or of `source`, from `start` on into work [B, width, ...]."""
    batch, width = work.shape[:2]
    stream_enter_kernel[_outer_grid(stream, width, batch)](
        work,
        inputs,
        *outer_factors(stream.h, stream.n, inputs.device),
        pointer(source, inputs),
        start,
        inputs.shape[-1],
        width,
        work.stride(0),
        inputs.stride(0),
        inputs.stride(2),
        **{"HAS_SOURCE": source is not None, **_outer(stream, precision)},
    )


def leave_stream(
    outputs: Tensor, work: Tensor, stream: Stream, start: int, precision: str = "float32"
) -> None:
    """The last launch: add what is in work [B, width, ...] to the channels of outputs from `start` on."""
    batch, width = work.shape[:2]
    stream_leave_kernel[_outer_grid(stream, width, batch)](
        outputs,
        work,
        *outer_factors(stream.h, stream.n, outputs.device),
        start,
        outputs.shape[-1],
        width,
        work.stride(0),
        outputs.stride(0),
        outputs.stride(2),
        **_outer(stream, precision),
    )


def _outer_grid(stream: Stream, width: int, batch: int) -> tuple[int, int, int]:
    return stream.n // COLUMNS, -(-width // CHANNELS), batch


def _outer(stream: Stream, precision: str) -> dict[str, Any]:
    sizes = {"H": stream.h, "N": stream.n, "BC": CHANNELS, "BN": COLUMNS}
    return {**sizes, "PRECISION": dot_precision(precision), "num_warps": stream.outer}


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
            aligned=tuple(a for a in names if a.startswith("s_") or a in ("start", "side", "width")),
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
