"""Attention that looks back W positions at most: the group itself, run on the W newest keys.

Tables inside depend on the lag alone, and keys W or more positions back weigh exactly nothing (`bands.py`). So a row of
the group is the group's own row of W keys, whatever the position. Slots before position 0 are given the lag W, at which
nothing counts either. What is kept does not grow with the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fi_compile.passes.certify_reads import row_patterns, with_rows
from fi_compile.passes.propose_consistency import Consistency
from fi_compile.program import Program
from fi_compile.proof import Proof
from fi_compile.twin import widen, widen_call
from fi_compile.units import Unit, run_unit

from .bands import hides, reach_of
from .convolution import layout_of, parameters_behind
from .groups import Group, Operand, close, noise_of, query_axes
from .lag_tables import FollowsPosition, LagTables
from .layout import STATE_TYPE, Layout
from .window import SLACK, write_newest

_TOLERANCE = 1e-10


@dataclass(frozen=True)
class SlidingAttention:
    """A unit that is attention over the ``window`` newest positions, with what its step reads.

    ``operands``: queries and keys, in the order of the graph. ``queries``: of every value of two sequence axes inside,
    the dimension along the queries; -1 for the exit, which has none along keys.
    """

    program: Program = field(repr=False)
    analysis: Consistency = field(repr=False)
    proof: Proof = field(repr=False)
    unit: Unit = field(repr=False)
    operands: tuple[Operand, ...]
    layout_out: Layout
    queries: Mapping[fx.Node, int] = field(repr=False)
    window: int
    depends_on: tuple[str, ...]

    kind = "attention"
    lowering = "kv_ring"
    verdict = "proved that keys beyond its window weigh exactly nothing"
    source = None
    reference = None

    @property
    def name(self) -> str:
        """The name of the node whose value this makes."""
        return self.unit.exit.name

    @property
    def support(self) -> int:
        """How many positions it looks at."""
        return self.window

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What it reads of every position."""
        return tuple(o.node for o in self.operands)

    @property
    def channels(self) -> tuple[int, ...]:
        """How many channels each operand has."""
        return tuple(o.layout.count for o in self.operands)

    def flatten(self, values: Sequence[Tensor]) -> Tensor:
        """Whole values of the inputs, side by side: [B, C, n]."""
        flat = [o.layout.flatten(v) for o, v in zip(self.operands, values, strict=True)]
        batch = max(f.shape[0] for f in flat)
        dtype = flat[0].dtype
        for f in flat[1:]:
            dtype = torch.promote_types(dtype, f.dtype)
        return torch.cat([f.to(dtype).expand(batch, -1, -1) for f in flat], 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """How many channels each key has."""
        return tuple(o.layout.count for o in self.operands if not o.newest)

    def keys(self, x: Tensor) -> Tensor:
        """The channels of the keys among those of ``flatten``."""
        parts = zip(self.operands, x.split(self.channels, 1), strict=True)
        return torch.cat([part for o, part in parts if not o.newest], 1)

    def held_as(self, dtype: torch.dtype) -> torch.dtype:
        """The type that keys are kept in where the state is of ``dtype``: the model's own, or double precision."""
        own = self.operands[0].node.meta["val"].dtype
        for operand in self.operands:
            own = torch.promote_types(own, operand.node.meta["val"].dtype)
        return dtype if dtype == torch.float64 else own.to_real()

    @cached_property
    def group(self) -> Group:
        """The nodes and what enters them."""
        return Group(self.analysis, self.unit, None, self.analysis.lengths[0])

    def derive(self, values: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
        """The tables inside, float64, by name: those of two sequence axes at the lags W, W-1, …, 0."""
        tables = LagTables(self.analysis, self.proof, values, max(length, self.window + 1))
        found = {}
        for table in self.group.tables:
            if table in self.group.two_axes:
                row = tables.row(table, self.queries[table])
                key = self._keys(table)
                first = row.shape[key] - self.window - 1
                found[table.name] = row.narrow(key, first, self.window + 1).contiguous()
            else:
                found[table.name] = tables.constant(table)
        return found

    def _keys(self, node: fx.Node) -> int:
        (key,) = (a for a in self.analysis.axes[node].rows if a != self.queries[node])
        return key

    def holds(self, proof: Proof, values: Mapping[str, Tensor], capacity: int) -> bool:
        """Whether no position up to a capacity sees a key of lag W or more, on weights in double precision."""
        try:
            tables = LagTables(self.analysis, proof, values, capacity)
            rows = {t: tables.row(t, self.queries[t]) for t in self.group.two_axes}
            return hides(self.group, rows, self.queries, proof, self.window) and self._agrees(values)
        except (RuntimeError, IndexError, ValueError, TypeError, FollowsPosition):
            return False

    def _agrees(self, values: Mapping[str, Tensor]) -> bool:
        """Whether the step's rows equal the group's own on random operands: at the start, and beyond the window."""
        generator = torch.Generator().manual_seed(31)
        n = self.program.lengths.at_least(self.window + 5) or self.window + 5
        group = Group(self.analysis, self.unit, values, n)
        operands = [noise_of(group, o, generator) - 1 for o in self.operands]
        whole = self.layout_out.flatten(group.run(self.operands, operands))
        flat = self.flatten(operands)
        weights = self.derive(values, n)
        for t in dict.fromkeys((0, 1, self.window // 2, self.window - 1, self.window, n - 1)):
            slots = torch.arange(t - self.window + 1, t + 1, device=flat.device)
            keys = self.keys(flat).index_select(2, slots.clamp_min(0))
            found = self.row(flat[:, :, t], keys, slots >= 0, weights, double=True)
            if not close(found, whole[..., t], _TOLERANCE):
                return False
        return True

    def row(
        self, now: Tensor, keys: Tensor, there: Tensor, tables: Mapping[str, Tensor], *, double: bool
    ) -> Tensor:
        """The newest row [B, Cout] from the newest row of what is read [B, C] and W rows of the keys [B, Ckeys, W].

        ``there``: bool [W], whether a slot holds a position. ``tables`` are those of :meth:`derive`. ``double``:
        everything in double precision, as the twin computes it.
        """
        window = self.window
        slot = torch.arange(1, window + 1, device=now.device) * there
        env: dict[fx.Node, Any] = {}
        for table in self.group.tables:
            value = tables[table.name]
            env[table] = (
                value.index_select(self._keys(table), slot) if table in self.group.two_axes else value
            )
        past = iter(keys.split(self.widths, 1))
        for operand, newest in zip(self.operands, now.split(self.channels, 1), strict=True):
            layout, dtype = operand.layout, operand.node.meta["val"].dtype
            flat = newest.unsqueeze(-1) if operand.newest else next(past)
            flat = flat[:1] if layout.batch is None else flat
            env[operand.node] = layout.as_value(flat, widen(dtype) if double else dtype)
        batch = self.program.batch if isinstance(self.program.batch, int) else now.shape[0]
        for node in self.group.nodes:
            lists = {a: 1 if a == self.queries[node] else window for a in self.analysis.axes[node].rows}
            run_unit(
                self.program,
                (node,),
                env,
                length=window,
                batch=batch,
                lists=lists,
                rewrite=widen_call if double else None,
            )
        return self.layout_out.flatten(env[self.unit.exit])[..., 0]


def recognise_sliding(
    analysis: Consistency, unit: Unit, proof: Proof, values: Mapping[str, Tensor], capacity: int
) -> SlidingAttention | None:
    """The attention over few newest positions a group is, or None.

    Requires: ``unit`` with everything of two sequence axes inside; ``values``, weights in double precision.
    """
    group = Group(analysis, unit, None, analysis.lengths[0])
    layouts = [layout_of(analysis, n) for n in group.ones]
    layout_out = layout_of(analysis, unit.exit)
    known, data = analysis.consistent, analysis.program.input_dependent
    if (
        layout_out is None
        or not group.two_axes
        or (layout_out.batch is None and analysis.program.batch != 1)
        or not all(n in known or n.op == "placeholder" for n in (*group.boundary, unit.exit))
        or any(
            n.meta["val"].dtype == torch.float64
            for n in group.ones
            if unit.exit.meta["val"].dtype != torch.float64
        )
    ):
        return None
    operands = []
    for node, layout in zip(group.ones, layouts, strict=True):
        if layout is None or (layout.batch is None and node in data and layout_out.batch is not None):
            return None
        operands.append(Operand(node, layout, False))
    try:
        group = Group(analysis, unit, analysis.parameters, analysis.lengths[0])
        operands = tuple(_placed(group, o, operands) for o in operands)
        if all(o.newest for o in operands) or not any(o.newest for o in operands):
            return None
        queries = query_axes(group, operands, proof)
        queries[unit.exit] = analysis.axes[unit.exit].rows[0]
        tables = LagTables(analysis, proof, values, capacity)
        rows = {t: tables.row(t, queries[t]) for t in group.two_axes if t in queries}
        if len(rows) < len(group.two_axes):
            return None
        window = reach_of(group, rows, queries, proof)
    except (RuntimeError, IndexError, ValueError, TypeError, FollowsPosition):
        return None
    if window is None or 2 * (window + SLACK) > capacity:
        return None
    behind = parameters_behind(analysis.program, group.tables)
    return SlidingAttention(
        analysis.program, analysis, proof, unit, operands, layout_out, queries, window, behind
    )


def _placed(group: Group, operand: Operand, operands: Sequence[Operand]) -> Operand:
    """An operand, told whether only its newest row counts: no row of the exit moves when others are replaced."""
    generator = torch.Generator().manual_seed(37)
    values = [noise_of(group, o, generator) for o in operands]
    (time,) = group.analysis.axes[group.unit.exit].rows
    place = list(operands).index(operand)
    other = noise_of(group, operand, generator)
    before = group.run(operands, values)
    for chosen in row_patterns(group.length):
        mixed = [*values]
        mixed[place] = with_rows(values[place], other, operand.layout.axis, chosen)
        after = group.run(operands, mixed)
        kept = (~chosen).nonzero()[:, 0].to(before.device)
        if not torch.equal(after.index_select(time, kept), before.index_select(time, kept)):
            return operand
    return Operand(operand.node, operand.layout, True)


@dataclass(frozen=True)
class KeyRing:
    """What sliding attention reads of the newest positions: the rows [R, B, C] of queries and keys."""

    mixer: SlidingAttention

    @property
    def needs(self) -> tuple[str, ...]:
        """The tables inside."""
        return (STATE_TYPE, *(t.name for t in self.mixer.group.tables))

    @property
    def reads(self) -> int:
        """How many earlier positions a step reads."""
        return self.mixer.window - 1

    @property
    def rows(self) -> int:
        """Rows of the ring."""
        return self.mixer.window + SLACK

    def weights(
        self, found: Mapping[str, Tensor], source: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tables in their own types; where the state is float64, in double precision."""
        kept = {
            STATE_TYPE: torch.zeros(
                0, dtype=self.mixer.held_as(dtype), device=self.mixer.program.example.device
            )
        }
        for table in self.mixer.group.tables:
            own = table.meta["val"].dtype
            kept[table.name] = found[table.name].to(widen(own) if dtype == torch.float64 else own)
        return kept

    def ring(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Keys of no positions: zeros [R, B, C], C the channels of the keys."""
        return weights[STATE_TYPE].new_zeros(self.rows, batch, sum(self.mixer.widths))

    def step(self, ring: Tensor, position: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The newest output [B, Cout] from x [B, C], queries and keys; writes the keys into the ring."""
        size, window = ring.shape[0], self.mixer.window
        newest = self.mixer.keys(x).to(ring.dtype).unsqueeze(0)
        places = position + torch.arange(1 - window, 1, device=ring.device)
        keys = torch.cat([ring.index_select(0, places[:-1] % size), newest]).permute(1, 2, 0)
        out = self.mixer.row(x, keys, places >= 0, weights, double=ring.dtype == torch.float64)
        ring.index_copy_(0, position % size, newest)
        return out

    def fill(self, ring: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take over the newest keys of x [B, C, P], positions 0 … P-1."""
        write_newest(ring, self.mixer.keys(x))

    def cost(self, weights: Mapping[str, Tensor]) -> str:
        """Work of one step."""
        return f"one row against {self.mixer.window} rows"
