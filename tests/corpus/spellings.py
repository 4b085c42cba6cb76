"""Spellings of a causal long convolution.

Factories `(width, l_max) -> mixer`, `[B, L, D] -> [B, L, D]` for L <= l_max; `width` is even. Filter values
live in parameters or buffers whose path says "filter", so that a test can break them.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fft import irfft, rfft

from . import convolutions as C
from .filters import FILTERS, ComplexModes, Finite, Implicit, Plain, RealModes, Whole
from .weights import param

Factory = Callable[[int, int], nn.Module]


class Conv(nn.Module):
    """One filter per channel, any spelling of the filter with any spelling of the convolution."""

    def __init__(self, filter: nn.Module, convolve: C.Convolve = C.scale_on_filter):
        super().__init__()
        self.filter, self.convolve = filter, convolve

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x.transpose(1, 2), self.filter(x.shape[1])).transpose(1, 2)


class Skip(Conv):
    """`y + u * D`, the classic ending, with a bias on top."""

    def __init__(self, width: int, l_max: int):
        super().__init__(Implicit(width, l_max))
        self.skip, self.bias = param(width), param(width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x * self.skip + self.bias


class SpectrumBuffer(nn.Module):
    """The spectrum over a fixed transform length, precomputed, in a complex128 buffer (cast on use)."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.n = 2 * l_max
        taps = torch.randn(width, l_max, dtype=torch.float64) / math.sqrt(l_max)
        self.register_buffer("filter_spectrum", rfft(taps, n=self.n))

    def forward(self, x: Tensor) -> Tensor:
        u_f = rfft(x.mT, n=self.n)
        return irfft(u_f * self.filter_spectrum.to(u_f.dtype), n=self.n)[..., : x.shape[1]].mT


class FilterPerHead(nn.Module):
    """Channels in heads, one filter a head: the filter broadcasts over the head's channels."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.filter = Plain(width // 2, l_max)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        u = x.view(batch, length, width // 2, 2).permute(0, 2, 3, 1)
        k_f = rfft(self.filter(length), n=2 * length).unsqueeze(1)
        y = irfft(rfft(u, n=2 * length) * k_f, n=2 * length)[..., :length]
        return y.permute(0, 3, 1, 2).reshape(batch, length, width)


class OuterProductHeads(nn.Module):
    """H3 and multi-head Hyena: the outer product of keys and values, `[B, 2, 2, H, L]`, is convolved."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.filter = RealModes(width // 2, l_max)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.project(x).view(batch, length, 3, width // 2, 2)
        q, k, v = heads.permute(2, 0, 4, 3, 1)
        outer = k.unsqueeze(2) * v.unsqueeze(1)
        n = 2 * length
        product = rfft(outer, n=n) * rfft(self.filter(length), n=n)
        y = irfft(product, n=n)[..., :length]
        out = (q.unsqueeze(2) * y).sum(1)
        return out.permute(0, 3, 2, 1).reshape(batch, length, width)


class FilterBank(nn.Module):
    """Every channel through four filters, then mixed: one input, many outputs."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.filter, self.mix = Plain(4, l_max), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length = 2 * x.shape[1], x.shape[1]
        u_f, k_f = rfft(x, n=n, dim=1), rfft(self.filter(length).T, n=n, dim=0)
        y = irfft(u_f.unsqueeze(-1) * k_f.unsqueeze(-2), n=n, dim=1)[:, :length]
        return self.mix(y.flatten(2))


class DenseConv(nn.Module):
    """conv1d without groups, or with few: filters between channels."""

    def __init__(self, width: int, l_max: int, taps: int, groups: int = 1):
        super().__init__()
        self.filter, self.groups = param(width, width // groups, taps), groups

    def forward(self, x: Tensor) -> Tensor:
        u = F.pad(x.mT, (self.filter.shape[-1] - 1, 0))
        return F.conv1d(u, self.filter, groups=self.groups).mT


class RepeatedWeights(nn.Module):
    """Grouped filters repeated to one per channel before a depthwise conv1d."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.filter = Plain(2, l_max)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        k = self.filter(x.shape[1]).repeat_interleave(width // 2, dim=0)
        return C.conv1d_pad_flip(x.mT, k).mT


class ShortConv(nn.Module):
    """Depthwise conv1d of a fixed width, padding on both sides, cut; or the same by FFT."""

    def __init__(self, width: int, l_max: int, taps: int, dilation: int = 1):
        super().__init__()
        pad = (taps - 1) * dilation
        self.filter = nn.Conv1d(width, width, taps, groups=width, padding=pad, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.filter(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Series(nn.Module):
    """Two long convolutions in series, with nothing between them or with a gate."""

    def __init__(self, width: int, l_max: int, gated: bool):
        super().__init__()
        self.filter_1, self.filter_2 = Plain(width, l_max), ComplexModes(width, l_max)
        self.gate = nn.Linear(width, width) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        u = C.scale_on_filter(x.mT, self.filter_1(x.shape[1]))
        if self.gate is not None:
            u = u * self.gate(x).mT
        return C.scale_on_input(u, self.filter_2(x.shape[1])).mT


class Gated(nn.Module):
    """`q * conv(k * v)`."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.project, self.filter = nn.Linear(width, 3 * width), Implicit(width, l_max)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return q * C.scale_on_filter((k * v).mT, self.filter(x.shape[1])).mT


class Hyena(nn.Module):
    """The Hyena operator: projection, short convolution, then gate and convolve `order - 1` times."""

    def __init__(self, width: int, l_max: int, order: int):
        super().__init__()
        self.width, self.order, self.l_max = width, order, l_max
        inner = (order + 1) * width
        self.project, self.out = nn.Linear(width, inner), nn.Linear(width, width)
        self.short = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.filter = Implicit((order - 1) * width, l_max)
        self.bias = param(order - 1, width)

    def forward(self, x: Tensor) -> Tensor:
        length = torch.sym_min(x.shape[1], self.l_max)
        u = self.short(self.project(x).transpose(1, 2))[..., :length]
        *gates, v = u.split(self.width, dim=1)
        k = self.filter(length).view(self.order - 1, self.width, -1)
        for o, gate in enumerate(reversed(gates[1:])):
            v = v * gate
            v = C.scale_on_filter(v, k[o]) + v * self.bias[o].unsqueeze(-1)
        return self.out((v * gates[0]).transpose(1, 2))


class DynamicLength(Conv):
    """A Conv over a plain parameter whose transform length comes from Python that no tracer follows."""

    def __init__(self, width: int, l_max: int, n_of: Callable[[int], int]):
        super().__init__(Plain(width, l_max), C.by_length(lambda length, taps: n_of(length)))


def next_fast_length(m: int) -> int:
    """The least 5-smooth number >= m."""
    while True:
        rest = m
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return m
        m += 1


def conv(convolve: C.Convolve) -> Factory:
    return lambda width, l_max: Conv(Plain(width, l_max), convolve)


def finite(convolve: C.Convolve) -> Factory:
    return lambda width, l_max: Conv(Finite(width, min(24, l_max)), convolve)


def filtered(filter: Callable[[int, int], nn.Module]) -> Factory:
    return lambda width, l_max: Conv(filter(width, l_max))


def fixed_length(width: int, l_max: int) -> nn.Module:
    return Conv(Plain(width, l_max), C.by_length(lambda length, taps: 2 * l_max))


SPELLINGS: dict[str, Factory] = {
    **{f"fft_{name}": conv(f) for name, f in C.FFT.items()},
    **{f"direct_{name}": conv(f) for name, f in C.DIRECT.items()},
    **{f"filter_{name}": filtered(f) for name, f in FILTERS.items()},
    "fft_n_fixed": fixed_length,
    "finite_fft": finite(C.scale_on_filter),
    "finite_fft_tight": finite(C.FFT["n_taps_plus_length_minus_1"]),
    "finite_fft_whole": lambda width, l_max: Conv(Whole(width, min(24, l_max)), C.FFT["n_taps_plus_length"]),
    "finite_conv1d": finite(C.conv1d_pad_flip),
    **{f"short_conv1d_{n}": partial(ShortConv, taps=n) for n in (3, 4, 7, 128)},
    "short_conv1d_dilated": partial(ShortConv, taps=5, dilation=3),
    **{f"short_fft_{n}": lambda width, l_max, n=n: Conv(Finite(width, n)) for n in (3, 7, 32, 128)},
    "dense_conv1d": partial(DenseConv, taps=9),
    "grouped_conv1d": partial(DenseConv, taps=6, groups=2),
    "conv1d_fixed_width_l_max": lambda width, l_max: DenseConv(width, l_max, l_max, width),
    "conv1d_repeated_weights": RepeatedWeights,
    "n_bit_length": partial(DynamicLength, n_of=lambda length: 1 << (2 * length - 1).bit_length()),
    "n_log2": partial(DynamicLength, n_of=lambda length: 2 ** math.ceil(math.log2(2 * length))),
    "spectrum_buffer": SpectrumBuffer,
    "skip_and_bias": Skip,
    "filter_per_head": FilterPerHead,
    "outer_product_heads": OuterProductHeads,
    "filter_bank": FilterBank,
    "series": partial(Series, gated=False),
    "series_gated": partial(Series, gated=True),
    "gated": Gated,
    "hyena_2": partial(Hyena, order=2),
    "hyena_3": partial(Hyena, order=3),
}

UNTRACEABLE: dict[str, tuple[Factory, str]] = {
    "n_digits": (
        partial(DynamicLength, n_of=lambda length: 2 ** len(bin(2 * length - 1)[2:])),
        "bin() needs a number",
    ),
    "direct_windows_by_unfold": (conv(C.windows_by_unfold), "unfold specialises its size"),
    "n_fast_length": (
        partial(DynamicLength, n_of=lambda length: next_fast_length(2 * length)),
        "a data-dependent loop leaves guards that admit few lengths",
    ),
}
