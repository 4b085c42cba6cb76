"""Convolutions that are not causal, or differ by length: functions (u `[B, D, L]`, k `[D, l_max]`)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fft import irfft, rfft

from . import convolutions as C
from .attention import lags

SEES, DEPENDS = "sees the future", "depends on the length"


def convolve_by(n_of: Callable[[int], int], start: int = 0) -> C.Convolve:
    """Cut the filter to L taps, transform length n_of(L), take the window from `start`."""

    def convolve(u: Tensor, k: Tensor) -> Tensor:
        length = u.shape[-1]
        n = n_of(length)
        y = irfft(rfft(u, n=n) * rfft(k[:, :length], n=n), n=n)
        return F.pad(y, (0, start))[..., start : start + length]

    return convolve


def kernel_by(make: Callable[[Tensor, int], Tensor]) -> C.Convolve:
    """A sound convolution with a filter made from all taps `[D, l_max]` and the length."""
    return lambda u, k: C.scale_on_filter(u, make(k, u.shape[-1]))


def wrapping(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n) * rfft(k, n=n), n=n)[..., : u.shape[-1]]


def twice_as_long(u: Tensor, k: Tensor) -> Tensor:
    return wrapping(u, k[:, : 2 * u.shape[-1]])


def bidirectional(u: Tensor, k: Tensor) -> Tensor:
    length = u.shape[-1]
    forward, backward = k[:, :length], k[:, :length].flip(-1)
    both = F.pad(forward, (0, length)) + F.pad(backward, (length, 0))
    return irfft(rfft(u, n=2 * length) * rfft(both), n=2 * length)[..., :length]


def correlation(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n) * rfft(k[:, : u.shape[-1]], n=n).conj(), n=n)[..., : u.shape[-1]]


def reversed_in_time(u: Tensor, k: Tensor) -> Tensor:
    return C.scale_on_filter(u.flip(-1), k[:, : u.shape[-1]]).flip(-1)


def rolled(u: Tensor, k: Tensor) -> Tensor:
    return C.scale_on_filter(u, k[:, : u.shape[-1]]).roll(1, -1)


def same_padding(u: Tensor, k: Tensor) -> Tensor:
    return F.conv1d(u, k[:, None, :7], padding=3, groups=u.shape[1])


def unflipped_conv1d(u: Tensor, k: Tensor) -> Tensor:
    length = u.shape[-1]
    w = k[:, None, :length]
    return F.conv1d(F.pad(u, (length - 1, 0)), w, groups=u.shape[1])


def unflipped_toeplitz(u: Tensor, k: Tensor) -> Tensor:
    """The filter is read backwards: k[L-1-lag]."""
    return C.toeplitz_where(u, k[:, : u.shape[-1]].flip(-1))


def full_toeplitz(u: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bcj,cij->bci", u, k[:, lags(u, u.shape[-1]).abs()])


def dropped_nyquist(u: Tensor, k: Tensor) -> Tensor:
    """The last bin of the half spectrum is lost: a cosine over the whole window leaks."""
    n = 2 * u.shape[-1]
    product = rfft(u, n=n) * rfft(k[:, : u.shape[-1]], n=n)
    return irfft(product[..., : n // 2], n=n)[..., : u.shape[-1]]


def low_pass(u: Tensor, k: Tensor) -> Tensor:
    """Global filter layers that keep only low frequencies."""
    product = rfft(u, n=2 * u.shape[-1])
    keep = torch.arange(product.shape[-1], device=u.device) < 6
    return irfft(product * keep, n=2 * u.shape[-1])[..., : u.shape[-1]]


def position_fraction(k: Tensor, length: int) -> Tensor:
    return k[:, :length] * torch.exp(-torch.linspace(0, 1, length, dtype=k.dtype))


def arange_over_length(k: Tensor, length: int) -> Tensor:
    return k[:, :length] * torch.exp(-torch.arange(length, dtype=k.dtype) / length)


def interpolated(k: Tensor, length: int) -> Tensor:
    """A short kernel stretched to the current length."""
    return F.interpolate(k[None, :, :8], size=length, mode="linear", align_corners=True)[0] / 4


FILTER_TRAPS: dict[str, tuple[Callable, str]] = {
    "n_L": (convolve_by(lambda s: s), f"{SEES}: n = L is a circular convolution"),
    "n_short_by_one": (convolve_by(lambda s: 2 * s - 2 + (s == 1)), f"{SEES}: n = 2L - 2 wraps a tap"),
    "n_three_halves": (convolve_by(lambda s: s + s // 2), f"{SEES}: n = 3L/2 wraps"),
    "n_fixed_too_small": (convolve_by(lambda s: 140), f"{SEES}: a fixed n wraps beyond n/2"),
    "window_late": (convolve_by(lambda s: 2 * s, start=1), f"{SEES}: the slice starts at 1"),
    "window_later": (
        convolve_by(lambda s: 2 * s, start=4),
        f"{SEES}: the slice starts at 4",
    ),
    "kernel_l_max": (wrapping, f"{SEES}: l_max taps under n = 2L wrap"),
    "kernel_2L": (twice_as_long, f"{SEES}: 2L taps under n = 2L wrap"),
    "bidirectional": (bidirectional, f"{SEES}: the second half of the kernel looks ahead"),
    "correlation": (correlation, f"{SEES}: conj correlates"),
    "reversed_in_time": (reversed_in_time, f"{SEES}: runs from the end"),
    "rolled": (rolled, f"{SEES}: roll brings the last output to the front"),
    "same_padding": (same_padding, f"{SEES}: padding on both sides"),
    "full_toeplitz": (full_toeplitz, f"{SEES}: the matrix has an upper triangle"),
    "dropped_nyquist": (dropped_nyquist, f"{SEES}: a bin is missing"),
    "low_pass": (low_pass, f"{SEES}: an ideal low pass has two sides"),
    "unflipped_conv1d": (unflipped_conv1d, f"{DEPENDS}: conv1d's weight, unflipped, width L"),
    "unflipped_toeplitz": (unflipped_toeplitz, f"{DEPENDS}: the filter is read from its end"),
    "filter_reversed": (
        kernel_by(lambda k, s: k[:, :s].flip(-1)),
        f"{DEPENDS}: filter reversed and not undone",
    ),
    "filter_from_end": (
        kernel_by(lambda k, s: k[:, -s:]),
        f"{DEPENDS}: the last L taps of the table",
    ),
    "filter_normalised": (
        kernel_by(lambda k, s: k[:, :s] / k[:, :s].abs().sum(-1, keepdim=True)),
        f"{DEPENDS}: normalised over the current length",
    ),
    "filter_centred": (
        kernel_by(lambda k, s: k[:, :s] - k[:, :s].mean(-1, keepdim=True)),
        f"{DEPENDS}: centred over the current length",
    ),
    "filter_softmax": (
        kernel_by(lambda k, s: k[:, :s].softmax(-1)),
        f"{DEPENDS}: softmax over the current length",
    ),
    "filter_linspace": (kernel_by(position_fraction), f"{DEPENDS}: linspace(0, 1, L)"),
    "filter_arange_over_L": (kernel_by(arange_over_length), f"{DEPENDS}: arange(L) / L"),
    "filter_over_L": (kernel_by(lambda k, s: k[:, :s] / s), f"{DEPENDS}: scaled by 1/L"),
    "filter_windowed": (
        kernel_by(lambda k, s: k[:, :s] * torch.hann_window(s + 2, dtype=k.dtype)[1:-1]),
        f"{DEPENDS}: a window over the current length",
    ),
    "filter_interpolated": (kernel_by(interpolated), f"{DEPENDS}: stretched to L"),
    "filter_last_tap": (
        kernel_by(lambda k, s: torch.cat([k[:, : s - 1], k[:, s - 1 : s] + 1], -1)),
        f"{DEPENDS}: the last tap differs",
    ),
    "scale_left_on": (
        lambda u, k: (
            irfft(
                rfft(u, 2 * u.shape[-1]) * rfft(k[:, : u.shape[-1]], 2 * u.shape[-1]),
                2 * u.shape[-1],
                norm="forward",
            )[..., : u.shape[-1]]
            / 100
        ),
        f"{DEPENDS}: no 1/n anywhere",
    ),
    "scale_twice": (
        lambda u, k: C.scale_on_filter(u, k[:, : u.shape[-1]]) / (2 * u.shape[-1]),
        f"{DEPENDS}: 1/n twice",
    ),
}
