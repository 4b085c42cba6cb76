"""Ways to make a causal filter: modules `length -> [C, length]`, the same values at every length."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weights import param


class Plain(nn.Module):
    """A parameter, cut to the length."""

    def __init__(self, channels: int, l_max: int):
        super().__init__()
        self.taps = param(channels, l_max)

    def forward(self, length: int) -> Tensor:
        return self.taps[:, :length]


class Whole(Plain):
    """All taps at any length: the transform must have room for them."""

    def forward(self, length: int) -> Tensor:
        return self.taps


class Finite(nn.Module):
    """`min(width, length)` taps: beyond `width` the filter is finite, which is exact."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.taps = param(channels, width)

    def forward(self, length: int) -> Tensor:
        return self.taps[:, : torch.sym_min(self.taps.shape[1], length)]


class Implicit(nn.Module):
    """Hyena's filter: an MLP with sine activations over a position table, times a decay."""

    z: Tensor
    t: Tensor

    def __init__(self, channels: int, l_max: int, hidden: int = 16, bands: int = 3):
        super().__init__()
        t = torch.linspace(0, 1, l_max, dtype=torch.float64)[None, :, None]
        angle = torch.arange(1, bands + 1) * 2 * math.pi * t
        z = torch.cat([t, angle.cos(), angle.sin()], -1).to(torch.get_default_dtype())
        self.register_buffer("z", z, persistent=False)
        self.register_buffer("t", t.to(z.dtype), persistent=False)
        self.inner, self.outer = nn.Linear(z.shape[-1], hidden), nn.Linear(hidden, channels)
        self.rate = param(channels)

    def forward(self, length: int) -> Tensor:
        h = self.outer(torch.sin(4 * self.inner(self.z[:, :length])))
        h = h * torch.exp(-self.t[:, :length] * self.rate.exp())
        return 0.3 * h[0].transpose(0, 1)


class RealModes(nn.Module):
    """`Σ R exp(log_p t)` with real poles in (0, 1)."""

    def __init__(self, channels: int, l_max: int, order: int = 4):
        super().__init__()
        self.residues, self.logits = param(channels, order), param(channels, order)

    def forward(self, length: int) -> Tensor:
        t = torch.arange(length, device=self.residues.device, dtype=self.residues.dtype)
        log_p = F.logsigmoid(3.5 + self.logits)
        return 0.3 * (self.residues[..., None] * torch.exp(log_p[..., None] * t)).sum(1)


class ComplexModes(nn.Module):
    """`Re Σ R exp((-a + iw) t)`: a diagonal state space's kernel (S4D)."""

    def __init__(self, channels: int, l_max: int, order: int = 3):
        super().__init__()
        self.residues = param(channels, order, 2)
        self.log_decay, self.frequency = param(channels, order), param(channels, order)

    def forward(self, length: int) -> Tensor:
        t = torch.arange(length, device=self.residues.device, dtype=self.residues.dtype)
        decay = 0.03 * torch.exp(self.log_decay)
        exponent = torch.complex(-decay, 2 * self.frequency)
        modes = torch.exp(exponent[..., None] * t)
        residues = torch.view_as_complex(self.residues)
        return 0.3 * torch.einsum("cn,cnl->cl", residues, modes).real


class Rational(nn.Module):
    """RTF: `irfft(rfft(b, N) / rfft([1, a], N))`, the transform length N not following the sequence."""

    def __init__(self, channels: int, l_max: int):
        super().__init__()
        self.b, self.radius, self.angle = param(channels, 4), param(channels), param(channels)
        self.n = 2 * l_max

    def spectrum(self, n: int) -> Tensor:
        r = torch.sigmoid(2.5 + 0.5 * self.radius)
        a = torch.stack([torch.ones_like(r), -2 * r * self.angle.cos(), r * r], -1)
        return torch.fft.rfft(self.b, n=n) / torch.fft.rfft(a, n=n)

    def forward(self, length: int) -> Tensor:
        return 0.2 * torch.fft.irfft(self.spectrum(self.n), n=self.n)[:, :length]


class MultiScale(nn.Module):
    """SGConv: short kernels stretched by powers of two, decaying, joined, then cut to the length."""

    def __init__(self, channels: int, l_max: int, base: int = 8):
        super().__init__()
        scales = 1 + max(0, math.ceil(math.log2(l_max / base)))
        self.pieces = nn.ParameterList(param(1, channels, base) for _ in range(scales))

    def forward(self, length: int) -> Tensor:
        stretched = [
            F.interpolate(p, scale_factor=2 ** max(0, i - 1), mode="linear") * 0.7**i
            for i, p in enumerate(self.pieces)
        ]
        return torch.cat(stretched, -1)[0, :, :length]


class InPlace(nn.Module):
    """Mutation inside the kernel: setitem, `mul_`, `add_` on a copy."""

    def __init__(self, channels: int, l_max: int):
        super().__init__()
        self.taps, self.skip = param(channels, l_max), param(channels)

    def forward(self, length: int) -> Tensor:
        k = self.taps[:, :length].clone()
        k.mul_(torch.exp(-0.01 * torch.arange(length, device=k.device, dtype=k.dtype)))
        k[:, 0] = self.skip
        k[:, 1:].add_(0.01)
        return k


class Cached(nn.Module):
    """A position table made on the first call and made again when a longer one is needed."""

    def __init__(self, channels: int, l_max: int):
        super().__init__()
        self.t: Tensor | None = None
        self.modes = RealModes(channels, l_max)

    def forward(self, length: int) -> Tensor:
        m = self.modes
        t = self.t
        if t is None or t.shape[0] < length or t.dtype != m.residues.dtype:
            t = torch.arange(length, device=m.residues.device, dtype=m.residues.dtype)
            self.t = t
        log_p = F.logsigmoid(3.5 + m.logits)
        return 0.3 * (m.residues[..., None] * torch.exp(log_p[..., None] * t[:length])).sum(1)


class PowerLaw(nn.Module):
    """`w (t + 1) ** -a` with the position counted by a cumulative sum of ones."""

    def __init__(self, channels: int, l_max: int):
        super().__init__()
        self.weight, self.power = param(channels), param(channels)

    def forward(self, length: int) -> Tensor:
        ones = torch.ones(length, device=self.weight.device, dtype=self.weight.dtype)
        t = torch.cumsum(ones, 0)
        return self.weight[:, None] * t ** -(0.3 + torch.sigmoid(self.power))[:, None]


class Normalised(nn.Module):
    """A filter divided by the norm it has over l_max taps, not over the current length."""

    def __init__(self, channels: int, l_max: int):
        super().__init__()
        self.taps = param(channels, l_max)

    def forward(self, length: int) -> Tensor:
        return (self.taps / self.taps.norm(dim=-1, keepdim=True))[:, :length]


FILTERS = {
    "plain": Plain,
    "implicit_mlp_decay": Implicit,
    "real_modes": RealModes,
    "complex_modes": ComplexModes,
    "rational_fixed_length": Rational,
    "multi_scale": MultiScale,
    "in_place": InPlace,
    "cached_table": Cached,
    "power_law": PowerLaw,
    "normalised_over_l_max": Normalised,
}
