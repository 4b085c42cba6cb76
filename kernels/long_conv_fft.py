"""The convolution of a whole sequence on matrix units, with both gates, in one launch.

The reference, the CPU form and the gradients are in `long_conv`, the transforms in `monarch`. The sequence is cut
into blocks of S = H·N positions. Block i meets block j >= i through the lags (j - i - 1)·S + 1 ... (j - i + 1)·S - 1:
a tile with a filter of its own. A program sums those of one output block in the frequency domain, and transforms back
once. Filters of M lags reach M/S + 1 blocks back, and what lies further is skipped.
"""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels.gpu import PRECISION, Variant, capable, dot_precision, pointer
from fi_compile.kernels.monarch import LARGE, Split, block_spectrum, factors, has_room
from fi_compile.kernels.tile_fft import tile_fft_traffic
from fi_compile.kernels.transforms import dot_pair, enter, leave, load_pair, times

# Where there is room (see `has_room`), and elsewhere. A program transforms every block anew that it meets: only a few.
SPLITS = {True: Split(32, 16, 4, 4, narrow=False), False: Split(16, 16, 4, 4)}
MOST_BLOCKS = 8


@triton.jit
def long_conv_kernel(
    p_y,
    p_u,
    p_spectrum,
    p_pre,
    p_post,
    p_first,
    p_twiddle,
    p_second,
    length,
    reach,
    stored,
    group,
    channels,
    s_y_b,
    s_y_t,
    s_u_b,
    s_u_c,
    s_u_t,
    s_pre_b,
    s_pre_c,
    s_pre_t,
    s_post_b,
    s_post_c,
    s_post_t,
    HAS_PRE: tl.constexpr,
    HAS_POST: tl.constexpr,
    FAR: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program computes block i_j of the outputs of BC channels of one row; y has contiguous channels.

    Blocks meet within their group only, of `group` blocks each, through spectra [C, stored, 2, H, Q] of Q of N columns.
    With FAR a block does not meet itself, its spectrum is not stored, and results are added to y.
    """
    i_j, i_c = tl.program_id(2), tl.program_id(1)
    i_b = tl.program_id(0).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < channels
    o_h, o_n, o_q = tl.arange(0, H), tl.arange(0, N), tl.arange(0, Q)
    o_t = o_h[:, None] * N + o_n[None, :]
    o_w = o_c.to(tl.int64)
    o_s = o_w[:, None, None] * (stored * 2 * H * Q) + o_h[None, :, None] * Q + o_q[None, None, :]
    gr, gi = load_pair(p_second, o_n[:, None] * Q + o_q[None, :], N * Q)
    sum_r = tl.zeros((BC * H, Q), tl.float32)
    sum_i = tl.zeros((BC * H, Q), tl.float32)
    for i in range(tl.maximum(i_j - reach + 1, i_j - i_j % group), i_j + 1 - FAR):
        o_k = (i * (H * N) + o_t).to(tl.int64)
        m = (o_k < length)[:, :, None] & m_c[None, None, :]
        p = p_u + i_b * s_u_b + o_k[:, :, None] * s_u_t + o_w[None, None, :] * s_u_c
        x = tl.load(p, mask=m, other=0.0).to(tl.float32)
        if HAS_PRE:
            p = p_pre + i_b * s_pre_b + o_k[:, :, None] * s_pre_t + o_w[None, None, :] * s_pre_c
            x *= tl.load(p, mask=m, other=0.0).to(tl.float32)
        ar, ai = enter(x, p_first, p_twiddle, o_t, H * N, H, N, BC, PRECISION)
        ar, ai = dot_pair(ar, ai, gr, gi, PRECISION)
        p = p_spectrum + o_s + (i_j - i - FAR) * (2 * H * Q)
        sr = tl.reshape(tl.load(p, mask=m_c[:, None, None], other=0.0), (BC * H, Q))
        si = tl.reshape(tl.load(p + H * Q, mask=m_c[:, None, None], other=0.0), (BC * H, Q))
        ar, ai = times(ar, ai, sr, si)
        sum_r += ar
        sum_i += ai

    # With all columns the second factor is symmetric.
    br, bi = (gr, gi) if Q == N else (tl.trans(gr), tl.trans(gi))
    ar, ai = dot_pair(sum_r, sum_i, br, -bi, PRECISION)
    y = leave(ar, ai, p_first, p_twiddle, o_t, H * N, H, N, BC, PRECISION)
    o_k = (i_j * (H * N) + o_t).to(tl.int64)
    m = (o_k < length)[:, :, None] & m_c[None, None, :]
    if HAS_POST:
        p = p_post + i_b * s_post_b + o_k[:, :, None] * s_post_t + o_w[None, None, :] * s_post_c
        y *= tl.load(p, mask=m, other=0.0).to(tl.float32)
    p = p_y + i_b * s_y_b + o_k[:, :, None] * s_y_t + o_c[None, None, :]
    if FAR:
        y += tl.load(p, mask=m, other=0.0).to(tl.float32)
    tl.store(p, y.to(p_y.dtype.element_ty), mask=m)


def blocks_met(length: int, lags: int, side: int) -> int:
    """The most blocks of `side` positions that an output block meets, its own among them."""
    return min(-(-length // side), -(-(min(lags, length) - 1) // side) + 1)


def offered(u: Tensor, k: Tensor) -> bool:
    """Whether `conv_gpu` serves these operands better than transforms by torch: few blocks, no float64."""
    side = SPLITS[has_room(u.device)].length // 2
    return (
        capable(u.device)
        and u.dtype != torch.float64
        and blocks_met(u.shape[-1], k.shape[-1], side) <= MOST_BLOCKS
    )


def conv_gpu(
    u: Tensor,
    k: Tensor,
    pre: Tensor | None = None,
    post: Tensor | None = None,
    reverse: bool = False,
    precision: str = "float32",
) -> Tensor:
    """`post ⊙ (k ∗ (pre ⊙ u))` of float32, float16 or bfloat16 in any layout; contiguous channels are read fastest.

    With `reverse` the sum is over `(pre · u)[t + d]`: the same launch on sequences read backwards.
    precision: one of `gpu.PRECISIONS`, errors as in `tile_fft`.
    """
    batch, channels, length = u.shape
    split = SPLITS[has_room(u.device)]
    reach = blocks_met(length, k.shape[-1], split.length // 2)
    out = u.new_empty(batch, length, channels).transpose(1, 2)
    if out.numel():
        launch(
            out,
            u,
            spectra_of(k[:, :length], reach, split),
            pre,
            post,
            split,
            reverse=reverse,
            precision=precision,
        )
    return out.contiguous()


def launch(
    out: Tensor,
    u: Tensor,
    spectra: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    split: Split,
    group: int = 1 << 30,
    reverse: bool = False,
    columns: Tensor | None = None,
    precision: str = "float32",
) -> None:
    """Write the convolution with spectra [C, reach, 2, H, N] to `out` [B, C, L], contiguous in channels.

    Blocks of different groups, of `group` blocks each, do not meet. columns: int64 [Q], those of the N that spectra
    [C, reach - 1, 2, H, Q] have, from distance 1 on; what they contribute is added to `out`.
    """
    batch, channels, length = u.shape
    h, n = split.h, split.n
    first, twiddle, second = factors(h, n, u.device)
    far = columns is not None
    operands = [(out, out), (u, u), (pre, u), (post, u)]
    pointers, strides = [], []
    for tensor, instead in operands:
        x = pointer(tensor, instead)
        step = x.stride(2)
        # Triton takes the address of the first position that is read.
        pointers.append(
            torch.as_strided(x, (1,), (1,), x.storage_offset() + (length - 1) * step) if reverse else x
        )
        strides.append((x.stride(0), x.stride(1), -step if reverse else step))
    # Rows first: of the others a grid has 65,535 at most, and where many channels share a filter they are rows.
    grid = (batch, triton.cdiv(channels, split.channels), triton.cdiv(length, h * n))
    long_conv_kernel[grid](
        pointers[0],
        pointers[1],
        spectra,
        *pointers[2:],
        first,
        twiddle,
        second.index_select(-1, columns) if far else second,
        length,
        spectra.shape[1] + far,
        spectra.shape[1],
        group,
        channels,
        strides[0][0],
        strides[0][2],
        *strides[1],
        *strides[2],
        *strides[3],
        HAS_PRE=pre is not None,
        HAS_POST=post is not None,
        FAR=far,
        H=h,
        N=n,
        Q=spectra.shape[-1],
        BC=split.channels,
        PRECISION=dot_precision(precision),
        num_warps=split.warps,
    )


def spectra_of(k: Tensor, reach: int, split: Split) -> Tensor:
    """What a block contributes at each distance: float32 [C, reach, 2, H, N]."""
    side = split.length // 2
    padded = torch.nn.functional.pad(k.float(), (side, max(0, reach * side - k.shape[-1])))
    windows = padded.unfold(-1, 2 * side, side)[:, :reach]
    return block_spectrum(windows.flatten(0, 1), split).unflatten(0, (k.shape[0], reach))


def variants() -> Iterator[Variant]:
    """What is offered: long and short filters, with and without gates, on large and small GPUs."""
    channels, length = 768, 2048
    for room, gates, storage, reach in (
        (False, True, "fp32", 8),
        (True, False, "fp32", 4),
        (True, True, "fp32", 4),
        (True, True, "bf16", 2),
    ):
        split = SPLITS[room]
        side = split.length // 2
        cost = tile_fft_traffic(split)
        blocks = length // side
        met = sum(min(j + 1, reach) for j in range(blocks))
        size = 4 if storage == "fp32" else 2
        floats = [a for a in long_conv_kernel.arg_names if a.startswith("p_")]
        inner = ("p_spectrum", "p_first", "p_twiddle", "p_second")
        strides = [a for a in long_conv_kernel.arg_names if a.startswith("s_") and not a.endswith("_c")]
        integers = ["length", "reach", "stored", "group", "channels", *strides]
        # Half of a tile's products are its way there, half its way back.
        dots = cost["dots"] * (met + blocks) / 2
        yield Variant(
            name=f"long_conv L={length} M={min(length, (reach - 1) * side + 1)} {storage}{' gates' if gates else ''}",
            kernel=long_conv_kernel,
            types={
                **dict.fromkeys(floats, f"*{storage}"),
                **dict.fromkeys(inner, "*fp32"),
                **dict.fromkeys(integers, "i32"),
            },
            constants={
                **{f"s_{a}_c": 1 for a in ("u", "pre", "post")},
                "HAS_PRE": gates,
                "HAS_POST": gates,
                "FAR": False,
                "H": split.h,
                "N": split.n,
                "Q": split.n,
                "BC": split.channels,
                "PRECISION": PRECISION["cuda"],
            },
            hip={"PRECISION": PRECISION["hip"]},
            aligned=("channels", *strides),
            warps=split.warps,
            work=f"{channels:,} channels",
            reads=channels * (size * length * (1 + 2 * gates) + 4.0 * reach * 2 * side),
            writes=channels * size * length,
            flops=channels * (dots + 10.0 * side * (met + blocks)),
            by_dot=dots / (dots + 10.0 * side * (met + blocks)),
            wide=0.4,
            narrow=size == 2,
            architectures=LARGE if room else ("sm_80",),
        )
