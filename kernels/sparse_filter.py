"""Filters without some of their frequencies, made causal again, with an account of what that changed.

FlashFFTConv (arXiv 2311.05908, section 3.3) zeroes blocks of a filter's spectrum and multiplies less. As it stands
such a filter is not causal: what its missing frequencies smear to the other side of lag 0 looks into the future.
Here that is cut off, lags 0 ... L - 1 are kept, and both losses are reported. The result is an ordinary filter, for
`long_conv` or for a model's parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseFilter:
    """A causal filter, float [C, L], and what it lacks of the given one, as shares of energy per channel [C].

    removed: in the frequencies that were zeroed; projected: of what remained, at the lags that were cut off (in the
    future, or beyond L); changed: ‖kernel - given‖² / ‖given‖². kept: the share of frequencies that are left.
    """

    kernel: Tensor
    kept: float
    removed: Tensor
    projected: Tensor
    changed: Tensor

    def __str__(self) -> str:
        worst = [
            100 * float(x.max()) if x.numel() else 0.0 for x in (self.removed, self.projected, self.changed)
        ]
        return (
            f"{self.kept:.1%} of the frequencies kept; of a channel's energy at most {worst[0]:.2g} % was in the"
            f" others, {worst[1]:.2g} % was cut off to stay causal, {worst[2]:.2g} % has changed in all"
        )


def low_frequencies(keep: float, bins: int, device: torch.device | None = None) -> Tensor:
    """The lowest `keep` (0 < keep <= 1) of `bins` frequencies, at least the lowest: bool [bins]."""
    if not 0 < keep <= 1:
        raise ValueError(f"a share of frequencies lies in (0, 1], found {keep}")
    return torch.arange(bins, device=device) < max(1, round(keep * bins))


def sparsify(k: Tensor, keep: Tensor) -> SparseFilter:
    """Keep the frequencies of k [C, L] that `keep` (bool, [L + 1]: of the transform of length 2L) names.

    Raises ValueError for another number of frequencies. Computed in float64, rounded once.
    """
    length = k.shape[-1]
    if keep.dtype != torch.bool or keep.shape != (length + 1,):
        raise ValueError(f"expected bool [{length + 1}], found {keep.dtype} {list(keep.shape)}")
    given = k.double()
    spectrum = torch.fft.rfft(given, n=2 * length)
    whole = torch.fft.irfft(spectrum * keep, n=2 * length)
    kernel = whole[..., :length].to(k.dtype)
    energy = given.square().sum(-1)
    left = whole.square().sum(-1)
    return SparseFilter(
        kernel,
        float(keep.double().mean()),
        _share(energy - left, energy),
        _share(whole[..., length:].square().sum(-1), left),
        _share((kernel.double() - given).square().sum(-1), energy),
    )


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp(0.0)
