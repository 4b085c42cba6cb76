"""A recurrence of order d in place of each filter: a sum of d exponentials, Θ(d) a position, and an approximation.

Modal form in real blocks of two (docs/algorithms.md, "Sums of exponentials"). Poles by the shift-invariance of a
Hankel matrix's signal space (ESPRIT: Roy and Kailath 1989), residues by least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Peer, Piece
from .native import modal_step

_SAMPLES = 4096


def fit(kernel: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Poles and residues, complex128 [order / 2] of conjugate pairs, near `kernel` float64 [n]: lag t >= 1 is
    `Re sum residues · poles^(t - 1)`."""
    side = min(4 * order + 64, (len(kernel) - 3) // 2)
    half = (len(kernel) - 3) // 2
    spread = torch.linspace(0, 1, side, dtype=torch.float64).square().mul(half).round().long().unique()
    lags = 1 + spread[:, None] + spread[None, :]
    left, sigma, right = torch.linalg.svd(kernel[lags])
    d = min(order, int((sigma > 1e-12 * sigma[0]).sum()))
    turned = left[:, :d].T @ kernel[lags + 1] @ right[:d].T / sigma[:d]
    poles = torch.linalg.eigvals(turned)
    poles = poles[poles.imag >= 0][: order // 2]
    poles = torch.where(poles.abs() >= 1, poles / poles.abs() * (1 - 1 / len(kernel)), poles)
    t = (
        torch.linspace(0, 1, _SAMPLES, dtype=torch.float64)
        .square()
        .mul(len(kernel) - 2)
        .round()
        .long()
        .unique()
    )
    powers = torch.polar(poles.abs() ** t[:, None], poles.angle() * t[:, None])
    columns = torch.cat([powers.real, -powers.imag], 1)
    weights = torch.linalg.lstsq(columns, kernel[1 + t, None], driver="gelsd").solution[:, 0]
    return poles, torch.complex(*weights.chunk(2))


def modal_filter(poles: Tensor, residues: Tensor, skip: Tensor, length: int) -> Tensor:
    """The filters, float64 [C, length], of poles and residues complex128 [C, N] and skip [C]."""
    t = torch.arange(length - 1, dtype=torch.float64)
    rows = [
        (r[:, None] * torch.polar(p.abs()[:, None] ** t, p.angle()[:, None] * t)).sum(0).real
        for p, r in zip(poles, residues, strict=True)
    ]
    return torch.cat([skip.double()[:, None], torch.stack(rows)], 1)


def approximation_error(kernel: Tensor, order: int) -> float:
    """‖filter of order d - kernel‖₂ / ‖kernel‖₂ for one filter, float64 [n]."""
    poles, residues = fit(kernel, order)
    found = modal_filter(poles[None], residues[None], kernel[:1], len(kernel))[0]
    return float((found - kernel).norm() / kernel.norm())


class Recurrence(Peer):
    """`order` real state variables a channel. Exact for filters of its own: `modal_filter` of what it was given."""

    sampled = "one step, the same at every position"

    def __init__(self, poles: Tensor, residues: Tensor, skip: Tensor) -> None:
        """poles, residues: complex [C, N]; skip [C]."""
        self.name = f"recurrence of order {2 * poles.shape[1]}"
        self.poles, self.residues = (
            torch.stack([v.real, v.imag]).float().contiguous() for v in (poles, residues)
        )
        self.skip, self.state = skip.float(), torch.zeros_like(self.poles)
        self.given = poles, residues, skip

    @classmethod
    def random(cls, channels: int, order: int) -> Recurrence:
        """Slow poles drawn at random: the cost of a step does not depend on them."""
        shape = (channels, max(1, order // 2))
        poles = torch.polar(0.9 + 0.09 * torch.rand(shape).double(), torch.pi * torch.rand(shape).double())
        return cls(poles, torch.randn(shape, dtype=torch.complex128), torch.randn(channels))

    def push(self, y: Tensor) -> Tensor:
        return modal_step(self.state, self.poles, self.residues, self.skip, y)

    def pieces_of(self, length: int) -> list[Piece]:
        """The work of `length` positions."""
        y = torch.randn_like(self.skip)
        return [Piece("step", length, range(0), range(0), lambda: self.push(y))]
