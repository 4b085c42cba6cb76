"""A tile of several blocks of inputs on a GPU: spectra are kept, products summed, and transformed back once.

`tile_fft` and `tile_stream` transform one block there and back. Where tiles meet several blocks (radices above 2, and
deferred tiles) each block is transformed once and its spectrum kept, in a ring; a tile sums the products with the
filters' spectra at each distance and transforms the sum back. The reference and the CPU form are in `tile`, the
mathematics in `monarch`. Source: van der Hoeven, *Faster relaxed multiplication*; docs/algorithms.md.
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
from fi_compile.kernels.gpu import PRECISION, Variant, dot_precision, pointer
from fi_compile.kernels.monarch import (
    LARGE,
    SPLITS,
    STREAMS,
    Split,
    Stream,
    factors,
    tile_spectrum_gpu,
    tile_spectrum_stream,
)
from fi_compile.kernels.stream_kept import (
    add_kept_stream,
    keep_stream,
    rows_kept,
    stream_keep_kernel,
    stream_meet_kernel,
)
from fi_compile.kernels.tile_stream import ROWS
from fi_compile.kernels.transforms import (
    add_to_rows,
    dot_pair,
    enter,
    leave,
    load_pair,
    load_rows,
    read_pair,
    times,
)


def split_of(spectra: Tensor) -> Split | Stream:
    """What made spectra [..., 2, H, N] or [..., 2, H, A, B], which a side of H·N inputs at most is served by."""
    if spectra.ndim == 5:
        return SPLITS[2 * spectra.shape[-1] * spectra.shape[-2]]
    h, a, b = spectra.shape[-3:]
    return STREAMS[h * a * b]


def distant_spectra(form: str, filters: Tensor, side: int, distances: range) -> Tensor:
    """The spectra of filters [F, T] for blocks of `side` at each distance: float32 [F, distances, 2, ...].

    form: `matrix` or `stream`. At distance d a block meets the lags (d - 1)·S ... (d + 1)·S - 1; those beyond T count
    as zero. Raises ValueError where the form does not serve the side.
    """
    make = {"matrix": tile_spectrum_gpu, "stream": tile_spectrum_stream}[form]
    return torch.stack([make(filters[:, (d - 1) * side : (d + 1) * side], side) for d in distances], 1)


@triton.jit
def keep_kernel(
    p_kept,
    p_in,
    p_first,
    p_twiddle,
    p_second,
    side,
    channels,
    s_kept_b,
    s_in_b,
    s_in_t,
    H: tl.constexpr,
    N: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program transforms a block of BC channels of one row: kept [B, channels, 2, H, N]."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    i_b = tl.program_id(1).to(tl.int64)
    m_c = o_c < channels
    o_h, o_n = tl.arange(0, H), tl.arange(0, N)
    o_t = o_h[:, None] * N + o_n[None, :]
    x = load_rows(p_in + i_b * s_in_b, o_t - (H * N - side), o_c, m_c, s_in_t)
    ar, ai = enter(x, p_first, p_twiddle, o_t, H * N, H, N, BC, PRECISION)
    gr, gi = load_pair(p_second, o_n[:, None] * N + o_n[None, :], N * N)
    ar, ai = dot_pair(ar, ai, gr, gi, PRECISION)
    p = p_kept + i_b * s_kept_b + o_c.to(tl.int64)[:, None, None] * (2 * H * N) + o_t[None, :, :]
    tl.store(p, tl.reshape(ar, (BC, H, N)), mask=m_c[:, None, None])
    tl.store(p + H * N, tl.reshape(ai, (BC, H, N)), mask=m_c[:, None, None])


@triton.jit
def meet_kernel(
    p_out,
    p_ring,
    p_spectra,
    p_first,
    p_twiddle,
    p_second,
    p_source,
    p_index,
    p_pairs,
    oldest,
    count,
    rows,
    length,
    channels,
    most,
    s_ring,
    s_ring_b,
    s_spectra,
    s_out_b,
    s_out_t,
    HAS_SOURCE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_FAN: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program adds what `count` blocks, from row `oldest` of the ring on, contribute to BC channels of one row."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    i_b = tl.program_id(1).to(tl.int64)
    m_c = o_c < channels
    o_h, o_n = tl.arange(0, H), tl.arange(0, N)
    o_t = o_h[:, None] * N + o_n[None, :]
    ar = tl.zeros((BC, H, N), tl.float32)
    ai = tl.zeros((BC, H, N), tl.float32)
    for i_p in range(0, most):
        o_p, m_p = read_pair(p_pairs, o_c, m_c, i_p, HAS_FAN)
        o_in = tl.load(p_source + o_p, mask=m_p, other=0) if HAS_SOURCE else o_p
        o_f = tl.load(p_index + o_p, mask=m_p, other=0) if HAS_INDEX else o_p
        p_x = p_ring + i_b * s_ring_b + o_in.to(tl.int64)[:, None, None] * (2 * H * N) + o_t[None, :, :]
        p_s = p_spectra + o_f.to(tl.int64)[:, None, None] * s_spectra + o_t[None, :, :]
        m = m_p[:, None, None]
        for i in range(count):
            row = ((oldest + i) % rows).to(tl.int64)
            x, s = p_x + row * s_ring, p_s + (count - 1 - i) * (2 * H * N)
            xr, xi = tl.load(x, mask=m, other=0.0), tl.load(x + H * N, mask=m, other=0.0)
            sr, si = tl.load(s, mask=m, other=0.0), tl.load(s + H * N, mask=m, other=0.0)
            xr, xi = times(xr, xi, sr, si)
            ar += xr
            ai += xi
    gr, gi = load_pair(p_second, o_n[:, None] * N + o_n[None, :], N * N)
    ar, ai = dot_pair(tl.reshape(ar, (BC * H, N)), tl.reshape(ai, (BC * H, N)), gr, -gi, PRECISION)
    y = leave(ar, ai, p_first, p_twiddle, o_t, H * N, H, N, BC, PRECISION)
    add_to_rows(p_out + i_b * s_out_b, y, o_t, o_c, m_c, length, s_out_t)


def keep_spectra_gpu(kept: Tensor, inputs: Tensor, precision: str = "float32") -> None:
    """Write the spectra of a block of inputs [B, C, U] to kept, float32 [B, C, 2, ...], each channel contiguous.

    inputs: float32, float16 or bfloat16, channels contiguous; precision: one of
    `gpu.PRECISIONS`. Raises ValueError for what does not fit.
    """
    batch, channels, side = inputs.shape
    how = split_of(kept)
    _check(inputs, "inputs", how, kept, channels)
    if 0 in inputs.shape:
        return
    if isinstance(how, Stream):
        keep_stream(kept, inputs, how, precision)
        return
    keep_kernel[triton.cdiv(channels, how.channels), batch](
        kept,
        inputs,
        *factors(how.h, how.n, inputs.device),
        side,
        channels,
        kept.stride(0),
        inputs.stride(0),
        inputs.stride(2),
        H=how.h,
        N=how.n,
        BC=how.channels,
        PRECISION=dot_precision(precision),
        num_warps=how.warps,
    )


def add_kept_gpu(
    outputs: Tensor,
    ring: Tensor,
    oldest: int,
    count: int,
    spectra: Tensor,
    source: Tensor | None = None,
    filter_index: Tensor | None = None,
    fan: Fan | None = None,
    precision: str = "float32",
) -> None:
    """Add to `outputs` what `count` blocks contribute, whose spectra lie in rows oldest, oldest + 1 ... of a ring.

    outputs [B, Cout, V <= U], of float32, float16 or bfloat16, channels contiguous; ring: float32 [R, B, Cin, 2, ...],
    as `keep_spectra_gpu` writes it; row R is row 0 again. spectra: [F, D >= count, 2, ...] of `distant_spectra`, the
    newest block's first. source, filter_index: int64 [Cout] or None, of pairs where there is a `fan` (see `channels`).
    precision: one of `gpu.PRECISIONS`, errors as in `tile_fft`. Raises ValueError for what does not fit.
    """
    batch, channels, length = outputs.shape
    how = split_of(spectra)
    _check(outputs, "outputs", how, ring[0], ring.shape[2])
    if ring.shape[3:] != spectra.shape[2:] or not 0 < count <= min(len(ring), spectra.shape[1]):
        raise ValueError(
            f"{count} blocks of spectra {list(ring.shape)} do not fit filters of spectra {list(spectra.shape)}"
        )
    if 0 in outputs.shape:
        return
    if isinstance(how, Stream):
        add_kept_stream(outputs, ring, oldest, count, spectra, how, source, filter_index, fan, precision)
        return
    meet_kernel[triton.cdiv(channels, how.channels), batch](
        outputs,
        ring,
        spectra,
        *factors(how.h, how.n, outputs.device),
        pointer(source, outputs),
        pointer(filter_index, outputs),
        pointer(None if fan is None else fan.first, outputs),
        oldest,
        count,
        len(ring),
        length,
        channels,
        1 if fan is None else fan.most,
        ring.stride(0),
        ring.stride(1),
        spectra.stride(0),
        outputs.stride(0),
        outputs.stride(2),
        HAS_SOURCE=source is not None,
        HAS_INDEX=filter_index is not None,
        HAS_FAN=fan is not None,
        H=how.h,
        N=how.n,
        BC=how.channels,
        PRECISION=dot_precision(precision),
        num_warps=how.warps,
    )


def _check(tensor: Tensor, name: str, how: Split | Stream, kept: Tensor, channels: int) -> None:
    side = how.length // 2 if isinstance(how, Split) else how.side
    if tensor.shape[-1] > side or kept.shape[:2] != (tensor.shape[0], channels):
        raise ValueError(
            f"spectra of shape {list(kept.shape)} do not fit {name} of shape {list(tensor.shape)}"
        )
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"channels of {name} must be contiguous; the strides are {tensor.stride()}")
    if not kept[0, 0].is_contiguous() or (channels > 1 and kept.stride(1) != kept[0, 0].numel()):
        raise ValueError(f"channels of spectra must follow one another; the strides are {kept.stride()}")


def tile_kept_traffic(how: Split | Stream, blocks: float) -> dict[str, float]:
    """What one channel of one row costs for the largest side: bytes and floating-point operations of all launches.

    blocks: how many the tile meets, of which the newest is transformed for it. The scratch of a stream is counted as
    if it were not cached.
    """
    launches = [_keep_traffic(how), _meet_traffic(how, blocks)]
    if isinstance(how, Stream):
        side, dots = how.side, 8.0 * how.side * how.h
        first_and_last = {
            "reads": 16.0 * side,
            "writes": 12.0 * side,
            "dots": dots,
            "flops": dots + 13.0 * side,
        }
        launches.append(first_and_last)
    return {name: sum(cost[name] for cost in launches) for name in launches[0]}


def _keep_traffic(how: Split | Stream) -> dict[str, float]:
    side, dots = _side(how), _products(how)
    reads = 2 if isinstance(how, Stream) else 1
    return {"reads": 4.0 * side * reads, "writes": 8.0 * side, "dots": dots, "flops": dots + 6.0 * side}


def _meet_traffic(how: Split | Stream, blocks: float) -> dict[str, float]:
    side, dots = _side(how), _products(how)
    streamed = isinstance(how, Stream)
    return {
        "reads": 4.0 * side * (4 * blocks + (not streamed)),
        "writes": 4.0 * side * (1 + streamed),
        "dots": dots,
        "flops": dots + side * (8.0 * blocks + 6),
    }


def _side(how: Split | Stream) -> int:
    return how.side if isinstance(how, Stream) else how.length // 2


def _products(how: Split | Stream) -> float:
    """Floating-point operations of the products of matrices one way, of a stream's second launch."""
    return _side(how) * (8.0 * (how.a + how.b) if isinstance(how, Stream) else 4.0 * how.h + 8.0 * how.n)


def variants() -> Iterator[Variant]:
    """What is offered: every split and every stream, with three blocks, maps and pairs for one of each."""
    for how in (*SPLITS.values(), *STREAMS.values()):
        streamed = isinstance(how, Stream)
        channels = 64 if streamed else 18 * 768
        kernels = (stream_keep_kernel, stream_meet_kernel) if streamed else (keep_kernel, meet_kernel)
        sizes = {"A": how.a, "B": how.b, "BR": ROWS} if streamed else {"N": how.n, "BC": how.channels}
        costs = _keep_traffic(how), _meet_traffic(how, 3)
        for kernel, cost in zip(kernels, costs, strict=True):
            several = kernel is kernels[1] and _side(how) in (512, 8192)
            for maps in ("", " maps", " pairs") if several else ("",):
                constants = {"H": how.h, **sizes, "PRECISION": PRECISION["cuda"]}
                if kernel is kernels[1]:
                    fan = maps == " pairs"
                    constants |= {"HAS_SOURCE": bool(maps), "HAS_INDEX": bool(maps), "HAS_FAN": fan}
                    constants |= {} if fan or streamed else {"most": 1}
                elif streamed:
                    constants["BR"] = rows_kept(how)
                names = [a for a in kernel.arg_names if a not in constants]
                warps = (how.sums if kernel is kernels[1] else how.inner) if streamed else how.warps
                types = {a: "*fp32" if a.startswith("p_") else "i32" for a in names}
                types |= {a: "*i64" for a in names if a in ("p_source", "p_index", "p_pairs")}
                # Rings and spectra of all layers are large: their strides need 64 bits.
                types |= {a: "i64" for a in names if a in ("s_ring", "s_ring_b", "s_spectra", "s_kept_b")}
                yield Variant(
                    name=f"{kernel.fn.__name__.removesuffix('_kernel')} U={_side(how)}{maps}",
                    kernel=kernel,
                    types=types,
                    constants=constants,
                    hip={"PRECISION": PRECISION["hip"]},
                    aligned=tuple(a for a in names if a.startswith("s_") or a in ("start", "channels")),
                    warps=warps,
                    work=f"{channels:,} channels",
                    reads=channels * cost["reads"],
                    writes=channels * cost["writes"],
                    flops=channels * cost["flops"],
                    by_dot=cost["dots"] / cost["flops"],
                    # As in `tile_fft`; where inputs are all that is beside the factors, they are one load of seven.
                    wide=0.1 if cost is costs[0] else 0.3,
                    architectures=("sm_80", *LARGE) if how.narrow else LARGE,
                )
