"""The convolution of a whole sequence by filters without most of their frequencies, except near lag 0.

As in `long_conv_fft` the sequence is cut into blocks of S positions, and block i meets block j = i + d through a window
of 2S lags with a spectrum of its own. At a distance d >= 1 all lags are positive: whatever is dropped of that
spectrum, no output sees the future. So there columns of the H × N spectrum are skipped, the same for all channels:
neither read, nor multiplied, nor transformed to. The own block, whose lags begin at 0, is computed whole, from no
negative lags: the causal projection. Source: FlashFFTConv (arXiv 2311.05908), section 3.3, with causality kept.

What is dropped is not a filter's, since two windows that share a lag drop different parts of it: the result is a
causal linear map near the convolution. `SparseSpectra` says how near.
"""

# What kernels mean by types and loops is Triton's affair.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fi_compile.kernels import long_conv_fft
from fi_compile.kernels.gpu import PRECISION, Variant, dot_precision, pointer, runs_on
from fi_compile.kernels.long_conv import conv_fft
from fi_compile.kernels.long_conv_fft import blocks_met, enter_block, launch, leave_block, spectra_of
from fi_compile.kernels.monarch import Split, block_spectrum, factors, has_room
from fi_compile.kernels.tile_fft import dot_pair, load_pair, times

# On sm_90 and sm_100, and elsewhere. Columns come in sixteens.
SPLITS = {True: Split(32, 32, 4, 8, narrow=False), False: Split(16, 32, 4, 8)}
COLUMNS = 16


@dataclass(frozen=True)
class SparseSpectra:
    """Filters [C, M], prepared: the lags of the own block, and float32 spectra of kept columns at each distance.

    near [C, <= S], far [C, distances, 2, H, kept], columns int64 [kept] ascending; for sequences up to `length`.
    dropped: the share of the energy of a channel's windows at d >= 1 that is left out, [C]. bound: for each channel
    ‖y - k ∗ u‖₂ <= bound · ‖u‖₂ beside rounding, [C], float64.
    """

    near: Tensor
    far: Tensor
    columns: Tensor
    split: Split
    length: int
    dropped: Tensor
    bound: Tensor

    @property
    def side(self) -> int:
        """Positions of a block, S."""
        return self.split.length // 2

    @property
    def reach(self) -> int:
        """The most blocks that an output block meets, its own among them."""
        return 1 + self.far.shape[1]

    def values_read(self, length: int) -> tuple[int, int]:
        """How many values of spectra one channel of one row reads, and how many it would with all columns."""
        blocks = -(-length // self.side)
        far = sum(min(j, self.reach - 1) for j in range(blocks))
        kept = self.columns.numel() / self.split.n
        return round(2 * self.side * (blocks + kept * far)), 2 * self.side * (blocks + far)

    def __str__(self) -> str:
        share = self.columns.numel() / self.split.n
        most = float(self.dropped.max()) if self.dropped.numel() else 0.0
        bound = float(self.bound.max()) if self.bound.numel() else 0.0
        return (
            f"{share:.0%} of the frequencies kept beyond {self.side} lags; of a channel's energy there at most"
            f" {100 * most:.2g} % was dropped, which changes no output by more than {bound:.2g} · ‖u‖₂"
        )


def windows(k: Tensor, length: int, side: int) -> Tensor:
    """The lags that blocks at each distance meet: [C, reach, 2S], window d holds (d - 1)·S ... (d + 1)·S - 1."""
    lags = k[:, :length]
    reach = blocks_met(length, k.shape[-1], side)
    padded = torch.nn.functional.pad(lags, (side, max(0, reach * side - lags.shape[-1])))
    return padded.unfold(-1, 2 * side, side)[:, :reach]


def long_conv_sparse_reference(u: Tensor, k: Tensor, columns: Tensor, split: Split) -> Tensor:
    """The definition in float64: every window without its dropped frequencies, as a matrix, block by block."""
    n, side, h = split.length, split.length // 2, split.h
    batch, channels, length = u.shape
    frequency = torch.arange(n, dtype=torch.float64) + 0.5
    basis = torch.exp(-2j * math.pi / n * frequency[:, None] * torch.arange(n))
    # A frequency is kept with its mirror image, whose row is one of the first H.
    index = torch.arange(n)
    row, column = index % (2 * h), index // (2 * h)
    mirrored = (n - 1 - index) // (2 * h)
    kept = torch.isin(torch.where(row < h, column, mirrored), columns)
    found = windows(k.double(), length, side)
    masked = ((found.to(basis.dtype) @ basis.mT) * kept) @ basis.conj() / n
    filters = torch.cat([found[:, :1], masked.real[:, 1:]], 1)
    s = torch.arange(side)
    toeplitz = filters[:, :, side + s[:, None] - s[None, :]]
    blocks = -(-length // side)
    x = torch.nn.functional.pad(u.double(), (0, blocks * side - length)).unflatten(-1, (blocks, side))
    y = torch.zeros_like(x)
    for d in range(min(filters.shape[1], blocks)):
        y[:, :, d:] += torch.einsum("cst,bcjt->bcjs", toeplitz[:, d], x[:, :, : blocks - d])
    return y.flatten(2)[..., :length].reshape(batch, channels, length)


def sparsify_blocks(
    k: Tensor, length: int, kept: int = COLUMNS, device: torch.device | None = None
) -> SparseSpectra:
    """Prepare filters k [C, M] for sequences up to a length, with `kept` columns, those of most energy.

    Each channel's energy counts alike. Raises ValueError unless `kept` is a multiple of 16, a power of two, and at
    most half of all columns.
    """
    device = device or k.device
    split = SPLITS[has_room(device) and not torch.version.hip]
    if kept not in {COLUMNS << p for p in range(8)} or 2 * kept > split.n:
        raise ValueError(f"expected {COLUMNS}, or twice that and so on up to {split.n // 2}; found {kept}")
    found = windows(k.double(), length, split.length // 2)
    spectra = block_spectrum(found.flatten(0, 1), split).unflatten(0, found.shape[:2])
    energy = spectra[:, 1:].double().square().sum((1, 2, 3))
    share = energy / energy.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    columns = share.sum(0).topk(kept).indices.sort().values
    left = torch.ones(split.n, dtype=torch.bool, device=k.device)
    left[columns] = False
    # The scale of the inverse is in the spectra: see `monarch.tile_spectrum_gpu`.
    size = spectra[:, 1:, :, :, left].double().square().sum(2).sqrt() * (split.length / 2)
    bound = size.flatten(2).amax(-1).sum(1) if size.numel() else energy.new_zeros(k.shape[0])
    return SparseSpectra(
        k[:, : min(length, split.length // 2)].float().contiguous().to(device),
        spectra[:, 1:].index_select(-1, columns).contiguous().to(device),
        columns.to(device),
        split,
        length,
        share[:, left].sum(-1),
        bound,
    )


def long_conv_sparse(
    u: Tensor, spectra: SparseSpectra, pre: Tensor | None = None, post: Tensor | None = None
) -> Tensor:
    """`post ⊙ (k ∗ (pre ⊙ u))`, [B, C, L], without the dropped frequencies: float32, float16 or bfloat16.

    Has no gradients. Raises ValueError where one is wanted, and for shapes that do not fit the filters.
    """
    blocks = -(-u.shape[-1] // spectra.side)
    channels = spectra.near.shape[0]
    if u.ndim != 3 or u.shape[1] != channels or u.shape[-1] > spectra.length:
        raise ValueError(f"expected u [B, {channels}, L <= {spectra.length}], found {list(u.shape)}")
    for name, gate in (("pre", pre), ("post", post)):
        if gate is not None and (gate.shape != u.shape or gate.dtype != u.dtype):
            raise ValueError(f"{name} must have the shape and dtype of u, {list(u.shape)}, {u.dtype}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (u, pre, post)):
        raise ValueError("a convolution with dropped frequencies has no gradients; use long_conv")
    form = _on_gpu if runs_on(u.device) else _by_torch
    return form(u, spectra, pre, post, min(blocks, spectra.reach))


def _by_torch(
    u: Tensor, spectra: SparseSpectra, pre: Tensor | None, post: Tensor | None, reach: int
) -> Tensor:
    split, side, columns = spectra.split, spectra.side, spectra.columns
    n, h = split.length, split.h
    x = (u if pre is None else u * pre).float()
    blocks = -(-u.shape[-1] // side)
    x = torch.nn.functional.pad(x, (0, blocks * side - u.shape[-1])).unflatten(-1, (blocks, side))
    y = conv_fft(x.transpose(1, 2).flatten(0, 1), spectra.near).unflatten(0, (-1, blocks)).transpose(1, 2)
    turn = torch.polar(torch.ones(side), torch.arange(side) * (-math.pi / n)).to(u.device)
    rows = torch.fft.fft(x * turn, n=n).unflatten(-1, (split.n, 2 * h))[..., :h].mT[..., columns]
    far = torch.complex(*spectra.far.unbind(-3))
    product = torch.zeros_like(rows)
    for d in range(1, reach):
        product[:, :, d:] += rows[:, :, : blocks - d] * far[:, d - 1, None]
    whole = product.new_zeros(*product.shape[:-2], 2 * h, split.n)
    whole[..., :h, columns] = product
    late = torch.fft.ifft(whole.mT.flatten(-2), norm="forward")[..., :side]
    y = (y + (late * turn.conj()).real).flatten(-2)[..., : u.shape[-1]]
    return (y if post is None else y * post.float()).to(u.dtype)


@triton.jit
def long_conv_sparse_kernel(
    p_y,
    p_u,
    p_far,
    p_pre,
    p_post,
    p_first,
    p_twiddle,
    p_kept,
    length,
    reach,
    stored,
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
    H: tl.constexpr,
    N: tl.constexpr,
    KEPT: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program adds what earlier blocks contribute to block i_j of BC channels of one row, contiguous in y."""
    i_j, i_c = tl.program_id(0), tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < channels
    o_h, o_n, o_q = tl.arange(0, H), tl.arange(0, N), tl.arange(0, KEPT)
    o_w = o_c.to(tl.int64)
    m_w = m_c[:, None, None]
    # The kept columns of the second factor, [N, KEPT].
    gr, gi = load_pair(p_kept, o_n[:, None] * KEPT + o_q[None, :], N * KEPT)
    far_r = tl.zeros((BC * H, KEPT), tl.float32)
    far_i = tl.zeros((BC * H, KEPT), tl.float32)
    o_s = o_w[:, None, None] * (stored * 2 * H * KEPT) + o_h[None, :, None] * KEPT + o_q[None, None, :]
    for i in range(tl.maximum(i_j - reach + 1, 0), i_j):
        ar, ai = enter_block(
            p_u,
            p_pre,
            p_first,
            p_twiddle,
            i,
            i_b,
            o_w,
            m_c,
            length,
            s_u_b,
            s_u_c,
            s_u_t,
            s_pre_b,
            s_pre_c,
            s_pre_t,
            HAS_PRE,
            H,
            N,
            BC,
            PRECISION,
        )
        ar, ai = dot_pair(ar, ai, gr, gi, PRECISION)
        p = p_far + o_s + (i_j - i - 1) * (2 * H * KEPT)
        sr = tl.reshape(tl.load(p, mask=m_w, other=0.0), (BC * H, KEPT))
        si = tl.reshape(tl.load(p + H * KEPT, mask=m_w, other=0.0), (BC * H, KEPT))
        ar, ai = times(ar, ai, sr, si)
        far_r += ar
        far_i += ai
    far_r, far_i = dot_pair(far_r, far_i, tl.trans(gr), -tl.trans(gi), PRECISION)
    leave_block(
        far_r,
        far_i,
        p_y,
        p_post,
        p_first,
        p_twiddle,
        i_j,
        i_b,
        o_c,
        m_c,
        length,
        s_y_b,
        s_y_t,
        s_post_b,
        s_post_c,
        s_post_t,
        HAS_POST,
        True,
        H,
        N,
        BC,
        PRECISION,
    )


def _on_gpu(u: Tensor, spectra: SparseSpectra, pre: Tensor | None, post: Tensor | None, reach: int) -> Tensor:
    batch, channels, length = u.shape
    split = spectra.split
    # Two launches write it: rounded once, at the end.
    out = u.new_empty(batch, length, channels, dtype=torch.float32).transpose(1, 2)
    if not out.numel():
        return torch.empty_like(u, memory_format=torch.contiguous_format)
    small = long_conv_fft.SPLITS[has_room(u.device)]
    group = 2 * spectra.side // small.length
    launch(out, u, spectra_of(spectra.near, group, small), pre, post, small, group)
    if reach > 1:
        first, twiddle, second = factors(split.h, split.n, u.device)
        strides = [pointer(x, u).stride() for x in (u, pre, post)]
        grid = (triton.cdiv(length, spectra.side), triton.cdiv(channels, split.channels), batch)
        long_conv_sparse_kernel[grid](
            out,
            u,
            spectra.far,
            pointer(pre, u),
            pointer(post, u),
            first,
            twiddle,
            second.index_select(-1, spectra.columns),
            length,
            reach,
            spectra.far.shape[1],
            channels,
            out.stride(0),
            out.stride(2),
            *strides[0],
            *strides[1],
            *strides[2],
            HAS_PRE=pre is not None,
            HAS_POST=post is not None,
            H=split.h,
            N=split.n,
            KEPT=spectra.columns.numel(),
            BC=split.channels,
            PRECISION=dot_precision(),
            num_warps=split.warps,
        )
    return out.to(u.dtype).contiguous()


def variants() -> Iterator[Variant]:
    """What is offered: half of the columns, on large and small GPUs; own blocks take `long_conv`'s kernel."""
    channels, length = 768, 4096
    for room, architectures in ((False, ("sm_80", "gfx942")), (True, ("sm_90", "sm_100"))):
        split = SPLITS[room]
        h, n, side = split.h, split.n, split.length // 2
        blocks = length // side
        met = blocks * (blocks - 1) // 2
        names = long_conv_sparse_kernel.arg_names
        strides = [a for a in names if a.startswith("s_") and not a.endswith("_c")]
        # Both ways: a first product is 4·H²·N, a second one 8·H·N·kept.
        dots = (met + blocks) * (4.0 * h * h * n + 8.0 * h * n * COLUMNS)
        others = 10.0 * side * (met + blocks)
        spectra = 2.0 * side * (blocks - 1) * COLUMNS / n
        yield Variant(
            name=f"long_conv_sparse L={length} S={side}",
            kernel=long_conv_sparse_kernel,
            types={
                **{a: "*fp32" for a in names if a.startswith("p_")},
                **dict.fromkeys(("length", "reach", "stored", "channels", *strides), "i32"),
            },
            constants={
                **{f"s_{a}_c": 1 for a in ("u", "pre", "post")},
                "HAS_PRE": True,
                "HAS_POST": True,
                "H": h,
                "N": n,
                "KEPT": COLUMNS,
                "BC": split.channels,
                "PRECISION": PRECISION["cuda"],
            },
            hip={"PRECISION": PRECISION["hip"]},
            aligned=("channels", *strides),
            warps=split.warps,
            work=f"{channels:,} channels",
            reads=channels * 4.0 * (4 * length + spectra),
            writes=channels * 4.0 * length,
            flops=channels * (dots + others),
            by_dot=dots / (dots + others),
            # Sixteen columns a row are less than a warp wants.
            wide=0.2,
            architectures=architectures,
        )
