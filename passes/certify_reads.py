"""analyse: certify that a unit which reads only new rows of a value depends on no other row of it.

A plan is proposed on a few short samples, which cannot see a dependence further back than they are long, nor one
through a table that is zero there. Where every operator on the way is certified row by row nothing more is needed.
Else the unit itself is asked, on random input over a whole capacity: rows of the value are replaced in patterns such
that for every pair (t, j) some pattern replaces j and not t; a row that moves although it was not replaced depends
on another one. The patterns are the bits of the position and their complements: 2·log2(capacity) runs cover all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, fx

from fi_compile.passes.propose_consistency import Axes, Consistency, agrees
from fi_compile.program import Program, as_expr, is_getitem
from fi_compile.twin import random_sequence, widen, widen_call
from fi_compile.units import ALL, NEW, Demand, Unit, run_unit, take_row

_TOLERANCE = 1e-9
_ENOUGH_FOR_ONE = 200  # one operator on data alone treats all positions alike
_MOST_ELEMENTS = 1 << 26
_FEWEST_VALUES = 8  # that integers take in a trial


def certify_reads(
    analysis: Consistency,
    unit: Unit,
    capacity: int,
    values: Mapping[str, Tensor],
    is_affine: Callable[[Unit, fx.Node], bool],
) -> bool:
    """Whether the rows a unit reads are all its new row depends on, at every position up to ``capacity``.

    Requires: a plan that reproduces the samples. ``values``: the weights in double precision; ``is_affine(unit, x)``:
    whether every operator from x to the exit is certified affine. Ensures: True only if the unit is one operator, or
    affine in every value it reads (random input shows nothing of rare events behind a threshold),
    no replaced pattern of rows moved a row that was not replaced, and the plan's own rows equal the whole unit's at
    positions spread over the capacity. False also where that would take too much memory.
    """
    single = sum(_computes(node, analysis) for node in unit.nodes) == 1
    data = [n for n in unit.reads if n in analysis.program.input_dependent]
    if not single and not all(is_affine(unit, node) for node in data):
        return False
    trial = _Trial(analysis, unit, capacity, values, single)
    try:
        return trial.fits() and trial.is_local() and trial.reproduces()
    except IndexError:  # integers beyond the rows of a table
        return False


def _computes(node: fx.Node, analysis: Consistency) -> bool:
    """Whether a node is an operator on data, not the choice of one of its results."""
    return node in analysis.program.input_dependent and not is_getitem(node)


class _Trial:
    def __init__(
        self,
        analysis: Consistency,
        unit: Unit,
        capacity: int,
        values: Mapping[str, Tensor],
        single: bool,
    ) -> None:
        self.analysis, self.unit = analysis, unit
        self.program: Program = analysis.program
        data = self.program.input_dependent
        moving = [n for n in unit.reads if analysis.axes[n].rows]
        self.data = [n for n in unit.reads if n in data]
        tables = [n for n in moving if n not in data]
        wanted = min(capacity, _ENOUGH_FOR_ONE) if single and not tables else capacity
        admitted = self.program.lengths.at_least(max(wanted, analysis.longest))
        self.length = admitted if admitted is not None else analysis.longest
        self.batch = self.program.batch if isinstance(self.program.batch, int) else 2
        self.values = values
        own = analysis.axes[unit.exit]
        self.channels = [
            d for d in range(unit.exit.meta["val"].dim()) if d not in own.rows and d not in own.batch
        ]

    def axes(self, node: fx.Node) -> Axes:
        return self.analysis.axes[node]

    def fits(self) -> bool:
        """Whether the largest value inside stays within memory."""
        at = np.asarray([self.length])
        for node in (*self.unit.nodes, *self.unit.reads):
            val = node.meta.get("val")
            if isinstance(val, Tensor):
                sizes = [self.program.size_values(as_expr(s), at, self.batch)[0] for s in val.shape]
                if math.prod(int(s) for s in sizes) > _MOST_ELEMENTS:
                    return False
        return True

    def inputs(self, seed: int) -> dict[fx.Node, Tensor]:
        """Whole values of the unit's inputs: data at random, the rest as it is."""
        sequence = random_sequence(self.program, self.batch, 1, seed=seed)
        sequence = sequence.expand(-1, self.length, *sequence.shape[2:])
        fixed = [n for n in self.unit.reads if n not in self.data]
        env = self.program.evaluate(sequence, self.values, keep=fixed, rewrite=widen_call)
        generator = torch.Generator().manual_seed(seed)
        for node in self.data:
            env[node] = self._random(node, generator)
        return env

    def _random(self, node: fx.Node, generator: torch.Generator) -> Tensor:
        val = node.meta["val"]
        at = np.asarray([self.length])
        shape = [int(self.program.size_values(as_expr(s), at, self.batch)[0]) for s in val.shape]
        seen = self.analysis.values[self.analysis.longest][node]
        if val.is_floating_point() or val.is_complex():
            noise = torch.randn(shape, generator=generator, dtype=widen(val.dtype))
            return noise.to(seen.device)
        if val.dtype is torch.bool:
            low, high = 0, 1
        else:  # values that the sample never had count too: a flag of a rare token is zero in all of it
            low, high = int(seen.min()), int(seen.max())
            high = max(high, low + _FEWEST_VALUES - 1)
        return torch.randint(low, high + 1, shape, generator=generator).to(seen)

    def whole(self, env: dict[fx.Node, Tensor]) -> Tensor:
        with torch.no_grad():
            return run_unit(
                self.program,
                self.unit.nodes,
                dict(env),
                length=self.length,
                batch=self.batch,
                rewrite=widen_call,
            )

    def is_local(self) -> bool:
        """No row moves when others are replaced, in any operand of which only the new row is read."""
        exit_axes = self.axes(self.unit.exit).rows
        new_exit = [a for a, kind in zip(exit_axes, self.unit.demand, strict=True) if kind == NEW]
        env, other = self.inputs(1), self.inputs(2)
        before = self.whole(env)
        for node in self.data:
            kinds: Demand = self.unit.reads[node]
            for axis, kind in zip(self.axes(node).rows, kinds, strict=True):
                if kind == ALL:
                    continue
                if len(new_exit) != 1:
                    return False
                for chosen in row_patterns(self.length):
                    mixed = with_rows(env[node], other[node], axis, chosen)
                    after = self.whole({**env, node: mixed})
                    kept = (~chosen).nonzero()[:, 0]
                    if not agrees(
                        after.index_select(new_exit[0], kept),
                        before.index_select(new_exit[0], kept),
                        _TOLERANCE,
                        apart=self.channels,
                    ):
                        return False
        return True

    def reproduces(self) -> bool:
        """The plan's rows equal the whole unit's at positions spread over the length."""
        env = self.inputs(3)
        whole = self.whole(env)
        n = self.length
        spread = {0, 1, n // 3, n // 2, n - 2, n - 1, *(2**i for i in range(n.bit_length()) if 2**i < n)}
        generator = torch.Generator().manual_seed(4)
        spread |= {int(t) for t in torch.randint(0, n, (16,), generator=generator)}
        return all(self._agrees_at(t, env, whole) for t in sorted(spread) if 0 <= t < n)

    def _agrees_at(self, t: int, env: dict[fx.Node, Tensor], whole: Tensor) -> bool:
        given = {node: self._given(node, d, t, env[node]) for node, d in self.unit.reads.items()}
        exit_axes = self.axes(self.unit.exit).rows
        pairs = list(zip(exit_axes, self.unit.demand, strict=True))
        lists = {a: 1 if kind == NEW else self.length for a, kind in pairs}
        try:
            with torch.no_grad():
                found = run_unit(
                    self.program,
                    self.unit.nodes,
                    given,
                    length=1 if self.unit.binding == "row" else self.length,
                    batch=self.batch,
                    lists=lists if self.unit.binding == "axis" else None,
                    rewrite=widen_call,
                )
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        expected = whole
        for axis, kind in pairs:
            if kind == NEW:
                expected = take_row(expected, axis, t)
                if self.unit.binding == "region":
                    found = take_row(found, axis, t)
        return agrees(found, expected, _TOLERANCE, whole, self.channels)

    def _given(self, node: fx.Node, demand: Demand, t: int, value: Tensor) -> Tensor:
        for axis, kind in zip(self.axes(node).rows, demand, strict=True):
            if kind == NEW:
                value = take_row(value, axis, t)
        return value


def row_patterns(length: int) -> list[Tensor]:
    """Bool [length] masks, by the bits of a position: of any two positions some mask holds one and not the other."""
    positions = torch.arange(length)
    bits = [(positions >> b) & 1 == 1 for b in range(max(length - 1, 1).bit_length())]
    return [pattern for bit in bits for pattern in (bit, ~bit)]


def with_rows(value: Tensor, other: Tensor, axis: int, chosen: Tensor) -> Tensor:
    """The value with the chosen rows along an axis taken from another."""
    shape = [1] * value.dim()
    shape[axis] = -1
    return torch.where(chosen.view(shape).to(value.device), other, value)
