"""Transforms as matrix products: how a length factors, the factors, and spectra in the order of the kernels.

A convolution of length n = 2·H·N, a power of two, that is *negacyclic*: what wraps around changes its sign, and falls
on the lower half, which is thrown away in any case. The frequencies are then k + 1/2, none its own mirror image, so
that of real data exactly n/2 are enough: the first H of the 2H rows k1 below. This halves the work for every row of
a batch, and spectra with it.

With t = N·n1 + n2 and k = k1 + 2H·k2, and w(x) = exp(-2πi·x), the transform factors (Bailey; Monarch) into

    X[k1, k2] = Σ_n2 w(n2·k2 / N) · w(n2·(k1 + 1/2) / n) · Σ_n1 w(n1·(k1 + 1/2) / 2H) · x[n1, n2]

two matrix products with a twiddle between them, and the inverse into their mirror images. Inputs are placed at the end
of the lower half, n1 < H, and outputs are the upper half: the first and last products are halved once more. Where N is
too large for a product it factors once more, N = A·B: a stream, whose rows of N values are transformed by themselves.
Source: FlashFFTConv (arXiv 2311.05908), section 3, with real data and halves made use of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Filters whose spectra are made at a time: values in float64.
_QUANTUM = 1 << 24
LARGE = ("sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Split:
    """How a transform length factors, n = 2·H·N, and the channels and warps of a program.

    `narrow`: fits also where products take both operands from registers (NVIDIA before sm_90, and sm_120).
    """

    h: int
    n: int
    channels: int
    warps: int
    narrow: bool = True

    @property
    def length(self) -> int:
        """The transform length, 2·H·N."""
        return 2 * self.h * self.n


# 8·H + 16·N operations a value are least where H is about 2·N; no factor may be below 16.
SPLITS = {
    split.length: split
    for split in (
        Split(16, 16, 4, 4),
        Split(32, 16, 4, 4),
        Split(32, 32, 4, 8, narrow=False),
        Split(64, 32, 2, 8, narrow=False),
    )
}


def split_for(side: int) -> Split | None:
    """The split that serves tiles of `side` inputs; None where none is offered."""
    length = max(min(SPLITS), 1 << (2 * side - 1).bit_length())
    return SPLITS.get(length)


def has_room(device: torch.device) -> bool:
    """Whether products take operands from elsewhere than registers: sm_90, sm_100 and AMD; and the interpreter."""
    if device.type != "cuda" or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def largest_side(device: torch.device) -> int:
    """The largest side that is offered on a device: see docs/kernels.md."""
    room = has_room(device)
    return max(s.length for s in SPLITS.values() if room or s.narrow) // 2


def unit(angle: Tensor) -> Tensor:
    """exp(-2πi·angle), of float64 angles, as [2, ...] float64."""
    angle = -2 * math.pi * angle
    return torch.stack([angle.cos(), angle.sin()])


@lru_cache
def outer_factors(h: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first product's matrix and the twiddles, real and imaginary parts: [2, H, H], [2, H, N]."""
    with torch.inference_mode(False):
        rows = torch.arange(h, dtype=torch.float64)[:, None] + 0.5
        first = unit(rows * torch.arange(h) / (2 * h))
        twiddle = unit(rows * torch.arange(n, dtype=torch.float64) / (2 * h * n))
        first, twiddle = (x.float().to(device).contiguous() for x in (first, twiddle))
    return first, twiddle


@lru_cache
def factors(h: int, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All factors, real and imaginary parts: `outer_factors`, and the second product's matrix [2, N, N]."""
    with torch.inference_mode(False):
        columns = torch.arange(n, dtype=torch.float64)
        second = unit(columns[:, None] * columns / n).float().to(device).contiguous()
    return *outer_factors(h, n, device), second


def tile_spectrum_gpu(filters: Tensor, side: int) -> Tensor:
    """The spectra of the lags 0 ... n - 1 of filters [F, T] in the kernel's order: float32 [F, 2, H, N].

    Lags beyond T count as zero. The inverse's scale and the sign of its upper half, i·(-1)^k1, are in them. Raises
    ValueError where no split serves tiles of `side`.
    """
    split = split_for(side)
    if split is None:
        raise ValueError(f"no split serves tiles of {side} inputs; there are {sorted(SPLITS)}")
    return block_spectrum(filters[:, : split.length].double(), split)


def block_spectrum(lags: Tensor, split: Split) -> Tensor:
    """`tile_spectrum_gpu` for a split, computed in the dtype of lags [F, <= n]."""
    length, h, n = split.length, split.h, split.n
    shift = torch.arange(lags.shape[-1], dtype=torch.float64, device=lags.device) * (-math.pi / length)
    turned = torch.polar(lags, shift.to(lags.dtype).expand_as(lags))
    rows = torch.fft.fft(turned, n=length).unflatten(-1, (n, 2 * h))[..., :h].mT
    sign = 1 - 2 * (torch.arange(h, device=lags.device) % 2)
    rows = rows * (2j / length * sign[:, None])
    return torch.stack([rows.real, rows.imag], 1).float().contiguous()


@dataclass(frozen=True)
class Stream:
    """How a transform length factors, n = 2·H·A·B, and the warps of outer and inner launches, and of sums.

    `narrow`: fits also where products take both operands from registers (see `monarch.Split`).
    """

    h: int
    a: int
    b: int
    outer: int = 4
    inner: int = 4
    sums: int = 4
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
        Stream(32, 32, 16, sums=8, narrow=True),
        Stream(64, 32, 16, outer=8),
        Stream(64, 32, 32, outer=8, inner=8, sums=8),
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
