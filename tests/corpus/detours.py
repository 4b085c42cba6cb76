"""Mixers that leave their dtype on the way, as most published models do: sound to float32 rounding.

Factories as in `spellings`. A float64 copy still rounds to float32 unless its casts are rewritten.
"""

import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft

from .filters import Implicit, Plain
from .others import Factory
from .weights import param


class FloatTransform(nn.Module):
    """`.float()` before the transforms, back to the input's dtype after them."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.filter = Implicit(width, l_max)

    def forward(self, x: Tensor) -> Tensor:
        n = 2 * x.shape[1]
        u_f = rfft(x.mT.float(), n=n)
        k_f = rfft(self.filter(x.shape[1]).to(torch.float32), n=n)
        return irfft(u_f * k_f, n=n)[..., : x.shape[1]].mT.to(x.dtype)


class ComplexCast(nn.Module):
    """The filter's spectrum is cast to complex64."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.filter = Plain(width, l_max)

    def forward(self, x: Tensor) -> Tensor:
        n = 2 * x.shape[1]
        k_f = rfft(self.filter(x.shape[1]), n=n).to(torch.complex64)
        return irfft(rfft(x.mT, n=n) * k_f, n=n)[..., : x.shape[1]].mT.to(x.dtype)


class FloatDecay(nn.Module):
    """A float32 position table, whatever the dtype of the model."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.filter, self.rate = Plain(width, l_max), param(width)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        t = torch.arange(length, dtype=torch.float32, device=x.device)
        decay = torch.exp(-0.02 * self.rate.exp()[:, None].float() * t)
        k = self.filter(length) * decay.to(x.dtype)
        n = 2 * length
        return irfft(rfft(x.mT, n=n) * rfft(k, n=n), n=n)[..., :length].mT


class FloatNorm(nn.Module):
    """The usual RMSNorm: statistics in float32."""

    def __init__(self, width: int, l_max: int):
        super().__init__()
        self.weight = param(width)

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


DETOURS: dict[str, Factory] = {
    "float_transform": FloatTransform,
    "complex_cast": ComplexCast,
    "float_decay": FloatDecay,
    "float_norm": FloatNorm,
}
