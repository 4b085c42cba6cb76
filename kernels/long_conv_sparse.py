"""The convolution of a whole sequence by filters without most of their frequencies, except near lag 0.

As in `long_conv_fft` the sequence is cut into blocks of S positions, and block i meets block j = i + d through a window
of 2S lags with a spectrum of its own. At a distance d >= 1 all lags are positive: whatever is dropped of that
spectrum, no output sees the future. So there columns of the H × N spectrum are skipped, the same for all channels:
neither read, nor multiplied, nor transformed to. The own block, whose lags begin at 0, is computed whole, from no
negative lags: the causal projection. Source: FlashFFTConv (arXiv 2311.05908), section 3.3, with causality kept.

What is dropped is not a filter's, since two windows that share a lag drop different parts of it: the result is a
causal linear map near the convolution. `SparseSpectra` says how near.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fi_compile.kernels import long_conv_fft
from fi_compile.kernels.gpu import PRECISION, Variant, runs_on
from fi_compile.kernels.long_conv import conv_fft
from fi_compile.kernels.long_conv_fft import blocks_met, launch, long_conv_kernel, spectra_of
from fi_compile.kernels.monarch import Split, block_spectrum, has_room

# On sm_90 and sm_100, and elsewhere. Columns come in sixteens.
SPLITS = {True: Split(32, 32, 4, 8, narrow=False), False: Split(16, 32, 4, 8)}
COLUMNS = 16
# In TF32 the larger split would spill on sm_100.
PRECISIONS = ("float32", "bfloat16")


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
    u: Tensor,
    spectra: SparseSpectra,
    pre: Tensor | None = None,
    post: Tensor | None = None,
    precision: str = "float32",
) -> Tensor:
    """`post ⊙ (k ∗ (pre ⊙ u))`, [B, C, L], without the dropped frequencies: float32, float16 or bfloat16.

    precision: of products on matrix units, one of PRECISIONS. Has no gradients. Raises ValueError where one is
    wanted, for shapes that do not fit the filters, and for a lower precision where there are no matrix units.
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
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    reach = min(blocks, spectra.reach)
    if runs_on(u.device):
        return _on_gpu(u, spectra, pre, post, reach, precision)
    if precision != "float32":
        raise ValueError(
            f"precision {precision!r} is of a GPU's matrix units, found {u.device}: use 'float32'"
        )
    return _by_torch(u, spectra, pre, post, reach)


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


def _on_gpu(
    u: Tensor,
    spectra: SparseSpectra,
    pre: Tensor | None,
    post: Tensor | None,
    reach: int,
    precision: str = "float32",
) -> Tensor:
    batch, channels, length = u.shape
    # Two launches write it: rounded once, at the end.
    out = u.new_empty(batch, length, channels, dtype=torch.float32).transpose(1, 2)
    if not out.numel():
        return torch.empty_like(u, memory_format=torch.contiguous_format)
    small = long_conv_fft.SPLITS[has_room(u.device)]
    group = 2 * spectra.side // small.length
    launch(out, u, spectra_of(spectra.near, group, small), pre, post, small, group, precision=precision)
    if reach > 1:
        launch(out, u, spectra.far, pre, post, spectra.split, columns=spectra.columns, precision=precision)
    return out.to(u.dtype).contiguous()


def variants() -> Iterator[Variant]:
    """What is offered: half of the columns, on large and small GPUs; own blocks take `long_conv`'s kernel."""
    channels, length = 768, 4096
    for room, architectures in ((False, ("sm_80", "gfx942")), (True, ("sm_90", "sm_100"))):
        split = SPLITS[room]
        h, n, side = split.h, split.n, split.length // 2
        blocks = length // side
        met = blocks * (blocks - 1) // 2
        names = long_conv_kernel.arg_names
        strides = [a for a in names if a.startswith("s_") and not a.endswith("_c")]
        # Both ways: a first product is 4·H²·N, a second one 8·H·N·kept.
        dots = (met + blocks) * (4.0 * h * h * n + 8.0 * h * n * COLUMNS)
        others = 10.0 * side * (met + blocks)
        spectra = 2.0 * side * (blocks - 1) * COLUMNS / n
        yield Variant(
            name=f"long_conv_sparse L={length} S={side}",
            kernel=long_conv_kernel,
            types={
                **{a: "*fp32" for a in names if a.startswith("p_")},
                **dict.fromkeys(("length", "reach", "stored", "group", "channels", *strides), "i32"),
            },
            constants={
                **{f"s_{a}_c": 1 for a in ("u", "pre", "post")},
                "HAS_PRE": True,
                "HAS_POST": True,
                "FAR": True,
                "H": h,
                "N": n,
                "Q": COLUMNS,
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
            precisions=PRECISIONS,
            architectures=architectures,
        )
