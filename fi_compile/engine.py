"""The pipeline for one model: trace → analyse → raise → split → schedule → lower, and what it leaves behind."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from .derive import Derived, derive
from .errors import CapacityError, Refusal, Unsupported
from .lane import Lane
from .lower import CompiledStep
from .mixers.convolution import recognise
from .mixers.stack import state_dtype
from .options import Options
from .passes.plan_demands import plan_demands
from .passes.propose_consistency import Consistency, agrees, propose_consistency
from .passes.raise_mixers import raise_mixers
from .program import Program, is_tensor
from .step import StepProgram
from .twin import twin_values, widen_call
from .units import Plan, take_row

log = logging.getLogger(__name__)


class Engine:
    """A program analysed and split, with its derived values and compiled steps.

    Shared by every decoder, fork and session of one model. ``capacity`` in the methods is a number of positions the
    derived filters and tables reach.
    """

    def __init__(self, program: Program, options: Options) -> None:
        self.program, self.options = program, options
        self.capacity = self._first_capacity()
        self.analysis: Consistency = propose_consistency(program)
        self.plan: Plan = plan_demands(
            self.analysis, lambda analysis, unit, x: recognise(analysis, unit, x, self.capacity)
        )
        self.check_step()
        self._derived: dict[tuple[int, int], Derived] = {}
        self._steps: dict[Any, CompiledStep] = {}
        self._raised: dict[int, Program] = {}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of state: float64 for a float64 model, else float32."""
        floats = [v.dtype for v in self.program.values.values() if v.is_floating_point()]
        return state_dtype(torch.float64 if torch.float64 in floats else torch.float32)

    @property
    def most(self) -> int | None:
        """The most positions a sequence may have, or None."""
        limits = [n for n in (self.options.max_length, self.program.lengths.maximum) if n is not None]
        return min(limits) if limits else None

    def _first_capacity(self) -> int:
        wanted, most = self.options.max_length, self.program.lengths.maximum
        if wanted is not None and most is not None and wanted > most:
            raise CapacityError(
                f"max_length={wanted} exceeds {most}, the longest sequence the model's tables and guards admit"
            )
        if wanted is not None:
            return wanted
        return min(self.options.capacity, most) if most is not None else self.options.capacity

    def derived(self, batch: int, capacity: int | None = None) -> Derived:
        """Filters and tables for a capacity, derived once per weight version."""
        capacity = capacity or self.capacity
        key = (batch if self.tables_have_batch else 0, capacity)
        if key not in self._derived:
            step = StepProgram(self.program, self.plan, capacity)
            values = dict(self.program.values)
            self._derived[key] = derive(
                step,
                values,
                twin_values(self.program),
                dtype=self.dtype,
                block=self.options.block,
                batch=batch,
            )
        return self._derived[key]

    @cached_property
    def tables_have_batch(self) -> bool:
        """Whether some table has one row per batch row."""
        return any(self.plan.batch_axes[node] for node in self.plan.tables)

    def raised(self, derived: Derived) -> Program:
        """The program with semantic nodes, its filters cut from the derived ones."""
        if id(derived) not in self._raised:
            self._raised[id(derived)] = raise_mixers(self.program, self.plan, derived.references)
        return self._raised[id(derived)]

    def step(self, lane: Lane) -> CompiledStep:
        """The compiled step for a lane; lanes whose tensors have equal shapes and strides share it."""
        key = lane.signature
        if key not in self._steps:
            self._steps[key] = CompiledStep(lane.derived.step, lane.tensors, self.options.step)
        return self._steps[key]

    def invalidate(self) -> None:
        """Forget what was derived from the weights."""
        self._derived.clear()
        self._raised.clear()

    def forward(self, sequence: Tensor, derived: Derived) -> tuple[list[Any], dict[str, Tensor]]:
        """One pass over a whole sequence: the flat outputs, and the values a lane is filled with."""
        program = self.raised(derived)
        wanted = {m.x.name for m in derived.step.mixers} | {n.name for n in self.plan.histories}
        taps = {name: program.nodes[name] for name in wanted}
        outputs = [o for o in program.outputs if isinstance(o, fx.Node)]
        with torch.no_grad():
            found = program.evaluate(sequence, keep=[*taps.values(), *outputs])
        flat = [found[o] if isinstance(o, fx.Node) else o for o in program.outputs]
        return flat, {name: found[node] for name, node in taps.items()}

    def check_step(self) -> None:
        """Decode the sampled sequence in double precision and compare every output at every position.

        Raises :class:`Unsupported` when the step program does not reproduce the model.
        """
        analysis = self.analysis
        n, values = analysis.longest, analysis.values[analysis.longest]
        step = StepProgram(self.program, self.plan, n)
        sequence = values[self.program.sequence]
        twin = derive(
            step,
            analysis.parameters,
            analysis.parameters,
            dtype=torch.float64,
            block=5,
            batch=sequence.shape[0],
            rewrite=widen_call,
        )
        lane = Lane(twin, sequence.shape[0])
        with torch.no_grad():
            for t in range(n):
                row = sequence[:, t : t + 1]
                found = lane.step(row, lambda tensors: step(tensors, widen_call))
                for node, value in zip(self.program.outputs, found, strict=True):
                    expected = self._expected(node, t)
                    if expected is not None and not agrees(value, expected, 1e-9):
                        raise Unsupported(
                            Refusal(
                                "internal",
                                f"the derived step disagrees with the model at position {t} of {node.name!r}",
                                (node.name,),
                                hint="please report this model: the analysis accepted a plan that is wrong",
                            )
                        )

    def _expected(self, node: Any, t: int) -> Tensor | None:
        if not is_tensor(node):
            return None
        axes = self.plan.axes[node]
        if axes:
            return take_row(self.analysis.values[self.analysis.longest][node], axes[0], t)
        return self.analysis.values.get(t + 1, {}).get(node)
