"""Increment of a filter that is a sum of exponentials: one state variable a mode, whatever the length.

The state is held in float64. A mode that decays over T positions adds up T roundings of its state, and what a
convolution may lose, ε·‖u‖₂·‖k‖₂, has no room for them where the input keeps its sign. A float64 model has no wider
type to hold its states in, so its filters stay in tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fi_compile.kernels.modes import Modes, fit_modes, fourier_modes, modal_error, modal_rounding
from fi_compile.kernels.recurrence import final_state, recurrence_step

from .convolution import Convolution, Filter, FilterGrew
from .reference import sum_pairs

_EPS = torch.finfo(torch.float32).eps
_SHARE = 1 / 8  # of what a convolution in float32 may lose
_ROWS = 16


@dataclass(frozen=True)
class Recurrence:
    """Increment of modal filters, ``fan_in`` pairs for an output channel: the states after the newest positions."""

    pairs: int
    fan_in: int = 1

    needs = ("poles", "residues", "skip")
    reads = 1
    rows = _ROWS

    def weights(self, found: Filter, source: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """Poles and residues [2, P, N], real and imaginary parts, and lag 0 [P]: float64, whatever ``dtype``.

        A filter that comes without modes, of the few lags that a trial has, is served by its Fourier series.
        """
        modes = found.modes if found.modes is not None else fourier_modes(found.kernel)
        parts = {"poles": modes.poles, "residues": modes.residues}
        both = {name: torch.stack([value.real, value.imag]).contiguous() for name, value in parts.items()}
        return {**both, "skip": modes.skip.clone()}

    def ring(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """States of no positions: zeros [R, B, P, 2, N], float64."""
        poles = weights["poles"]
        return poles.new_zeros(self.rows, batch, self.pairs, 2, poles.shape[-1])

    def step(self, ring: Tensor, position: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The newest output [B, Cout], float64, from x [B, Cin]; writes the new state into the ring."""
        size, source = ring.shape[0], weights.get("source")
        state = ring.index_select(0, (position - 1) % size)[0]
        u = (x if source is None else x.index_select(1, source)).to(ring.dtype)
        z, new = recurrence_step(state, u, weights["poles"], weights["residues"], weights["skip"])
        ring.index_copy_(0, position % size, new.unsqueeze(0))
        return sum_pairs(z, self.fan_in)

    def fill(self, ring: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take over the states after the inputs x [B, Cin, P]: the first in closed form, the newest step by step."""
        size, length = ring.shape[0], x.shape[-1]
        ring.zero_()
        first = max(0, length - size)
        if first:
            before = final_state(x[:, :, :first], weights["poles"], weights.get("source"))
            ring[(first - 1) % size] = before
        for t in range(first, length):
            self.step(ring, torch.tensor([t], device=ring.device), x[:, :, t], weights)

    def cost(self, weights: Mapping[str, Tensor]) -> str:
        """Work of one step."""
        live = weights["residues"].abs().sum(0) != 0
        order = int((live * (1 + (weights["poles"][1] != 0).long())).sum(-1).max())
        pairs = "C" if self.fan_in == 1 else f"{self.fan_in}·C"
        return f"3·d·{pairs} multiply-adds, d = {order} modes"


def as_recurrence(found: Convolution, derived: Filter, dtype: torch.dtype) -> tuple[Convolution, Filter]:
    """A long convolution and its filter: as a recurrence where the filter is a sum of exponentials.

    All channels or none: a step has one shape for a whole mixer.
    """
    if found.lowering != "tiles" or dtype != torch.float32:
        return found, derived
    modes = _fitted(derived.kernel)
    if modes is None:
        return found, derived
    return replace(found, lowering="recurrence"), replace(derived, modes=modes)


def with_modes(found: Convolution, derived: Filter, known: Modes | None) -> Filter:
    """The filter of a recurrence with its modes: those ``known``, in which the states are, or its own.

    Raises :class:`FilterGrew` where it has none: other weights, or more lags than the known ones were compared with.
    """
    modes = known if known is not None else _fitted(derived.kernel)
    if modes is None or not _hold(modes, derived.kernel):
        raise FilterGrew(found.name)
    return replace(derived, modes=modes)


def _fitted(kernel: Tensor) -> Modes | None:
    modes = fit_modes(kernel, _SHARE * _EPS)
    if modes is None:
        return None
    modes = Modes(*(part.to(kernel.device) for part in (modes.poles, modes.residues, modes.skip)))
    return modes if _hold(modes, kernel) else None


def _hold(modes: Modes, kernel: Tensor) -> bool:
    """Whether modes equal the filters [C, n] at all lags, and their recurrence loses little over as many steps.

    Both errors are compared with what a convolution in float32 may lose, ε·‖u‖₂·‖k‖₂.
    """
    norm = kernel.norm(dim=-1)
    allowed = _SHARE * _EPS * norm
    lost = torch.finfo(torch.float64).eps * modal_rounding(modes, kernel.shape[1])
    return bool((modal_error(modes, kernel) <= allowed).all()) and bool((lost <= allowed).all())
