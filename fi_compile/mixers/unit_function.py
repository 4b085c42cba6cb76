"""A unit as a plain function of one of its inputs: what a mixer is recognised and derived by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fi_compile.program import Program
from fi_compile.twin import widen, widen_call
from fi_compile.units import Unit, run_unit

from .layout import Layout


class UnitFunction:
    """A unit as a function of one of its inputs, at one length, in double precision."""

    def __init__(
        self,
        program: Program,
        unit: Unit,
        x: fx.Node,
        layout: Layout,
        values: Mapping[str, Tensor],
        length: int,
    ) -> None:
        self.program, self.unit, self.x, self.layout, self.length = program, unit, x, layout, length
        self.values = values
        self.device = program.example.device
        self._fixed: dict[int, dict[fx.Node, Tensor]] = {}

    def fixed(self, batch: int) -> dict[fx.Node, Tensor]:
        """The values of the other inputs, none of which depends on the sequence."""
        if batch not in self._fixed:
            example = self.program.example
            shape = (batch, self.length, *example.shape[2:])
            sequence = example.new_zeros((1,) * len(shape), dtype=widen(example.dtype)).expand(shape)
            others = [n for n in self.unit.reads if n is not self.x]
            self._fixed[batch] = self.program.evaluate(sequence, self.values, keep=others, rewrite=widen_call)
        return self._fixed[batch]

    def zeros(self, batch: int) -> Tensor:
        """A zero input of ``batch`` rows."""
        return self.layout.zeros(batch, self.length, torch.float64, self.device)

    def __call__(self, value: Tensor) -> Tensor:
        """The unit's value for an input."""
        batch = value.shape[self.layout.batch] if self.layout.batch is not None else 1
        env = {**self.fixed(batch), self.x: value}
        with torch.no_grad():
            return run_unit(
                self.program, self.unit.nodes, env, length=self.length, batch=batch, rewrite=widen_call
            )
