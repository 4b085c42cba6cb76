"""Modules that look like causal mixers and are not; no incremental decoder equals them: refuse.

`TRAPS`: name -> (factory, reason). A reason begins with `SEES` (at a fixed length, later input changes
earlier output) or with `DEPENDS` (causal at each length, but lengths disagree). Each breaks by s = 130.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fft import irfft, rfft

from . import convolutions as C
from .attention import Attend, Attention
from .filters import Rational
from .others import Lambda
from .spellings import Conv
from .trap_convolutions import DEPENDS, FILTER_TRAPS, SEES
from .trap_functions import ATTENTION_TRAPS, DATA_TRAPS
from .weights import param

Factory = Callable[[int, int], nn.Module]


class Filtered(nn.Module):
    """A convolution written as a function of u `[B, D, L]` and the whole filter `[D, l_max]`."""

    def __init__(self, width: int, l_max: int, convolve: C.Convolve):
        super().__init__()
        self.filter, self.convolve = param(width, l_max), convolve

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x.mT, self.filter).mT


class FollowingRational(Rational):
    """The transform length of a rational kernel follows the sequence: its tail folds back."""

    def forward(self, length: int) -> Tensor:
        return 0.2 * irfft(self.spectrum(2 * length), n=2 * length)[:, :length]


class WrappedRational(nn.Module):
    """A rational spectrum over a fixed n, used unsliced: its 2 l_max taps wrap around."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.filter, self.n = Rational(width, 3 * l_max // 8), 3 * l_max // 4

    def forward(self, x: Tensor) -> Tensor:
        y = irfft(rfft(x.mT, n=self.n) * self.filter.spectrum(self.n), n=self.n)
        return 0.2 * y[..., : x.shape[1]].mT


class DataFilter(nn.Module):
    """The filter is computed from the mean of the input."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.make, self.taps = nn.Linear(width, width), param(width, l_max)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        k = self.taps[:, :length] * (1 + self.make(x.mean((0, 1))))[:, None]
        return C.scale_on_filter(x.mT, k).mT


class TimeNorm(nn.Module):
    """LayerNorm's arithmetic over time."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.mT, x.shape[1:2]).mT


def filtered(convolve: C.Convolve) -> Factory:
    return lambda width, l_max: Filtered(width, l_max, convolve)


def attention(attend: Attend) -> Factory:
    return lambda width, l_max: Attention(width, l_max, attend)


def function(f: Callable[[Tensor], Tensor]) -> Factory:
    return lambda width, l_max: Lambda(f)


TRAPS: dict[str, tuple[Factory, str]] = {
    **{f"conv_{name}": (filtered(f), why) for name, (f, why) in FILTER_TRAPS.items()},
    **{f"data_{name}": (function(f), why) for name, (f, why) in DATA_TRAPS.items()},
    **{f"attention_{name}": (attention(f), why) for name, (f, why) in ATTENTION_TRAPS.items()},
    "rational_following": (
        lambda width, l_max: Conv(FollowingRational(width, l_max)),
        f"{DEPENDS}: the transform length of a rational kernel follows L",
    ),
    "rational_wrapped": (WrappedRational, f"{SEES}: an infinite response under a fixed n wraps"),
    "data_filter": (DataFilter, f"{SEES}: the filter is computed from the whole input"),
    "layer_norm_over_time": (lambda width, l_max: TimeNorm(), f"{SEES}: LayerNorm over time"),
}
