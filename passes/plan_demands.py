"""analyse, second half: find for every value the rows of its inputs that one new row of it needs.

Demands flow from the outputs back. A unit is one consistent operator, or a region: a consistent exit with its
backward closure through inconsistent nodes. For each unit the cheapest demand that reproduces the twin's rows in
the fixed-shape form a step runs in is accepted; all rows, then narrow, is always there. What is demanded whole
becomes a history, unless a mixer recognises the unit and brings an increment of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fi_compile.errors import Refusal, Unsupported
from fi_compile.passes.order_reads import order_reads, other_rows_count, sufficient
from fi_compile.passes.propose_consistency import Consistency, agrees, explain_inconsistency
from fi_compile.program import Program, is_tensor, source_of
from fi_compile.twin import widen_call
from fi_compile.units import ALL, NEW, Demand, Plan, Unit, closure, run_unit, take_row, zero_tail

Recognise = Callable[[Consistency, Unit, Sequence[fx.Node]], Any]
RecogniseUnit = Callable[[Consistency, Unit], Any]
_TOLERANCE = 1e-9
_MOST_ABSORBED = 12


def plan_demands(
    analysis: Consistency,
    recognise: Recognise,
    is_local: Callable[[fx.Node], bool],
    certify: Callable[[Unit], bool],
    recognise_group: RecogniseUnit = lambda analysis, unit: None,
    recognise_operator: RecogniseUnit = lambda analysis, unit: None,
    is_by_entry: Callable[[fx.Node], bool] = lambda node: False,
) -> Plan:
    """Plan one step: which units run, what they read, and what is kept.

    Requires: the consistency of the program's nodes. Ensures: every output's newest row is computed by the units
    from the new row of the sequence, histories, tables and the mixers' own states.
    ``recognise(analysis, unit, inputs)`` returns the increment of a unit that needs the whole of these values, one or
    two, or None;
    ``recognise_group(analysis, unit)`` that of a unit with all values of two sequence axes behind its exit, or of a
    region without any, or None;
    ``recognise_operator(analysis, unit)`` that of a unit for which its operators alone decide, or None;
    ``is_local(node)`` says whether an operator is certified to make each row from the same rows of its arguments;
    ``is_by_entry(node)`` whether it makes each entry from those in the same place;
    ``certify(unit)`` settles what no operator's rule does. Raises :class:`Unsupported` when an output is not
    consistent.
    """
    return _Planner(
        analysis, recognise, is_local, certify, recognise_group, recognise_operator, is_by_entry
    ).plan()


class _Planner:
    def __init__(
        self,
        analysis: Consistency,
        recognise: Recognise,
        is_local: Callable[[fx.Node], bool],
        certify: Callable[[Unit], bool],
        recognise_group: RecogniseUnit,
        recognise_operator: RecogniseUnit,
        is_by_entry: Callable[[fx.Node], bool],
    ) -> None:
        self.analysis = analysis
        self.recognise, self.recognise_group = recognise, recognise_group
        self.recognise_operator = recognise_operator
        self.is_local, self.is_by_entry = is_local, is_by_entry
        self.certify = certify
        self.program: Program = analysis.program
        self.n = analysis.longest
        self.values = analysis.values[self.n]
        self.batch = self.values[self.program.sequence].shape[0]
        self.positions = [length - 1 for length in analysis.lengths]
        self.positions += [0, self.n // 2] if self.n > 4 else [0]
        self.demands: dict[fx.Node, set[Demand]] = {}
        self.units: list[Unit] = []
        self.histories: set[fx.Node] = set()
        self.tables: dict[fx.Node, set[Demand]] = {}

    def plan(self) -> Plan:
        for output in self.program.outputs:
            if is_tensor(output):
                self.want(output, self.output_demand(output))
        for node in reversed(list(self.program.graph.nodes)):
            for demand in sorted(self.demands.get(node, ())):
                self.units.append(self.unit(node, demand))
        units = tuple(reversed(self.units))
        return Plan(
            units,
            tuple(n for n in self.program.graph.nodes if n in self.histories),
            {node: frozenset(kinds) for node, kinds in self.tables.items()},
            self.program.outputs,
            {node: axes.rows for node, axes in self.analysis.axes.items()},
            {node: axes.batch for node, axes in self.analysis.axes.items()},
            tuple(u for u in units if u.mixer is None and not self.by_rule(u)),
        )

    def rows(self, node: fx.Node) -> tuple[int, ...]:
        return self.analysis.axes[node].rows

    def is_data(self, node: fx.Node) -> bool:
        return node in self.program.input_dependent

    def output_demand(self, node: fx.Node) -> Demand:
        axes = self.analysis.axes[node]
        if node in self.analysis.consistent and len(axes.rows) <= 1:
            return (NEW,) * len(axes.rows)
        if node in self.analysis.consistent:
            raise Unsupported(
                Refusal(
                    "output",
                    f"the output {node.name!r} has {len(axes.rows)} sequence axes: it has no newest row",
                    (node.name,),
                    source_of(node),
                    "return it only outside decoding",
                )
            )
        if not axes.rows and axes.fixed and self.is_newest(node):
            return ()
        raise Unsupported(explain_inconsistency(self.analysis))

    def is_newest(self, node: fx.Node) -> bool:
        """Whether a value without a sequence axis is a function of the newest rows of consistent values."""
        nodes, inputs = closure(node, self.analysis.consistent)
        unit = Unit(node, (), nodes, {i: (NEW,) * len(self.rows(i)) for i in inputs if is_tensor(i)})
        return all(len(self.rows(i)) <= 1 for i in unit.reads) and self.reproduces(unit)

    def want(self, node: fx.Node, demand: Demand) -> None:
        """Record that a unit reads these rows of a value, and see that they will be there."""
        axes = self.rows(node)
        if not self.is_data(node) and len(axes) <= 1:
            self.tables.setdefault(node, set()).add(demand)
            return
        if len(axes) == 1 and demand == (ALL,):
            self.histories.add(node)
            demand = (NEW,)
        if node is not self.program.sequence:
            self.demands.setdefault(node, set()).add(demand)

    def unit(self, node: fx.Node, demand: Demand) -> Unit:
        known = self.operator(node, demand) or self.group(node, demand)
        if known is not None:
            return self.accept(known)
        fallback: Unit | None = None
        inside: frozenset[fx.Node] = frozenset()
        for _ in range(_MOST_ABSORBED + 1):
            nodes, inputs = closure(node, self.analysis.consistent, inside)
            candidate = next(
                (
                    u
                    for u in self.candidates(node, demand, nodes, inputs)
                    if self.reproduces(u) and self.is_certified(u)
                ),
                None,
            )
            if candidate is not None:
                whole = [i for i, d in candidate.reads.items() if d == (ALL,) and self.is_data(i)]
                if not whole:
                    return self.accept(fallback or candidate)
                if len(demand) == 1 and len(whole) <= 2:
                    mixer = self.recognise(self.analysis, candidate, whole)
                    if mixer is not None:
                        return self.accept(
                            Unit(node, demand, nodes, dict.fromkeys(whole, (NEW,)), "row", mixer)
                        )
                fallback = fallback or candidate
                if any(self.is_data(i) and len(self.rows(i)) > 1 for i in candidate.reads):
                    break  # weights over pairs of positions stay, whatever is absorbed: no mixer has them as an input
            else:
                whole = [i for i in inputs if is_tensor(i) and len(self.rows(i)) > 1]
            grown = inside | {i for i in whole if i.op != "placeholder"}
            if grown == inside or (fallback is not None and len(demand) != 1):
                break
            inside = grown
        if fallback is None:
            raise Unsupported(
                Refusal(
                    "plan",
                    f"{node.name!r} is causal, but no way to compute one new row of it was found",
                    (node.name,),
                    source_of(node),
                    "please report this model: a causal operator should always have a plan",
                )
            )
        return self.accept(fallback)

    def operator(self, node: fx.Node, demand: Demand) -> Unit | None:
        """The unit of the nearest values, if a mixer knows the increment of its operators."""
        if demand != (NEW,):
            return None
        nodes, inputs = closure(node, self.analysis.consistent)
        reads = {i: (NEW,) * len(self.rows(i)) for i in inputs if is_tensor(i)}
        mixer = self.recognise_operator(self.analysis, Unit(node, demand, nodes, reads))
        return None if mixer is None else self.mixed(node, demand, nodes, mixer)

    def mixed(self, node: fx.Node, demand: Demand, nodes: tuple[fx.Node, ...], mixer: Any) -> Unit:
        """A unit that runs as its increment."""
        return Unit(node, demand, nodes, dict.fromkeys(mixer.inputs, (NEW,)), "row", mixer)

    def group(self, node: fx.Node, demand: Demand) -> Unit | None:
        """The unit with every value of two sequence axes behind it inside, if a mixer knows its increment."""
        if len(demand) != 1:
            return None
        inside: frozenset[fx.Node] = frozenset()
        while True:
            nodes, inputs = closure(node, self.analysis.consistent, inside)
            pairs = [i for i in inputs if is_tensor(i) and len(self.rows(i)) > 1]
            absorbed = frozenset(i for i in pairs if self.is_data(i))
            if not absorbed:
                break
            inside |= absorbed
        if not pairs and len(nodes) < 2:
            return None
        reads = {i: (NEW,) * len(self.rows(i)) for i in inputs if is_tensor(i)}
        mixer = self.recognise_group(self.analysis, Unit(node, demand, nodes, reads))
        return None if mixer is None else self.mixed(node, demand, nodes, mixer)

    def accept(self, unit: Unit) -> Unit:
        for node, demand in unit.reads.items():
            self.want(node, demand)
        return unit

    def candidates(
        self,
        node: fx.Node,
        demand: Demand,
        nodes: tuple[fx.Node, ...],
        inputs: tuple[fx.Node, ...],
    ) -> Iterator[Unit]:
        """Ways to read the inputs, cheapest first: by how many histories they need."""
        tensors = [i for i in inputs if is_tensor(i)]
        choices = [self.choices(i) for i in tensors]
        bindings = ("row", "axis", "full", "region")
        cheapest = next(self.assignments(tensors, choices), None)
        if cheapest is None:
            return
        if self.fits(cheapest, demand):
            yield from (Unit(node, demand, nodes, cheapest, binding) for binding in bindings)
        counts = self.other_rows_count(Unit(node, demand, nodes, cheapest, "full"))
        choices = [sufficient(c, counts[i]) for i, c in zip(tensors, choices, strict=True)]
        for reads in self.assignments(tensors, choices):
            if reads != cheapest and self.fits(reads, demand):
                yield from (Unit(node, demand, nodes, reads, binding) for binding in bindings)

    def fits(self, reads: Mapping[fx.Node, Demand], demand: Demand) -> bool:
        """Operands of two sequence axes are read alike, else the corner of one could broadcast over another's row."""
        pairs = {d for i, d in reads.items() if len(self.rows(i)) == 2}
        return len(pairs) <= 1 and (pairs != {(NEW, NEW)} or demand == (NEW, NEW))

    def assignments(
        self, tensors: list[fx.Node], choices: list[list[Demand]]
    ) -> Iterator[dict[fx.Node, Demand]]:
        prices = [[self.price(i, d) for d in c] for i, c in zip(tensors, choices, strict=True)]
        for picked in order_reads(choices, prices):
            yield dict(zip(tensors, picked, strict=True))

    def other_rows_count(self, unit: Unit) -> dict[fx.Node, tuple[bool, ...]]:
        """Which inputs, along which of their axes, cannot be read by their newest rows alone."""
        t = self.n - 1
        expected = self.expected(unit, t)
        values = {node: self.values[node] for node in unit.reads}
        axes = {node: self.rows(node) for node in unit.reads}
        if not unit.demand or expected is None:
            return {node: (False,) * len(axes[node]) for node in unit.reads}

        def run(env: Mapping[fx.Node, Any]) -> Tensor | None:
            found = self.ran(unit, dict(env), self.n)
            if found is None or found.shape != self.values[unit.exit].shape:
                return None
            return self.demanded(found, unit, t)

        return other_rows_count(
            run,
            values,
            axes,
            lambda found: not agrees(found, expected, _TOLERANCE, self.values[unit.exit]),
            t,
        )

    def choices(self, node: fx.Node) -> list[Demand]:
        axes = len(self.rows(node))
        if axes <= 1:
            return [(NEW,), (ALL,)][: 2 * axes] or [()]
        if axes == 2:
            whole = [] if self.is_data(node) else [(ALL, ALL)]
            return [(NEW, ALL), (ALL, NEW), (NEW, NEW), *whole]
        return []

    def price(self, node: fx.Node, demand: Demand) -> tuple[int, int]:
        whole = demand.count(ALL)
        return whole if self.is_data(node) else 0, whole

    def is_certified(self, unit: Unit) -> bool:
        """Whether more than a few samples says that the rows a unit reads are all it needs."""
        return self.by_rule(unit) or self.certify(unit)

    def by_rule(self, unit: Unit) -> bool:
        """Certified without asking the unit: all rows then narrow, row by row, or entry by entry."""
        if unit.binding == "region":
            return all(kind == ALL for demand in unit.reads.values() for kind in demand)
        if any(ALL in demand for demand in unit.reads.values()):
            return self.by_entry(unit)
        return all(self.is_local(n) for n in unit.nodes if is_tensor(n) and self.is_data(n))

    def by_entry(self, unit: Unit) -> bool:
        """Whether a unit works entry by entry, on entries read as those of its exit are wanted."""
        rank = unit.exit.meta["val"].dim()
        wanted = dict(zip(self.rows(unit.exit), unit.demand, strict=True))
        return all(self.is_by_entry(n) for n in unit.nodes if is_tensor(n)) and all(
            wanted.get(axis + rank - node.meta["val"].dim()) == kind
            for node, demand in unit.reads.items()
            for axis, kind in zip(self.rows(node), demand, strict=True)
        )

    def reproduces(self, unit: Unit) -> bool:
        return all(self.reproduces_at(unit, t) for t in dict.fromkeys(self.positions))

    def reproduces_at(self, unit: Unit, t: int) -> bool:
        expected = self.expected(unit, t)
        if expected is None:
            return True
        env: dict[fx.Node, Any] = {node: self.given(node, d, t) for node, d in unit.reads.items()}
        found = self.ran(unit, env, 1 if unit.binding == "row" else self.n)
        if found is None or found.dim() != expected.dim():
            return False
        for axis, kind in zip(self.rows(unit.exit), unit.demand, strict=True):
            if kind == NEW and unit.binding == "region":
                if found.shape[axis] != self.n:
                    return False
                found = found.narrow(axis, t, 1)
            elif kind == ALL:
                if found.shape[axis] != self.n:
                    return False
                found = found.narrow(axis, 0, t + 1)
        return agrees(found, expected, _TOLERANCE, self.values[unit.exit])

    def ran(self, unit: Unit, env: dict[fx.Node, Any], length: int) -> Tensor | None:
        """The unit on its inputs; None where it fails."""
        try:
            with torch.no_grad():
                found = run_unit(
                    self.program,
                    unit.nodes,
                    env,
                    length=length,
                    batch=self.batch,
                    lists=self.lists(unit) if unit.binding == "axis" else None,
                    rewrite=widen_call,
                )
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None
        return found if isinstance(found, Tensor) else None

    def lists(self, unit: Unit) -> dict[int, int]:
        return {
            axis: 1 if kind == NEW else self.n
            for axis, kind in zip(self.rows(unit.exit), unit.demand, strict=True)
        }

    def given(self, node: fx.Node, demand: Demand, t: int) -> Any:
        value = self.values[node]
        axes = self.rows(node)
        if demand == (ALL,):
            return zero_tail(value, axes[0], t) if self.is_data(node) else value
        for axis, kind in zip(axes, demand, strict=True):
            if kind == NEW:
                value = take_row(value, axis, t)
        return value

    def expected(self, unit: Unit, t: int) -> Tensor | None:
        if not unit.demand:
            if unit.exit in self.analysis.consistent:
                return self.values[unit.exit]
            return self.analysis.values.get(t + 1, {}).get(unit.exit)
        return self.demanded(self.values[unit.exit], unit, t)

    def demanded(self, value: Tensor, unit: Unit, t: int) -> Tensor:
        """What a unit is to make at position t, of its whole value."""
        for axis, kind in zip(self.rows(unit.exit), unit.demand, strict=True):
            value = take_row(value, axis, t) if kind == NEW else value.narrow(axis, 0, t + 1)
        return value
