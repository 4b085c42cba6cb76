"""A filter as a sum of exponentials, and finding one that is: poles, residues and how well they do.

`k[0] = skip`, `k[t] = Re Σ_n residues[n] · poles[n]^(t-1)` for t >= 1. Diagonal state spaces, rational transfer
functions and exponential averages are exactly this. Poles come from the shift-invariance of a Hankel matrix's signal
space (ESPRIT: Roy and Kailath, IEEE TASSP 1989), residues from least squares; docs/algorithms.md, "Sums of
exponentials".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ORDER = 64
_ORDERS = (8, 24, MOST_ORDER)  # tried in turn: most filters of this kind have few modes
_SAMPLED = 6  # channels that are asked before all of them
_STEPS = 3
_CUTS = (1e-13, 1e-11, 1e-9)  # singular values below this share of the largest are taken for rounding
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Modes:
    """Sums of exponentials, one a channel: poles, residues complex128 [C, N], padded with zeros; skip float64 [C].

    A pole with a positive imaginary part stands for itself and its conjugate.
    """

    poles: Tensor
    residues: Tensor
    skip: Tensor

    @property
    def order(self) -> int:
        """The largest number of real state variables that a channel needs."""
        live = self.residues != 0
        return int((live * (1 + (self.poles.imag != 0).long())).sum(-1).max()) if live.numel() else 0


def modal_filter_reference(modes: Modes, length: int) -> Tensor:
    """The definition. Returns float64 [C, length]."""
    t = torch.arange(length - 1, device=modes.poles.device)
    power = torch.where(t == 0, 1.0, modes.poles[..., None] ** t)  # complex 0 ** 0 is NaN in torch
    return torch.cat([modes.skip[:, None], (modes.residues[..., None] * power).sum(1).real], 1)


def modal_filter(modes: Modes, length: int) -> Tensor:
    """The same by matrix products: with t = a·m + b, λ^t = λ^(a·m)·λ^b. Returns float64 [C, length]."""
    side = max(1, int((length - 1) ** 0.5))
    rows = -(-(length - 1) // side)
    inner = powers(modes.poles, side)
    outer = powers(modes.poles**side, rows) * modes.residues[..., None]
    lags = outer.real.mT @ inner.real - outer.imag.mT @ inner.imag  # [C, rows, side]
    return torch.cat([modes.skip[:, None], lags.flatten(1)[:, : length - 1]], 1)


def powers(poles: Tensor, count: int) -> Tensor:
    """poles [..., N] to the powers 0 ... count - 1: [..., N, count]."""
    t = torch.arange(count, device=poles.device, dtype=torch.float64)
    return torch.polar(poles.abs()[..., None] ** t, poles.angle()[..., None] * t)


def modal_error(modes: Modes, kernel: Tensor) -> Tensor:
    """‖modal filter - kernel‖₂ of each channel, over all lags of kernel [C, n]."""
    length, errors = kernel.shape[1], []
    for some in _chunks(kernel.shape[0], length):
        part = Modes(modes.poles[some], modes.residues[some], modes.skip[some])
        errors.append((modal_filter(part, length) - kernel[some]).norm(dim=-1))
    return torch.cat(errors)


def modal_rounding(modes: Modes, length: int) -> Tensor:
    """What the recurrence x ← λx + u loses in `length` steps, in units of ε·‖u‖₂ at worst, for each channel.

    A state is at most ‖u‖₂·‖λ^j‖₂, rounding it costs three ε of that (two products and a sum), and what was lost
    once comes back weighted by λ^j: Σ_n 3·|R_n|·‖λ_n^j‖₁·‖λ_n^j‖₂, sums over 0 <= j < length.
    """
    size = modes.poles.abs()

    def total(ratio: Tensor) -> Tensor:
        near = (1 - ratio).abs() < 1e-12
        return torch.where(near, float(length), (1 - ratio**length) / torch.where(near, 1.0, 1 - ratio))

    return (3 * modes.residues.abs() * total(size) * total(size**2).sqrt()).sum(-1)


def fourier_modes(kernel: Tensor) -> Modes:
    """The Fourier series of lags 1 ... n - 1: a sum of n - 1 exponentials that equals any n lags, and only those."""
    lags = kernel[:, 1:] if kernel.shape[1] > 1 else torch.zeros_like(kernel)
    count = lags.shape[1]
    spectrum = torch.fft.rfft(lags) / count
    j = torch.arange(spectrum.shape[1], device=kernel.device, dtype=torch.float64)
    alone = (j == 0) | (2 * j == count)  # real poles: 1, and -1 where the count is even
    poles = torch.polar(torch.ones_like(j), 2 * torch.pi * j / count)
    poles = torch.where(alone, poles.real.round().to(poles.dtype), poles)
    return Modes(poles.expand_as(spectrum).clone(), spectrum * torch.where(alone, 1, 2), kernel[:, 0].clone())


def fit_modes(kernel: Tensor, tolerance: float, order: int = MOST_ORDER) -> Modes | None:
    """The sum of at most `order` exponentials that each channel of kernel [C, n], float64, is; or None.

    Accepted where ‖error‖₂ <= tolerance·‖k‖₂ over all n lags, in every channel. A few channels are asked first, and
    refused by the singular values of a Hankel matrix before any pole is looked for. At most n/8 exponentials are
    tried: with half as many as lags everything is a sum of exponentials.
    """
    kernel = kernel.detach().cpu()
    channels, length = kernel.shape
    order = min(order, length // 8)
    if order < 1:
        return None
    norm = kernel.norm(dim=-1)
    allowed = tolerance * norm
    some = torch.linspace(0, channels - 1, min(channels, _SAMPLED)).round().long().unique()
    if bool((_least_error(kernel[some], order) > allowed[some]).any()):
        return None
    first = next((d for d in _orders(order) if _fitted(kernel[some], allowed[some], d) is not None), None)
    if first is None:
        return None
    found: dict[int, tuple[Tensor, Tensor]] = {}
    left = torch.arange(channels)
    for limit in (d for d in _orders(order) if d >= first):
        _fit_channels(kernel, allowed, left, limit, found)
        left = torch.tensor([c for c in left.tolist() if c not in found], dtype=torch.int64)
        if not len(left):
            return _padded([found[c] for c in range(channels)], kernel[:, 0])
    return None


def _orders(order: int) -> list[int]:
    return [d for d in _ORDERS if d < order] + [order]


def _chunks(count: int, elements: int) -> list[slice]:
    width = max(1, _CHUNK // max(1, elements))
    return [slice(start, min(start + width, count)) for start in range(0, count, width)]


def _spread(count: int, stop: int) -> Tensor:
    """About `count` of the numbers 0 ... stop - 1, from every one of them on further and further apart.

    Neighbours tell fast modes apart, distant ones slow modes.
    """
    x = torch.arange(min(count, stop), dtype=torch.float64)
    return (x + x**3 / count**2 * max(stop / count - 1, 0)).long().clamp_max(stop - 1).unique()


def _hankel_index(length: int, order: int) -> Tensor:
    """Lags [p, q], sums of rows and columns spread over the first half, of a generalised Hankel matrix."""
    spread = _spread(3 * order + 16, max(1, (length - 2) // 2))
    return 1 + spread[:, None] + spread[None, :]


def _extents(kernel: Tensor, order: int) -> Tensor:
    """How far each channel reaches before it has faded, rounded up to a power of two, and eight times the order."""
    rest = kernel.flip(-1).square().cumsum(-1).flip(-1).sqrt()
    last = (rest > 1e-11 * rest[:, :1]).sum(-1).clamp_min(8 * order).double()
    return (2 ** last.log2().ceil()).long().clamp_max(kernel.shape[1])


def _least_error(kernel: Tensor, order: int) -> Tensor:
    """A bound below the l2 error of every sum of `order` exponentials: Σ_{i>order} σ_i² / (times a lag occurs)."""
    index = _hankel_index(kernel.shape[1], order)
    sigma = torch.linalg.svdvals(kernel[:, index])
    occurs = int(index.flatten().bincount().max())
    return (sigma[:, order:].square().sum(-1) / occurs).sqrt()


def _fitted(kernel: Tensor, allowed: Tensor, order: int) -> dict[int, tuple[Tensor, Tensor]] | None:
    found: dict[int, tuple[Tensor, Tensor]] = {}
    _fit_channels(kernel, allowed, torch.arange(kernel.shape[0]), order, found)
    return found if len(found) == kernel.shape[0] else None


def _fit_channels(
    kernel: Tensor, allowed: Tensor, channels: Tensor, order: int, found: dict[int, tuple[Tensor, Tensor]]
) -> None:
    """Add to `found` the poles and residues of those channels that `order` exponentials are enough for."""
    extents = _extents(kernel[channels], order)
    for extent in extents.unique().tolist():
        alike = channels[extents == extent]
        for part in _chunks(len(alike), 4 * (3 * order + 16) ** 2):
            _fit_alike(kernel, allowed, alike[part], extent, order, found)


def _fit_alike(
    kernel: Tensor,
    allowed: Tensor,
    channels: Tensor,
    extent: int,
    order: int,
    found: dict[int, tuple[Tensor, Tensor]],
) -> None:
    index = _hankel_index(extent, order)
    now, later = kernel[channels][:, index], kernel[channels][:, index + 1]
    left, sigma, right = torch.linalg.svd(now, full_matrices=False)
    for i, c in enumerate(channels.tolist()):
        for rank in dict.fromkeys(int((sigma[i] > cut * sigma[i, 0]).sum()) for cut in _CUTS):
            d = min(rank, order)
            if d == 0:
                found[c] = (
                    kernel.new_zeros(0, dtype=torch.complex128),
                    kernel.new_zeros(0, dtype=torch.complex128),
                )
                break
            # Rows of `later` are those of `now` shifted by one lag: the same space, turned by the poles.
            turned = (left[i, :, :d].mT @ later[i] @ right[i, :d].mT) / sigma[i, :d]
            poles, residues = _polished(kernel[c], torch.linalg.eigvals(turned), float(allowed[c]), extent)
            if _misses(kernel[c], poles, residues) <= float(allowed[c]):
                found[c] = (poles, residues)
                break


def _misses(kernel: Tensor, poles: Tensor, residues: Tensor) -> float:
    return float(modal_error(Modes(poles[None], residues[None], kernel[:1]), kernel[None]))


def _polished(kernel: Tensor, poles: Tensor, allowed: float, extent: int) -> tuple[Tensor, Tensor]:
    """Poles, and residues by least squares on lags spread over kernel [n], improved by Gauss and Newton's steps."""
    poles = _upper_half(poles)
    stop, many = len(kernel) - 1, 6 * len(poles) + 32
    near = _spread(many, extent - 1)
    t = torch.cat([near, extent - 2 - near, torch.linspace(0, stop - 1, many).long()]).unique()
    target = kernel[1 + t]
    residues = _solve(_samples(poles, t), target, poles)
    for _ in range(_STEPS):
        if _misses(kernel, poles, residues) <= allowed:
            break
        values = _samples(poles, t)
        slopes = residues * t[:, None] * _samples(poles, (t - 1).clamp_min(0))
        rest = target - (values @ residues).real
        change = _solve(torch.cat([values, slopes], 1), rest, torch.cat([poles, poles]))
        poles = _upper_half(poles + change[len(poles) :])
        residues = _solve(_samples(poles, t), target, poles)
    return poles, residues


def _samples(poles: Tensor, t: Tensor) -> Tensor:
    return torch.polar(poles.abs() ** t[:, None], poles.angle() * t[:, None])


def _upper_half(poles: Tensor) -> Tensor:
    """One of each conjugate pair, none outside the unit circle."""
    poles = poles[poles.imag >= 0]
    return torch.where(poles.abs() > 1, poles / poles.abs(), poles)


def _solve(columns: Tensor, target: Tensor, poles: Tensor) -> Tensor:
    """The complex w, real where a pole is, for which Re(columns @ w) comes nearest to target."""
    free = poles.imag != 0
    real = torch.cat([columns.real, -columns.imag[:, free]], 1)
    scale = real.norm(dim=0).clamp_min(1e-300)
    solved = torch.linalg.lstsq(real / scale, target[:, None], driver="gelsd").solution[:, 0] / scale
    imaginary = torch.zeros_like(poles.real)
    imaginary[free] = solved[len(poles) :]
    return torch.complex(solved[: len(poles)], imaginary)


def _padded(parts: list[tuple[Tensor, Tensor]], skip: Tensor) -> Modes:
    width = max(1, *(len(poles) for poles, _ in parts)) if parts else 1
    both = torch.zeros(2, len(parts), width, dtype=torch.complex128)
    for c, (poles, residues) in enumerate(parts):
        both[0, c, : len(poles)], both[1, c, : len(poles)] = poles, residues
    return Modes(both[0], both[1], skip.clone())
