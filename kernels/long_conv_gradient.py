"""The filter's gradient of a convolution of whole sequences, on matrix units, in one launch.

`sum over rows b and t of grad[b, t] · x[b, t - d]` for d < M. The reference and the CPU form are in `long_conv`, the
transforms in `monarch`. Lags are cut into blocks of S = H·N, and x as well: block j of x meets, at the lags of block i,
the 2S values of the gradient from (i + j)·S on. Backwards, x is a tile's input, the gradient a filter: the sum is the
upper half of a negacyclic convolution of length 2S. A program adds those of all blocks and rows in the frequency
domain, and transforms back once. Filters of M lags have M/S blocks of them, and what lies further is not computed.
"""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels.gpu import PRECISION, Variant, capable, dot_precision
from fi_compile.kernels.long_conv_fft import MOST_BLOCKS
from fi_compile.kernels.monarch import Split, factors
from fi_compile.kernels.transforms import dot_pair, enter, leave, load_pair, times

# The largest that spills nowhere: three spectra are at hand at a time.
SPLIT = Split(16, 16, 4, 4)


@triton.jit
def filter_gradient_kernel(
    p_out,
    p_grad,
    p_x,
    p_first,
    p_twiddle,
    p_second,
    batch,
    length,
    lags,
    channels,
    s_out_t,
    s_grad_b,
    s_grad_c,
    s_grad_t,
    s_x_b,
    s_x_c,
    s_x_t,
    H: tl.constexpr,
    N: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program computes block i_d of the lags of BC channels; out [lags, C] has contiguous channels."""
    i_d = tl.program_id(1)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < channels
    o_h, o_n, o_r = tl.arange(0, H), tl.arange(0, N), tl.arange(0, BC * H)
    o_t = o_h[:, None] * N + o_n[None, :]
    o_w = o_c.to(tl.int64)
    gr, gi = load_pair(p_second, o_n[:, None] * N + o_n[None, :], N * N)
    # Rows are k1: what enters in the upper half of a window is -i·(-1)^k1 times what it were in the lower half.
    sign = (1 - 2 * (o_r % 2)).to(tl.float32)[:, None]
    sum_r = tl.zeros((BC * H, N), tl.float32)
    sum_i = tl.zeros((BC * H, N), tl.float32)
    blocks = tl.cdiv(length, H * N) - i_d
    for i in range(batch * blocks):
        i_b, i_j = (i // blocks).to(tl.int64), i % blocks
        o_k = (i_j * (H * N) + H * N - 1 - o_t).to(tl.int64)
        p = p_x + i_b * s_x_b + o_k[:, :, None] * s_x_t + o_w[None, None, :] * s_x_c
        x = tl.load(p, mask=(o_k < length)[:, :, None] & m_c[None, None, :], other=0.0).to(tl.float32)
        ar, ai = enter(x, p_first, p_twiddle, o_t, H * N, H, N, BC, PRECISION)
        ar, ai = dot_pair(ar, ai, gr, gi, PRECISION)

        # One later, so that lag 0 of the block falls on the first of the upper half.
        o_k = ((i_d + i_j) * (H * N) + o_t - 1).to(tl.int64)
        p = p_grad + i_b * s_grad_b + o_k[:, :, None] * s_grad_t + o_w[None, None, :] * s_grad_c
        m = ((o_k >= 0) & (o_k < length))[:, :, None] & m_c[None, None, :]
        wr, wi = enter(
            tl.load(p, mask=m, other=0.0).to(tl.float32), p_first, p_twiddle, o_t, H * N, H, N, BC, PRECISION
        )
        o_k += H * N
        p = p_grad + i_b * s_grad_b + o_k[:, :, None] * s_grad_t + o_w[None, None, :] * s_grad_c
        m = (o_k < length)[:, :, None] & m_c[None, None, :]
        vr, vi = enter(
            tl.load(p, mask=m, other=0.0).to(tl.float32), p_first, p_twiddle, o_t, H * N, H, N, BC, PRECISION
        )
        wr, wi = dot_pair(wr + sign * vi, wi - sign * vr, gr, gi, PRECISION)
        ar, ai = times(ar, ai, wr, wi)
        sum_r += ar
        sum_i += ai

    # The inverse's scale and the sign of its upper half, i·(-1)^k1, which tiles have in their spectra.
    scale = sign / (H * N)
    ar, ai = dot_pair(-sum_i * scale, sum_r * scale, gr, -gi, PRECISION)
    y = leave(ar, ai, p_first, p_twiddle, o_t, H * N, H, N, BC, PRECISION)
    o_d = i_d * (H * N) + o_t
    m = (o_d < lags)[:, :, None] & m_c[None, None, :]
    tl.store(p_out + o_d.to(tl.int64)[:, :, None] * s_out_t + o_c[None, None, :], y, mask=m)


def offered(x: Tensor, lags: int) -> bool:
    """Whether `filter_gradient_gpu` serves these operands better than transforms by torch: few blocks, no float64."""
    blocks = -(-min(lags, x.shape[-1]) // (SPLIT.length // 2))
    return capable(x.device) and x.dtype != torch.float64 and blocks <= MOST_BLOCKS


def filter_gradient_gpu(grad: Tensor, x: Tensor, lags: int, precision: str = "float32") -> Tensor:
    """`long_conv.filter_gradient`, [C, lags], of float32, float16 or bfloat16 in any layout; sums in float32.

    grad, x: [B, C, L]; contiguous channels are read fastest. precision: one of `gpu.PRECISIONS`, errors as in
    `tile_fft`, with the norms of x and of the gradient over all rows.
    """
    batch, channels, length = x.shape
    met = min(lags, length)
    out = x.new_zeros(channels, lags)
    if met and out.numel():
        found = torch.empty(met, channels, dtype=torch.float32, device=x.device)
        # Channels first: of the others a grid has 65,535 at most.
        grid = (triton.cdiv(channels, SPLIT.channels), triton.cdiv(met, SPLIT.length // 2))
        filter_gradient_kernel[grid](
            found,
            grad,
            x,
            *factors(SPLIT.h, SPLIT.n, x.device),
            batch,
            length,
            met,
            channels,
            found.stride(0),
            *grad.stride(),
            *x.stride(),
            H=SPLIT.h,
            N=SPLIT.n,
            BC=SPLIT.channels,
            PRECISION=dot_precision(precision),
            num_warps=SPLIT.warps,
        )
        out[:, :met] = found.t()
    return out


def variants() -> Iterator[Variant]:
    """What is offered: long filters and short ones."""
    batch, channels, length = 4, 768, 2048
    h, n, side = SPLIT.h, SPLIT.n, SPLIT.length // 2
    for storage, lags in (("fp32", 2048), ("bf16", 256)):
        size = 4 if storage == "fp32" else 2
        blocks, far = length // side, lags // side
        met = batch * sum(blocks - i for i in range(far))
        # Three halves enter and two of them are transformed on for each pair of blocks, one leaves a block of lags.
        dots = met * (12.0 * h * h * n + 16.0 * h * n * n) + far * (4.0 * h * h * n + 8.0 * h * n * n)
        others = 29.0 * side * met
        names = filter_gradient_kernel.arg_names
        strides = [a for a in names if a.startswith("s_") and not a.endswith("_c")]
        yield Variant(
            name=f"filter_gradient L={length} M={lags} {storage}",
            kernel=filter_gradient_kernel,
            types={
                **dict.fromkeys(("p_grad", "p_x"), f"*{storage}"),
                **dict.fromkeys(("p_out", "p_first", "p_twiddle", "p_second"), "*fp32"),
                **dict.fromkeys(("batch", "length", "lags", "channels", *strides), "i32"),
            },
            constants={
                "s_grad_c": 1,
                "s_x_c": 1,
                "H": h,
                "N": n,
                "BC": SPLIT.channels,
                "PRECISION": PRECISION["cuda"],
            },
            hip={"PRECISION": PRECISION["hip"]},
            aligned=("channels", *strides),
            warps=SPLIT.warps,
            work=f"{batch} rows of {channels:,} channels",
            reads=channels * size * 2.0 * batch * length,
            writes=channels * 4.0 * lags,
            flops=channels * (dots + others),
            by_dot=dots / (dots + others),
            # As in `tile_fft`; AMD loads the factors a value at a time.
            wide=0.35,
            narrow=size == 2,
        )
