"""A group: values over pairs of positions between an exit of one sequence axis and what enters, as a function.

What enters are values of one sequence axis (operands), read at the newest position (queries) or at all so far (keys),
and tables. The function can be run whole, or on the newest row of the queries alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fi_compile.facts import is_number
from fi_compile.passes.propose_consistency import Consistency
from fi_compile.program import is_tensor
from fi_compile.proof import Proof
from fi_compile.twin import widen, widen_call
from fi_compile.units import Unit, run_unit

from .lag_tables import FollowsPosition, changed, scrambled
from .layout import Layout

TOLERANCE = 1e-11  # of what the twin sums in double precision


@dataclass(frozen=True)
class Operand:
    """A value of one sequence axis that enters the group.

    ``letters``: of the channels whose size is not 1. ``newest``: read at the newest position (a query). ``factor``: the
    operator that scales the scores by it in a way not linear in it, such as a division. ``sign``: 1 or -1 where
    it is an exponent: in the products it stands for ``exp(sign · value)``.
    """

    node: fx.Node
    layout: Layout
    newest: bool
    letters: str = ""
    factor: fx.Node | None = None
    sign: int = 0

    def canonical(self, value: Tensor) -> Tensor:
        """A value of this operand's own layout as [B, …letters, n]."""
        flat = self.layout.flatten(value)
        return flat.reshape(flat.shape[0], *(n for n in self.layout.channels if n != 1), flat.shape[-1])

    def read(self, value: Tensor) -> Tensor:
        """What the node's value stands for in the products, or the logarithm of that for an exponent: [B, C, n]."""
        if self.sign:
            return self.sign * self.layout.flatten(value)
        return self.layout.flatten(
            value if self.factor is None else score_scale(self.factor, self.node, value)
        )


def score_scale(factor: fx.Node, by: fx.Node, value: Tensor) -> Tensor:
    """What ``factor`` multiplies one score by."""
    rank = factor.meta["val"].dim()

    def argument(node: fx.Node) -> Tensor:
        return value if node is by else value.new_ones([1] * rank)

    args, kwargs = fx.map_arg((factor.args, factor.kwargs), argument)
    return factor.target(*args, **kwargs)  # type: ignore[operator]


class Group:
    """F at one length, on given weights: its nodes as a function of operands and tables.

    ``operands``: the values of one sequence axis that enter as operands; None: all of them.
    """

    def __init__(
        self,
        analysis: Consistency,
        unit: Unit,
        values: Mapping[str, Tensor] | None,
        length: int,
        operands: Collection[fx.Node] | None = None,
    ) -> None:
        self.analysis, self.unit, self.length = analysis, unit, length
        self.program = program = analysis.program
        data = program.input_dependent
        self.nodes = tuple(n for n in unit.nodes if n in data)
        inside = set(self.nodes)
        outside = [a for n in self.nodes for a in n.all_input_nodes if is_tensor(a) and a not in inside]
        self.boundary = tuple(dict.fromkeys(outside))
        self.ones = tuple(
            n
            for n in self.boundary
            if len(analysis.axes[n].rows) == 1 and (operands is None or n in operands)
        )
        self.tables = tuple(n for n in self.boundary if n not in self.ones)
        self.batch = program.batch if isinstance(program.batch, int) else 2
        self.factors: dict[fx.Node, fx.Node] = {}
        self.given = {} if values is None else self._given(values)

    def _given(self, values: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        example = self.program.example
        shape = (self.batch, self.length, *example.shape[2:])
        sequence = example.new_zeros((1,) * len(shape), dtype=widen(example.dtype)).expand(shape)
        with torch.no_grad():
            return self.program.evaluate(sequence, values, keep=self.tables, rewrite=widen_call)

    @property
    def two_axes(self) -> tuple[fx.Node, ...]:
        """The tables of two sequence axes."""
        return tuple(t for t in self.tables if len(self.analysis.axes[t].rows) == 2)

    def run(
        self,
        operands: Sequence[Operand],
        values: Sequence[Tensor],
        tables: Mapping[fx.Node, Tensor] | None = None,
        queries: Mapping[fx.Node, int] | None = None,
    ) -> Tensor:
        """The exit's value; see :meth:`values`."""
        return self.values(operands, values, tables, queries)[self.unit.exit]

    def values(
        self,
        operands: Sequence[Operand],
        values: Sequence[Tensor],
        tables: Mapping[fx.Node, Tensor] | None = None,
        queries: Mapping[fx.Node, int] | None = None,
    ) -> dict[fx.Node, Any]:
        """All values inside. ``values`` are what the operands stand for in the products, each in its layout.

        ``queries``: the dimension of each node along which there is one row, the newest.
        """
        env: dict[fx.Node, Any] = {**self.given, **(tables or {})}
        scale: dict[fx.Node, Tensor] = {}
        for operand, value in zip(operands, values, strict=True):
            if operand.sign:
                env[operand.node] = operand.sign * value.log()
            elif operand.factor is None:
                env[operand.node] = value
            else:
                scale[operand.factor] = value
        with torch.no_grad():
            for node in self.nodes:
                if node in scale:
                    (scores,) = (a for a in node.all_input_nodes if a in self.nodes)
                    env[node] = env[scores] * scale[node]
                    continue
                lists = None
                if queries is not None:
                    axes = self.analysis.axes[node].rows if is_tensor(node) else ()
                    lists = {a: 1 if a == queries.get(node) else self.length for a in axes}
                run_unit(
                    self.program,
                    (node,),
                    env,
                    length=self.length,
                    batch=self.batch,
                    lists=lists,
                    rewrite=widen_call,
                )
        return env


def uniform_tables(group: Group, proof: Proof) -> dict[fx.Node, Tensor]:
    """The tables of two axes that are certified to be one number, as that number."""
    fills = {t: proof.facts[t].fill for t in group.two_axes if t in proof.facts}
    return {
        t: torch.full(
            [1] * t.meta["val"].dim(), fill, dtype=widen(t.meta["val"].dtype), device=t.meta["val"].device
        )
        for t, fill in fills.items()
        if is_number(fill)
    }


def random_tables(group: Group, proof: Proof, generator: torch.Generator) -> dict[fx.Node, Tensor]:
    """Random numbers for the other tables of two axes."""
    uniform = uniform_tables(group, proof)
    return {t: scrambled(group.given[t], generator) for t in group.two_axes if t not in uniform}


def noise_of(group: Group, operand: Operand, generator: torch.Generator, n: int | None = None) -> Tensor:
    """Random values of an operand, from 0.5 to 1.5: nothing cancels."""
    batch = group.batch if operand.layout.batch is not None else 1
    shape = (batch, operand.layout.count, group.length if n is None else n)
    flat = 0.5 + torch.rand(shape, dtype=torch.float64, generator=generator)
    return operand.layout.unflatten(flat.to(group.program.example.device))


def canonical(operands: Sequence[Operand], values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys as [B, …letters, n], all of one batch."""
    shaped = [o.canonical(v) for o, v in zip(operands, values, strict=True)]
    batch = max(v.shape[0] for v in shaped)
    shaped = [v.expand(batch, *v.shape[1:]) for v in shaped]
    return (
        [v for o, v in zip(operands, shaped, strict=True) if o.newest],
        [v for o, v in zip(operands, shaped, strict=True) if not o.newest],
    )


def query_axes(group: Group, operands: Sequence[Operand], proof: Proof) -> dict[fx.Node, int]:
    """Of every value inside, the dimension that runs along the queries; -1 where none does.

    One row of the queries, or of the keys, is replaced: a value moves in that row only, of the one or the other
    dimension. A table's row moves the same row of the exit if it is a query's. Raises :class:`FollowsPosition` where
    that is not so.
    """
    if not all(map(is_tensor, group.nodes)):
        raise FollowsPosition(group.unit.exit.name)
    generator = torch.Generator().manual_seed(29)
    tables = random_tables(group, proof, generator)
    values = [noise_of(group, o, generator) for o in operands]
    row = group.length // 2
    axes = {n: group.analysis.axes[n].rows for n in (*group.nodes, *tables)}
    (time,) = axes[group.unit.exit]
    before = group.values(operands, values, tables)

    def moved(node: fx.Node, after: Tensor) -> int | None:
        where = (after != before[node]).nonzero()
        along = [a for a in axes[node] if where.numel() and bool((where[:, a] == row).all())]
        return along[0] if len(along) == 1 else None

    result: dict[fx.Node, int] = {}
    for newest in (True, False):
        other = [
            changed(v, o.layout.axis, row) if o.newest == newest else v
            for o, v in zip(operands, values, strict=True)
        ]
        after = group.values(operands, other, tables)
        for node in group.nodes:
            axis = moved(node, after[node])
            if axis is not None:
                others = (a for a in axes[node] if a != axis)
                result.setdefault(node, axis if newest else next(others, -1))
    for table, value in tables.items():
        for axis in axes[table]:
            trial = {**tables, table: changed(value, axis, row)}
            if moved(group.unit.exit, group.run(operands, values, trial)) == time:
                result[table] = axis
    if not all(n in result for n in (*group.nodes, *tables)):
        raise FollowsPosition(group.unit.exit.name)
    return result


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two values agree to a share of the largest entry."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return False
    if not found.numel():
        return True
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
