"""`FALSE_ALARMS`: sound modules that look suspicious. `LAST_ONLY`: models that return one position."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import convolutions as C
from .attention import lags
from .filters import Plain, RealModes
from .others import Factory, function
from .spellings import Conv, Gated
from .traps import Filtered, filtered


def cut(convolve: C.Convolve) -> C.Convolve:
    """Let `convolve` have L taps of the l_max."""
    return lambda u, k: convolve(u, k[:, : u.shape[-1]])


def flip_undone(u: Tensor, k: Tensor) -> Tensor:
    """Anticausal on the reversed sequence: a correlation between two flips."""
    length = u.shape[-1]
    n = 2 * length
    product = torch.fft.rfft(u.flip(-1), n=n) * torch.fft.rfft(k, n=n).conj()
    return torch.fft.irfft(product, n=n)[..., :length].flip(-1)


def reversed_twice(u: Tensor, k: Tensor) -> Tensor:
    """The filter is stored from its end and turned again."""
    return C.scale_on_filter(u, k.flip(-1)[:, torch.arange(k.shape[-1] - 1, -1, -1)])


def early_and_shifted(u: Tensor, k: Tensor) -> Tensor:
    """A window from 1 on an input that was padded by one in front: the shifts cancel."""
    length = u.shape[-1]
    n = 2 * length + 1
    product = torch.fft.rfft(F.pad(u, (1, 0)), n=n) * torch.fft.rfft(k, n=n)
    return torch.fft.irfft(product, n=n)[..., 1 : length + 1]


def scale_cancels(u: Tensor, k: Tensor) -> Tensor:
    length = u.shape[-1]
    return C.scale_on_filter(u * length, k / length)


def circular_with_room(u: Tensor, k: Tensor) -> Tensor:
    """n = L + 24 under 24 taps: circular, but nothing wraps into the window."""
    n, taps = u.shape[-1] + 24, torch.sym_min(24, u.shape[-1])
    product = torch.fft.rfft(u, n=n) * torch.fft.rfft(k[:, :taps], n=n)
    return torch.fft.irfft(product, n=n)[..., : u.shape[-1]]


def long_kernel_with_room(u: Tensor, k: Tensor) -> Tensor:
    """All l_max taps, but under a transform of L + l_max: what is late is cut off."""
    n = u.shape[-1] + k.shape[-1]
    product = torch.fft.rfft(u, n=n) * torch.fft.rfft(k, n=n)
    return torch.fft.irfft(product, n=n)[..., : u.shape[-1]]


class Linspace(nn.Module):
    """`linspace(0, 1, l_max)` cut to the length is a fixed table."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.filter, self.l_max = Plain(width, l_max), l_max

    def forward(self, x: Tensor) -> Tensor:
        t = torch.linspace(0, 1, self.l_max, dtype=x.dtype, device=x.device)[: x.shape[1]]
        k = self.filter(x.shape[1]) * torch.exp(-3 * t)
        return C.scale_on_filter(x.mT, k).mT


class LendsItsType(nn.Module):
    """The input gives dtype, device and shape to the filter; none of its values."""

    def __init__(self, width: int, l_max: int, how: str):
        super().__init__()
        self.filter, self.how = Plain(width, l_max), how

    def forward(self, x: Tensor) -> Tensor:
        k = self.filter(x.shape[1])
        match self.how:
            case "to":
                k = k.to(x)
            case "type_as":
                k = k.type_as(x)
            case "zeros_like":
                k = torch.zeros_like(x[0].mT) + k
            case "ones_like":
                k = torch.ones_like(x[0].mT).cumsum(-1) ** -0.1 * k
            case "expand_as":
                k = k.expand_as(x[0].mT)
            case "new_zeros":
                k = x.new_zeros(k.shape).copy_(k)
        return C.scale_on_filter(x.mT, k).mT


class Lonely(nn.Module):
    """The last position of a mixer and a head: `[B, D]`, or `[B, 1, D]` where kept."""

    def __init__(self, width: int, l_max: int, how: str):
        super().__init__()
        self.body, self.head, self.how = Gated(width, l_max), nn.Linear(width, width), how

    def every_position(self, x: Tensor) -> Tensor:
        """What would be returned without the cut, `[B, L, D]`."""
        return self.head(x + self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.body(x)
        match self.how:
            case "slice_before_head":
                return self.head(h[:, -1:])
            case "select_before_head":
                return self.head(h[:, -1])
            case "select_after_head":
                return self.head(h)[:, -1, :]
            case "narrow":
                return self.head(h.narrow(1, x.shape[1] - 1, 1))
            case "gather":
                at = torch.full((x.shape[0],), x.shape[1] - 1, device=x.device)
                return self.head(h[torch.arange(x.shape[0], device=x.device), at])
        raise ValueError(self.how)


def lends(how: str) -> Factory:
    return lambda width, l_max: LendsItsType(width, l_max, how)


def lonely(how: str) -> Factory:
    return lambda width, l_max: Lonely(width, l_max, how)


def roll_undone(x: Tensor) -> Tensor:
    """What rolls around is overwritten by zeros: a shift."""
    rolled = x.roll(1, 1).clone()
    rolled[:, 0] = 0
    return x + rolled


def masked_twice(x: Tensor) -> Tensor:
    """An upper triangle that is computed, then masked off."""
    scores = torch.tanh(x @ x.mT)
    upper = lags(x, x.shape[1]) < 0
    return 0.2 * scores.masked_fill(upper, -1e4).masked_fill(upper, 0) @ x


FALSE_ALARMS: dict[str, Factory] = {
    **{
        f"lends_{how}": lends(how)
        for how in ("to", "type_as", "zeros_like", "ones_like", "expand_as", "new_zeros")
    },
    "flip_undone_by_flip": filtered(cut(flip_undone)),
    "filter_reversed_twice": filtered(cut(reversed_twice)),
    "shifts_cancel": filtered(cut(early_and_shifted)),
    "scales_cancel": filtered(cut(scale_cancels)),
    "circular_with_room": filtered(circular_with_room),
    "long_kernel_with_room": lambda width, l_max: Filtered(width, l_max, long_kernel_with_room),
    "linspace_l_max": Linspace,
    "roll_undone_by_roll": function(lambda x: x + torch.tanh(x.roll(3, 1)).roll(-3, 1)),
    "roll_undone_by_zero": function(roll_undone),
    "roll_undone_by_pad": function(lambda x: F.pad(x, (0, 0, 0, 1)).roll(1, 1)[:, :-1]),
    "flip_of_features": function(lambda x: x.flip(-1) * x),
    "mean_over_features": function(lambda x: x - x.mean(-1, keepdim=True)),
    "softmax_over_features": function(lambda x: x.softmax(-1) * x),
    "sort_of_features": function(lambda x: x.sort(-1).values + x),
    "masked_after_use": function(masked_twice),
    "length_cancels": function(lambda x: x * x.shape[1] / x.shape[1]),
    "zero_times_future": function(lambda x: x + 0.0 * x.mean(1, keepdim=True)),
    "first_position": function(lambda x: x + x[:, :1]),
    "position_parity": function(lambda x: x * (1 + (torch.arange(x.shape[1], device=x.device) % 2)[:, None])),
    "divided_by_position": lambda width, l_max: nn.Sequential(
        Conv(RealModes(width, l_max)),
        function(lambda x: x / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None])(0, 0),
    ),
}
LAST_ONLY: dict[str, Factory] = {
    how: lonely(how)
    for how in (
        "slice_before_head",
        "select_before_head",
        "select_after_head",
        "narrow",
        "gather",
    )
}

# Sound only by arithmetic that a proof need not know: a compiler may refuse these, never decode them wrongly.
MAY_REFUSE = frozenset(
    {"scales_cancel", "length_cancels", "zero_times_future", "first_position", "masked_after_use"}
)
