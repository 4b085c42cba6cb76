"""Running products, maxima, minima, log-sum-exps and counts: scans by an associative operator, with one row of state.

Each row is ``combine(the row before, the newest input)``, by the operator's own definition: nothing has to be fitted or
compared. States are float64, so that a step rounds no more than the operator's own loop does; those of integers and
flags are int64, and wrap around where the operator does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fi_compile.passes.propose_consistency import Consistency
from fi_compile.program import Program, is_getitem, is_tensor, operator_name
from fi_compile.proof import Proof
from fi_compile.units import Unit

from .convolution import layout_of
from .layout import STATE_TYPE, Layout
from .window import SLACK, write_newest

_WIDEST = 1 << 16  # channels of which few rows are kept


@dataclass(frozen=True)
class Operator:
    """An associative operator: how one more row enters, and the scan of all rows [B, C, n] along the last axis.

    Both give the parts of the state, each [B, C] or [B, C, n]: the running value, and for an extremum its position.
    """

    lowering: str
    combine: Callable[[Sequence[Tensor], Tensor, Tensor], tuple[Tensor, ...]]
    scan: Callable[[Tensor], tuple[Tensor, ...]]


def _extremum(wins: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Of equal values the latest counts; NaN stays."""

    def combine(state: Sequence[Tensor], x: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        taken = wins(x, state[0]) | x.isnan()
        return torch.where(taken, x, state[0]), torch.where(taken, position.to(x.dtype), state[1])

    return combine


OPERATORS = {
    "cumsum": Operator("running_sum", lambda state, x, position: (state[0] + x,), lambda x: (x.cumsum(-1),)),
    "cumprod": Operator(
        "running_product", lambda state, x, position: (state[0] * x,), lambda x: (x.cumprod(-1),)
    ),
    "logcumsumexp": Operator(
        "running_logsumexp",
        lambda state, x, position: (torch.logaddexp(state[0], x),),
        lambda x: (x.logcumsumexp(-1),),
    ),
    "cummax": Operator("running_max", _extremum(torch.ge), lambda x: tuple(x.cummax(-1))),
    "cummin": Operator("running_min", _extremum(torch.le), lambda x: tuple(x.cummin(-1))),
}


@dataclass(frozen=True)
class Fold:
    """A unit that is the scan of one value by an associative operator; ``part``: which of its results."""

    program: Program = field(repr=False)
    unit: Unit = field(repr=False)
    x: fx.Node
    operator: str
    part: int
    layout_in: Layout
    layout_out: Layout

    kind = "scan"
    verdict = "proved causal; the operator's definition is its recurrence"
    support = None
    source = None
    reference = None
    depends_on = ()

    @property
    def name(self) -> str:
        """The name of the node whose value this makes."""
        return self.unit.exit.name

    @property
    def lowering(self) -> str:
        """The operator, in words."""
        return OPERATORS[self.operator].lowering

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The value it reads."""
        return (self.x,)

    def flatten(self, values: Sequence[Tensor]) -> Tensor:
        """The whole input as [B, C, n]."""
        return self.layout_in.flatten(values[0])

    def derive(self, values: Mapping[str, Tensor], length: int) -> None:
        """Nothing depends on the weights."""

    def holds(self, proof: Proof, values: Mapping[str, Tensor], capacity: int) -> bool:
        """Always: the operator's definition is its recurrence."""
        return True


def recognise_fold(analysis: Consistency, unit: Unit) -> Fold | None:
    """The scan a unit is, if it is one associative operator along the sequence and nothing more."""
    scan, part = unit.nodes[0], 0
    name = operator_name(scan.target)
    if name not in OPERATORS or len(unit.nodes) > 2 or len(unit.reads) != 1 or not scan.all_input_nodes:
        return None
    (x,) = unit.reads
    if scan.all_input_nodes != [x] or x not in analysis.program.input_dependent:
        return None
    if len(unit.nodes) == 2:
        if not is_getitem(unit.exit):
            return None
        part = int(unit.exit.args[1])  # type: ignore[arg-type]
    layout = layout_of(analysis, x, whole_numbers=True)
    dim = scan.kwargs.get("dim", scan.args[1] if len(scan.args) > 1 else None)
    if (
        layout is None
        or layout.complex
        or not isinstance(dim, int)
        or dim % x.meta["val"].dim() != layout.axis
        or not is_tensor(unit.exit)
        or tuple(unit.exit.meta["val"].shape) != tuple(x.meta["val"].shape)
        or analysis.axes[unit.exit].batch != analysis.axes[x].batch
        or not _keeps_its_kind(scan, x, name)
    ):
        return None
    return Fold(analysis.program, unit, x, name, part, layout, layout)


def _keeps_its_kind(scan: fx.Node, x: fx.Node, name: str) -> bool:
    """Whether numbers stay floating, or whole: no cast inside the operator rounds what a state would not.

    Sums of floating numbers are filters, constant ones, which :mod:`fi_compile.mixers.convolution` finds.
    """
    entering = x.meta["val"].dtype
    floating, dtype = entering.is_floating_point, scan.kwargs.get("dtype")
    cast = isinstance(dtype, torch.dtype) and (
        dtype.is_floating_point != floating or (floating and torch.promote_types(entering, dtype) != dtype)
    )
    return not cast and not (floating and name == "cumsum")


@dataclass(frozen=True)
class RunningFold:
    """Increment of a fold: its states [B, parts, C] after the newest positions."""

    mixer: Fold

    needs = (STATE_TYPE,)
    reads = 1

    @property
    def rows(self) -> int:
        """Rows of the ring: fewer where a row is wide."""
        return 1 + min(SLACK, max(7, _WIDEST // self.mixer.layout_in.count))

    def weights(self, found: Any, source: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """An empty tensor of the state's type."""
        device = self.mixer.program.example.device
        kept = torch.float64 if self.mixer.x.meta["val"].is_floating_point() else torch.int64
        return {STATE_TYPE: torch.zeros(0, dtype=kept, device=device)}

    def ring(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """States of no positions: [R, B, parts·C], float64 or int64; what they hold is never read."""
        parts = 2 if self.mixer.operator in ("cummax", "cummin") else 1
        return weights[STATE_TYPE].new_zeros(self.rows, batch, parts * self.mixer.layout_in.count)

    def step(self, ring: Tensor, position: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The newest output [B, C] from x [B, C]; writes the new state into the ring."""
        size, channels = ring.shape[0], x.shape[1]
        state = ring.index_select(0, (position - 1) % size)[0].split(channels, 1)
        x = x.to(ring.dtype)
        found = OPERATORS[self.mixer.operator].combine(state, x, position)
        first = (x, torch.zeros_like(x))
        new = [torch.where(position == 0, a, b) for a, b in zip(first, found, strict=False)]
        ring.index_copy_(0, position % size, torch.cat(new, 1).unsqueeze(0))
        return self._typed(new[self.mixer.part])

    def _typed(self, out: Tensor) -> Tensor:
        """Positions are integers."""
        return out.to(torch.int64) if self.mixer.part else out

    def fill(self, ring: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take over the states after the inputs x [B, C, P] of positions 0 … P-1."""
        parts = OPERATORS[self.mixer.operator].scan(x.to(ring.dtype))
        write_newest(ring, torch.cat([p.to(ring.dtype) for p in parts], 1))

    def cost(self, weights: Mapping[str, Tensor]) -> str:
        """Work of one step."""
        return "C operations"
