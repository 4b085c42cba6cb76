"""Short filters on whole numbers: ids of the position before, and hashes of the last few.

``y[t] = head[t] + Σ_k h[k]·x[t - k]`` in int64, which wraps around as the model's own arithmetic does. An embedding of
such values is a token shift too, and so is a comparison with the id before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fi_compile.kernels.short_conv import short_conv_step
from fi_compile.passes.propose_consistency import Consistency
from fi_compile.program import Program, is_tensor
from fi_compile.proof import Proof
from fi_compile.units import Unit

from .convolution import LONGEST_WINDOW, layout_of, parameters_behind
from .layout import Layout
from .unit_function import UnitFunction
from .window import SLACK, write_newest


@dataclass(frozen=True)
class WholeFilter:
    """What was derived: ``kernel`` [C, n], lag 0 first, and ``head`` [C, n], what is added regardless of the input."""

    kernel: Tensor
    head: Tensor

    @property
    def lags(self) -> list[int]:
        """Lag 0, and those at which the filter is not zero."""
        return [0, *(self.kernel[:, 1:].any(0).nonzero()[:, 0] + 1).tolist()]


@dataclass(frozen=True)
class WholeNumbers:
    """A unit that is a channelwise causal filter of one value of whole numbers, ``support`` lags long."""

    program: Program = field(repr=False)
    unit: Unit = field(repr=False)
    x: fx.Node
    layout_in: Layout
    layout_out: Layout
    support: int
    depends_on: tuple[str, ...]

    kind = "short_conv"
    lowering = "window"
    verdict = "proved causal and linear; equals its filter on random integers over the whole capacity"
    source = None
    reference = None

    @property
    def name(self) -> str:
        """The name of the node whose value this makes."""
        return self.unit.exit.name

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The value it reads."""
        return (self.x,)

    def flatten(self, values: Sequence[Tensor]) -> Tensor:
        """The whole input as [B, C, n]."""
        return self.layout_in.flatten(values[0])

    def _function(self, values: Mapping[str, Tensor], length: int) -> Callable[[Tensor], Tensor]:
        """The unit on int64 [B, C, n]."""
        unit = UnitFunction(self.program, self.unit, self.x, self.layout_in, values, length)
        return lambda flat: self.layout_out.flatten(unit(self.layout_in.unflatten(flat)))

    def derive(self, values: Mapping[str, Tensor], length: int) -> WholeFilter:
        """The response to a one at position 0, and to zeros."""
        function = self._function(values, length)
        device = self.program.example.device
        flat = torch.zeros(1, self.layout_in.count, length, dtype=torch.int64, device=device)
        head = function(flat)[0]
        flat[..., 0] = 1
        return WholeFilter(function(flat)[0] - head, head)

    def holds(self, proof: Proof, values: Mapping[str, Tensor], capacity: int) -> bool:
        """Whether the unit equals its filter, no longer than it was, on random integers over the whole capacity.

        Both sides are linear over the integers modulo 2^64: where one entry of the two matrices differs by less than
        2^32, numbers drawn from 2^62 agree with a probability below 2^-29.
        """
        found = self.derive(values, capacity)
        if found.lags[-1] >= self.support:
            return False
        generator = torch.Generator().manual_seed(13)
        rows = 1 if self.layout_in.batch is None else 2
        flat = torch.randint(1 << 62, (rows, self.layout_in.count, capacity), generator=generator)
        flat = flat.to(found.head.device)
        expected = found.head.unsqueeze(0)
        for lag in found.lags:
            expected = expected + F.pad(flat, (lag, 0))[..., :capacity] * found.kernel[:, lag, None]
        return torch.equal(self._function(values, capacity)(flat), expected)


def recognise_whole_numbers(
    analysis: Consistency,
    unit: Unit,
    x: fx.Node,
    is_affine: Callable[[Unit, fx.Node], bool],
    capacity: int,
) -> WholeNumbers | None:
    """The filter of whole numbers that a unit may be: what :meth:`WholeNumbers.holds` is to be asked of.

    Everything between is int64, so that what the rules certify as linear is so modulo 2^64.
    """
    data = analysis.program.input_dependent
    between = [x, *(n for n in unit.nodes if n in data)]
    if any(not is_tensor(n) or n.meta["val"].dtype != torch.int64 for n in between):
        return None
    if any(n is not x and n in data for n in unit.reads) or not is_affine(unit, x):
        return None
    layouts = [layout_of(analysis, n, whole_numbers=True) for n in (x, unit.exit)]
    if None in layouts or layouts[0].count != layouts[1].count:  # type: ignore[union-attr]
        return None
    behind = parameters_behind(analysis.program, [n for n in unit.reads if n is not x])
    found = WholeNumbers(analysis.program, unit, x, *layouts, 1, behind)  # type: ignore[arg-type]
    support = found.derive(analysis.parameters, capacity).lags[-1] + 1
    return replace(found, support=support) if support <= LONGEST_WINDOW else None


@dataclass(frozen=True)
class WholeWindow:
    """Increment of a filter of whole numbers: the newest inputs, int64."""

    mixer: WholeNumbers

    needs = ("kernel", "lags", "head")

    @property
    def reads(self) -> int:
        """How many earlier positions a step reads among."""
        return self.mixer.support - 1

    @property
    def rows(self) -> int:
        """Rows of the ring."""
        return max(self.reads, 1) + SLACK

    def weights(self, found: Any, source: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """The filter at its lags [taps, C], these but the first [taps - 1], and what is added [m, C].

        From its last row on ``head`` stays the same.
        """
        head, lags = found.head, torch.tensor(found.lags, device=found.head.device)
        moves = (head != head[:, -1:]).any(0).nonzero()
        rows = int(moves[-1]) + 2 if moves.numel() else 1
        kept = {"kernel": found.kernel[:, lags].t(), "lags": lags[1:], "head": head[:, :rows].t()}
        return {name: tensor.contiguous() for name, tensor in kept.items()}

    def ring(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Inputs of no positions: zeros [R, B, C]."""
        return weights["head"].new_zeros(self.rows, batch, self.mixer.layout_in.count)

    def step(self, ring: Tensor, position: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The newest output [B, C] from x [B, C]; writes x into the ring."""
        head = weights["head"]
        y = short_conv_step(ring, position, x, weights["kernel"], lags=weights["lags"])
        return y + head.index_select(0, position.clamp(max=len(head) - 1))

    def fill(self, ring: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take over the newest of the inputs x [B, C, P] of positions 0 … P-1."""
        write_newest(ring, x)

    def cost(self, weights: Mapping[str, Tensor]) -> str:
        """Work of one step."""
        return f"{len(weights['kernel'])}·C multiply-adds"
