"""Tables of two sequence axes that depend on the lag alone: certified by rule, or by value over the capacity.

A mask or a decay is `D[t, j] = d(t - j)`. Such a table need not be held whole: its newest row says everything. By rule:
numbers; indices `c·(t - j) + …`; comparisons of indices by their difference; and every operator certified to make each
entry from the same entry of operands that are such tables, or have no sequence axis. Anything else is evaluated at the
capacity and compared with itself one position further on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fi_compile.facts import is_number
from fi_compile.passes.propose_consistency import Consistency
from fi_compile.program import as_expr, is_tensor, operator_name
from fi_compile.proof import Proof
from fi_compile.rules.affine import DECIDE, aligned, combine, exact
from fi_compile.twin import widen, widen_call
from fi_compile.units import run_unit

_MOST_ELEMENTS = 1 << 25
_ROUNDING = 1e-13  # of an entry: the same number computed at two places of a vector


class FollowsPosition(Exception):
    """A table depends on more than the lag."""


class LagTables:
    """The newest rows of tables at one capacity, for one version of the weights in double precision."""

    def __init__(
        self, analysis: Consistency, proof: Proof, values: Mapping[str, Tensor], capacity: int
    ) -> None:
        self.analysis, self.proof, self.values = analysis, proof, values
        self.program = analysis.program
        admitted = self.program.lengths.at_least(capacity)
        self.capacity = capacity if admitted is None else admitted
        self.batch = self.program.batch if isinstance(self.program.batch, int) else 1
        self.found: dict[tuple[fx.Node, int], Tensor] = {}

    def row(self, node: fx.Node, query: int) -> Tensor:
        """The newest row of a table whose dimension ``query`` is the later position: size 1 there.

        Raises :class:`FollowsPosition` where nothing certifies that the table depends on the lag alone.
        """
        if (node, query) not in self.found:
            try:
                if not self.proof.proved(node):
                    raise FollowsPosition(node.name)
                self.found[node, query] = self._by_rule(node, query)
            except FollowsPosition:
                self.found[node, query] = self._by_value(node, query)
        return self.found[node, query]

    def constant(self, node: fx.Node) -> Tensor:
        """A value without sequence axes."""
        return self._evaluated(node)

    def _evaluated(self, node: fx.Node) -> Tensor:
        example = self.program.example
        shape = (self.batch, self.capacity, *example.shape[2:])
        sequence = example.new_zeros((1,) * len(shape), dtype=widen(example.dtype)).expand(shape)
        with torch.no_grad():
            return self.program.evaluate(sequence, self.values, keep=[node], rewrite=widen_call)[node]

    def _axes(self, node: fx.Node) -> tuple[int, ...]:
        return self.analysis.axes[node].rows

    def _shape(self, node: fx.Node) -> list[int]:
        at = np.asarray([self.capacity])
        sizes = [as_expr(size) for size in node.meta["val"].shape]
        return [int(self.program.size_values(size, at, self.batch)[0]) for size in sizes]

    def _by_rule(self, node: fx.Node, query: int) -> Tensor:
        fact, value = self.proof.facts[node], node.meta["val"]
        shape = self._shape(node)
        shape[query] = 1
        if is_number(fact.fill):
            return torch.full(shape, fact.fill, dtype=widen(value.dtype), device=value.device)
        axes = self._axes(node)
        if fact.affine is not None and len(axes) == 2:
            steps = fact.affine.coefficients
            if steps[axes[0]] != -steps[axes[1]] or not isinstance(fact.affine.offset, (int, float)):
                raise FollowsPosition(node.name)
            row = torch.full(shape, fact.affine.offset, dtype=widen(value.dtype), device=value.device)
            for dim, step in enumerate(steps):
                first = self.capacity - 1 if dim == query else 0
                index = torch.arange(first, first + shape[dim], device=value.device).to(row.dtype)
                row = row + (step * index).to(row.dtype).view(
                    [-1 if d == dim else 1 for d in range(len(shape))]
                )
            return row
        if node.op != "call_function" or not self.proof.row_local(node) or len(axes) != 2:
            raise FollowsPosition(node.name)
        compared = self._compared(node, query)
        return self._of_operands(node, query) if compared is None else compared

    def _compared(self, node: fx.Node, query: int) -> Tensor | None:
        """A comparison of two indices that are affine in the positions, by their difference."""
        name = operator_name(node.target)
        if name not in DECIDE or len(node.args) != 2:
            return None
        rank = node.meta["val"].dim()
        forms = [
            aligned(self.proof.facts[a], rank) if isinstance(a, fx.Node) and is_tensor(a) else None
            for a in node.args
        ]
        a, b = forms
        if a is None or b is None:
            return None
        operands = [n for n in node.args if isinstance(n, fx.Node)]
        if any(len(self._axes(n)) == 2 for n in operands):
            return None
        tensors: list[Any] = [n.meta["val"] for n in operands]
        common = torch.promote_types(*(t.dtype for t in tensors))
        sizes = [np.asarray(n) for n in self._shape(node)]
        first, second = self._axes(node)
        difference = combine(a, b, -1)
        if (
            not all(exact(form, sizes, common) for form in (a, b))
            or difference.coefficients[first] != -difference.coefficients[second]
        ):
            raise FollowsPosition(node.name)
        given = []
        for operand in operands:
            value, missing = self._evaluated(operand), rank - operand.meta["val"].dim()
            for axis in self._axes(operand):
                if axis + missing == query:
                    value = value.narrow(axis, self.capacity - 1, 1)
            given.append(value)
        return node.target(*given)  # type: ignore[operator]

    def _of_operands(self, node: fx.Node, query: int) -> Tensor:
        env: dict[fx.Node, Any] = {}
        for operand in node.all_input_nodes:
            if not is_tensor(operand):
                continue
            axes = self._axes(operand)
            if not axes:
                env[operand] = self._evaluated(operand)
            elif len(axes) == 2:
                env[operand] = self.row(operand, self._turned(node, query, operand))
            else:
                raise FollowsPosition(node.name)
        lists = {axis: 1 if axis == query else self.capacity for axis in self._axes(node)}
        try:
            with torch.no_grad():
                row = run_unit(
                    self.program,
                    (node,),
                    env,
                    length=self.capacity,
                    batch=self.batch,
                    lists=lists,
                    rewrite=widen_call,
                )
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise FollowsPosition(node.name) from error
        expected = self._shape(node)
        expected[query] = 1
        if list(row.shape) != expected:
            raise FollowsPosition(node.name)
        return row

    def _turned(self, node: fx.Node, query: int, operand: fx.Node) -> int:
        """The dimension of an operand that runs along dimension ``query`` of the result: found by moving a row."""
        n = self.analysis.lengths[0]
        others = [o for o in node.all_input_nodes if is_tensor(o)]
        generator = torch.Generator().manual_seed(3)
        env = {o: scrambled(self.analysis.values[n][o], generator) for o in others}
        for axis in self._axes(operand):
            if moved_along(self.analysis, (node,), env, operand, axis, n) == query:
                return axis
        raise FollowsPosition(node.name)

    def _by_value(self, node: fx.Node, query: int) -> Tensor:
        axes = self._axes(node)
        if len(axes) != 2 or math.prod(self._shape(node)) > _MOST_ELEMENTS:
            raise FollowsPosition(node.name)
        table = self._evaluated(node)
        later, earlier = table, table
        for axis in axes:
            later, earlier = (
                later.narrow(axis, 1, later.shape[axis] - 1),
                earlier.narrow(axis, 0, earlier.shape[axis] - 1),
            )
        same = torch.equal(later, earlier) or (
            table.is_floating_point()
            and torch.allclose(later, earlier, rtol=_ROUNDING, atol=0.0, equal_nan=True)
        )
        if not same:
            raise FollowsPosition(node.name)
        return table.narrow(query, table.shape[query] - 1, 1)


def scrambled(value: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of a value's shape and dtype: from 0.5 to 1.5, or any bits."""
    if value.dtype == torch.bool:
        return torch.randint(0, 2, value.shape, generator=generator).bool().to(value.device)
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
    if value.is_floating_point() or value.is_complex():
        return (0.5 + noise).to(value)
    return (noise * 7).to(value)


def changed(value: Tensor, axis: int, row: int) -> Tensor:
    """A value with one row replaced by others."""
    value = value.clone()
    part = value.narrow(axis, row, 1)
    part.copy_(~part if value.dtype == torch.bool else part * 2 + 1)
    return value


def moved_along(
    analysis: Consistency,
    nodes: tuple[fx.Node, ...],
    env: Mapping[fx.Node, Any],
    operand: fx.Node,
    axis: int,
    length: int,
) -> int | None:
    """The sequence axis of the last node along which only one row moves when that row of an operand is replaced.

    None where none does, or more than one.
    """
    program, row = analysis.program, length // 2
    batch = (
        program.batch
        if isinstance(program.batch, int)
        else analysis.values[length][program.sequence].shape[0]
    )

    def run(given: Mapping[fx.Node, Any]) -> Tensor:
        with torch.no_grad():
            return run_unit(program, nodes, dict(given), length=length, batch=batch, rewrite=widen_call)

    try:
        before, after = run(env), run({**env, operand: changed(env[operand], axis, row)})
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None
    where = (before != after).nonzero()
    if not where.numel():
        return None
    found = [a for a in analysis.axes[nodes[-1]].rows if bool((where[:, a] == row).all())]
    return found[0] if len(found) == 1 else None
