"""Units and plans: how one new position of every value is obtained from what is kept of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .program import Program, Rewrite, as_expr, is_integer, is_tensor

NEW, ALL = "new", "all"
_FACTORS = ("Tensor", "number", "float")  # types of arguments that values are computed with
Demand = tuple[str, ...]  # per sequence axis of a value: its newest row, or all rows so far


@dataclass(frozen=True)
class Unit:
    """A value, the nodes that make it, and the rows it reads of its inputs.

    ``nodes`` are topologically ordered and end with ``exit``. ``binding`` says what the length-valued
    integers inside stand for when the unit runs on new rows: ``row`` (1), ``full`` (the capacity), ``axis`` (the
    capacity, but the size lists of the exit follow the demand) or ``region`` (the capacity; all rows are recomputed
    and the newest is kept). A unit with a ``mixer`` runs as its increment.
    """

    exit: fx.Node
    demand: Demand
    nodes: tuple[fx.Node, ...]
    reads: Mapping[fx.Node, Demand]
    binding: str = "row"
    mixer: Any = None

    @property
    def is_region(self) -> bool:
        """Whether a step recomputes all rows and keeps the newest."""
        return self.mixer is None and self.binding == "region"


@dataclass(frozen=True)
class Plan:
    """Units in the order they run, and what must be kept between steps."""

    units: tuple[Unit, ...]
    histories: tuple[fx.Node, ...]  # values of which all rows so far are kept
    tables: Mapping[fx.Node, frozenset[Demand]]  # input-independent values, by how they are read
    outputs: tuple[Any, ...]
    axes: Mapping[fx.Node, tuple[int, ...]]  # sequence axes of every tensor node
    batch_axes: Mapping[fx.Node, tuple[int, ...]]
    tested: tuple[
        Unit, ...
    ]  # units whose reads no rule certifies: to be asked again at other weights or capacities

    @property
    def regions(self) -> tuple[Unit, ...]:
        """The units for which no better increment is known."""
        return tuple(unit for unit in self.units if unit.is_region)


def run_unit(
    program: Program,
    nodes: Sequence[fx.Node],
    env: dict[fx.Node, Any],
    *,
    length: int,
    batch: int,
    lists: Mapping[int, int] | None = None,
    rewrite: Rewrite | None = None,
) -> Any:
    """Run a unit's nodes on ``env`` (its inputs' values) with the length bound to ``length``.

    One new row of many is no sequence of one position: where ``length`` is 1, sizes are bound to that, and numbers that
    values are computed with to the fewest positions of the program, ``x * s / max(s, 2)``.
    ``lists`` overrides the length in position d of the size lists of the last node (binding ``axis``).
    Returns the value of the last node.
    """

    def value(arg: fx.Node, bound: int = length) -> Any:
        return bind_integer(program, arg, bound, batch) if is_integer(arg) else env[arg]

    for node in nodes:
        if is_integer(node):
            continue
        args, kwargs = node.args, node.kwargs
        if lists is not None and node is nodes[-1]:
            args = tuple(_bound_list(program, a, lists, length, batch) for a in args)
        if length == 1:
            args, kwargs = _with_factors(program, node, args, kwargs, batch)
        args, kwargs = fx.map_arg((args, kwargs), value)
        if rewrite is not None:
            args, kwargs = rewrite(node, args, kwargs)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        env[node] = result if rewrite is None else rewrite.result(result)
    return env[nodes[-1]]


def _bound_list(program: Program, arg: Any, lists: Mapping[int, int], length: int, batch: int) -> Any:
    if not isinstance(arg, (list, tuple)):
        return arg
    return [
        bind_integer(program, item, lists.get(dim, length), batch) if is_integer(item) else item
        for dim, item in enumerate(arg)
    ]


def _with_factors(program: Program, node: fx.Node, args: Any, kwargs: Any, batch: int) -> tuple[Any, Any]:
    """A call's arguments with the integers bound that its values are computed with, and not sizes or places."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(map(is_integer, node.all_input_nodes)):
        return args, kwargs
    if not any(map(is_tensor, node.all_input_nodes)):
        return args, kwargs  # a table is made, of as many entries
    types = {of.name: str(of.type).removeprefix("Optional[").removesuffix("]") for of in schema.arguments}
    shortest = program.lengths.at_least(1) or 1

    def bound(name: str, value: Any) -> Any:
        if not isinstance(value, fx.Node) or not is_integer(value) or types[name] not in _FACTORS:
            return value
        return bind_integer(program, value, shortest, batch)

    found = tuple(map(bound, types, args))
    return found, {name: bound(name, value) for name, value in kwargs.items()}


def bind_integer(program: Program, node: fx.Node, length: int, batch: int) -> Any:
    """The number an integer node stands for at a given length and batch."""
    expr = as_expr(node)
    if not hasattr(expr, "free_symbols"):
        return expr
    value = program.size_values(expr, np.asarray([length]), batch)[0]
    return value.item()


def closure(
    exit_node: fx.Node, boundary: Iterable[fx.Node], inside: frozenset[fx.Node] = frozenset()
) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """The nodes behind ``exit_node`` back to ``boundary`` and placeholders, and those inputs.

    Members of ``inside`` count as interior even if they are in ``boundary``. Both results are in graph
    order; integer nodes are neither (they are bound by value).
    """
    edge = set(boundary) - inside
    interior, inputs = {exit_node}, set()
    stack = list(exit_node.all_input_nodes)
    while stack:
        node = stack.pop()
        if is_integer(node) or node in interior or node in inputs:
            continue
        if node.op == "placeholder" or node in edge:
            inputs.add(node)
        else:
            interior.add(node)
            stack.extend(node.all_input_nodes)
    order = {node: i for i, node in enumerate(exit_node.graph.nodes)}
    return (
        tuple(sorted(interior, key=order.__getitem__)),
        tuple(sorted(inputs, key=order.__getitem__)),
    )


def zero_tail(value: Tensor, axis: int, position: int) -> Tensor:
    """A copy of a value whose rows after ``position`` are zero: what a history buffer holds."""
    value = value.clone()
    rest = value.shape[axis] - position - 1
    if rest > 0:
        value.narrow(axis, position + 1, rest).zero_()
    return value


def take_row(value: Tensor, axis: int, position: Tensor | int) -> Tensor:
    """One row of a value, its axis kept with size 1."""
    if isinstance(position, int):
        return value.narrow(axis, position, 1)
    return torch.index_select(value, axis, position)
