"""Filters and inputs for mixing alone: like a Hyena model's, and long enough to matter to the last lag."""

from __future__ import annotations

import torch
from torch import Tensor


def hyena_like(channels: int, length: int, seed: int = 0) -> Tensor:
    """Float32 [C, L]: sines of random, swinging frequencies under decays of L/64 … L/4 positions.

    Implicit filters oscillate under an exponential window; none is a short sum of exponentials, and no lag is zero or
    denormal, so that no peer gains from luck.
    """
    draw = torch.Generator().manual_seed(seed)
    t = torch.arange(length, dtype=torch.float32)
    memory = torch.logspace(0, 1, channels, base=16) * length / 64
    angle = 3 * torch.rand(channels, 3, 1, generator=draw)
    out = torch.empty(channels, length)
    for c in range(channels):
        wave = torch.sin(angle[c] * t + 3 * torch.sin(angle[c].flip(0) * t / 7)).sum(0)
        out[c] = wave * torch.exp(-t / memory[c]) * (2 / memory[c]) ** 0.5
    return out


def history(channels: int, length: int, seed: int = 1) -> Tensor:
    """Random inputs, float32 [C, L]."""
    return torch.randn(channels, length, generator=torch.Generator().manual_seed(seed))
