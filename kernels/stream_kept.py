"""The launches of `tile_kept` for streamed transforms: spectra are made in place, sums leave through a scratch."""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels.channels import Fan
from fi_compile.kernels.gpu import dot_precision, pointer
from fi_compile.kernels.monarch import Stream, inner_factors
from fi_compile.kernels.tile_stream import (
    ROWS,
    channels_at_once,
    enter_stream,
    leave_stream,
    load_inner,
    scratch,
    transform_rows,
    transform_rows_back,
)
from fi_compile.kernels.transforms import load_pair, times


@triton.jit
def stream_keep_kernel(
    p_kept,
    p_first,
    p_twiddle,
    p_second,
    s_kept_b,
    H: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program transforms BR rows of one channel of one row where they lie: kept [B, channels, 2, H, A, B]."""
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    o_a, o_b = tl.arange(0, A), tl.arange(0, B)
    p = p_kept + tl.program_id(2).to(tl.int64) * s_kept_b + tl.program_id(0).to(tl.int64) * (2 * H * A * B)
    p += o_r[:, None, None] * (A * B) + o_a[None, :, None] * B + o_b[None, None, :]
    xr, xi = tl.load(p), tl.load(p + H * A * B)
    fr, fi, tr, ti, gr, gi = load_inner(p_first, p_twiddle, p_second, A, B)
    xr, xi = transform_rows(xr, xi, fr, fi, tr, ti, gr, gi, A, B, BR, PRECISION)
    tl.store(p, xr)
    tl.store(p + H * A * B, xi)


@triton.jit
def stream_meet_kernel(
    p_work,
    p_ring,
    p_spectra,
    p_first,
    p_twiddle,
    p_second,
    p_source,
    p_index,
    p_pairs,
    start,
    oldest,
    count,
    rows,
    s_work_b,
    s_ring,
    s_ring_b,
    s_spectra,
    HAS_SOURCE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_FAN: tl.constexpr,
    H: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program sums BR rows of one channel of one row over `count` blocks, as `meet_kernel` does, into the scratch."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    i_c = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    i_first = (start + i_c).to(tl.int64)
    i_last = i_first + 1
    if HAS_FAN:
        i_last = tl.load(p_pairs + i_last)
        i_first = tl.load(p_pairs + i_first)
    o_a, o_b = tl.arange(0, A), tl.arange(0, B)
    o_x = o_r[:, None, None] * (A * B) + o_a[None, :, None] * B + o_b[None, None, :]
    ar = tl.zeros((BR, A, B), tl.float32)
    ai = tl.zeros((BR, A, B), tl.float32)
    for i_p in range(i_first, i_last):
        i_in = tl.load(p_source + i_p) if HAS_SOURCE else i_p
        i_f = tl.load(p_index + i_p) if HAS_INDEX else i_p
        p_x = p_ring + i_b * s_ring_b + i_in * (2 * H * A * B) + o_x
        p_s = p_spectra + i_f * s_spectra + o_x
        for i in range(count):
            row = ((oldest + i) % rows).to(tl.int64)
            xr, xi = load_pair(p_x + row * s_ring, 0, H * A * B)
            sr, si = load_pair(p_s + (count - 1 - i).to(tl.int64) * (2 * H * A * B), 0, H * A * B)
            xr, xi = times(xr, xi, sr, si)
            ar += xr
            ai += xi
    fr, fi, tr, ti, gr, gi = load_inner(p_first, p_twiddle, p_second, A, B)
    ar, ai = transform_rows_back(ar, ai, fr, fi, tr, ti, gr, gi, A, B, BR, PRECISION)
    p = p_work + i_b * s_work_b + i_c.to(tl.int64) * (2 * H * A * B) + o_x
    tl.store(p, ar)
    tl.store(p + H * A * B, ai)


def rows_kept(stream: Stream) -> int:
    """The rows of a program that transforms them where they lie: with more it would spill at the largest side."""
    return 4 * ROWS // stream.inner


def keep_stream(kept: Tensor, inputs: Tensor, stream: Stream, precision: str) -> None:
    """`tile_kept.keep_spectra_gpu`: the inputs' columns into kept, then its rows there."""
    rows = rows_kept(stream)
    enter_stream(kept, inputs, stream, precision=precision)
    # Channels first: of the others a grid has 65,535 at most.
    stream_keep_kernel[kept.shape[1], stream.h // rows, kept.shape[0]](
        kept,
        *inner_factors(stream.a, stream.b, kept.device),
        kept.stride(0),
        H=stream.h,
        A=stream.a,
        B=stream.b,
        BR=rows,
        PRECISION=dot_precision(precision),
        num_warps=stream.inner,
    )


def add_kept_stream(
    outputs: Tensor,
    ring: Tensor,
    oldest: int,
    count: int,
    spectra: Tensor,
    stream: Stream,
    source: Tensor | None,
    filter_index: Tensor | None,
    fan: Fan | None,
    precision: str,
) -> None:
    """`tile_kept.add_kept_gpu`: two launches for as many channels as the scratch has room for."""
    batch, channels, _ = outputs.shape
    most = min(channels, channels_at_once(stream, batch))
    work = scratch(stream, batch, most, outputs)
    for start in range(0, channels, most):
        width = min(most, channels - start)
        stream_meet_kernel[stream.h // ROWS, width, batch](
            work,
            ring,
            spectra,
            *inner_factors(stream.a, stream.b, outputs.device),
            pointer(source, outputs),
            pointer(filter_index, outputs),
            pointer(None if fan is None else fan.first, outputs),
            start,
            oldest,
            count,
            len(ring),
            work.stride(0),
            ring.stride(0),
            ring.stride(1),
            spectra.stride(0),
            HAS_SOURCE=source is not None,
            HAS_INDEX=filter_index is not None,
            HAS_FAN=fan is not None,
            H=stream.h,
            A=stream.a,
            B=stream.b,
            BR=ROWS,
            PRECISION=dot_precision(precision),
            num_warps=stream.sums,
        )
        leave_stream(outputs, work[:, :width], stream, start, precision)
