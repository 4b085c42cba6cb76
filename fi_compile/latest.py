"""The last few positions of a value, as the newest row of as many values that are each delayed by one position more.

``x[:, -3:]`` has other rows at every length, so no row of it can be kept. Its rows are the newest rows of x, of x one
position later, and of x two positions later, and those are kept like the rows of any short filter. However they are
asked for: as a slice, in a list, by numbers counted from the length, or the first of the reversed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx, nn

from .compare import same_function
from .passes.propose_consistency import axes_of
from .pieces import cut_of
from .program import (
    Kind,
    Program,
    add_call,
    as_expr,
    given_arguments,
    is_getitem,
    is_tensor,
    measure,
    operator_name,
    sizes,
)
from .rules.pointwise import COPIES

aten = torch.ops.aten
_MOST = 32  # positions; each has a ring of its own


@dataclass(frozen=True)
class Latest:
    """Positions of a value along a dimension, by how far each is behind the newest; ``one``: without the dimension."""

    source: fx.Node
    dim: int
    delays: tuple[int, ...]
    one: bool = False


def with_latest_delayed(program: Program) -> Program:
    """The program with some of the last k positions, k ≤ 32, taken from delayed values.

    Before and after::

        last = x[:, s - 2 : s]
        last = cat([pad(x, one row in front)[:, :s][:, s - 1 : s], x[:, s - 1 : s]], 1)

    With fewer than k positions a model returns as many rows as there are, so k become the fewest it may have. Where the
    twins do not compute the same, nothing is changed.
    """
    found = {node: latest for node in program.graph.nodes if (latest := _latest(program, node)) is not None}
    if not found:
        return program
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    resized: set[fx.Node] = set()  # at lengths of fewer positions there were as many rows
    for node in program.graph.nodes:
        new = _delayed(graph, node, found[node], copied) if node in found else None
        copied[node] = new or graph.node_copy(node, copied.__getitem__)
        if new is None and node.op == "call_function" and not resized.isdisjoint(node.all_input_nodes):
            measure(copied[node], program.sequence.meta["val"].fake_mode)
            resized.add(node)
        elif new is not None:
            resized.add(node)
    graph.eliminate_dead_code()
    graph.lint()
    fewest = max(program.lengths.fewest, *(max(latest.delays) + 1 for latest in found.values()))
    lengths = replace(program.lengths, fewest=fewest)
    made = replace(program, module=fx.GraphModule(nn.Module(), graph), lengths=lengths)
    return made if same_function(made, program) else program


def _latest(program: Program, node: fx.Node) -> Latest | None:
    """The last few positions that a node takes; None for anything else, and for the newest as others know it."""
    if node not in program.input_dependent or not is_tensor(node) or node.op != "call_function":
        return None
    found = _cut(program, node) or _listed(program, node)
    if found is None or axes_of(program, found.source).rows != (found.dim,):
        return None
    if (
        found.delays == (0,)
        and operator_name(node.target) in ("slice", "select")
        and node.args[0] is found.source
    ):
        return None
    return found if found.delays and all(0 <= d < _MOST for d in found.delays) else None


def _cut(program: Program, node: fx.Node) -> Latest | None:
    """Positions that are cut off: of the sequence, or of the reversed."""
    name = operator_name(node.target)
    if name == "select":
        source, dim, place = node.args[:3]
        assert isinstance(source, fx.Node)
        dim = int(dim) % source.meta["val"].dim()  # type: ignore[arg-type]
        whole = _reversed(source, dim)
        if whole is not None and isinstance(place, int) and place >= 0:
            return Latest(whole, dim, (place,), True)
        behind = _behind(program, place)
        return None if behind is None else Latest(source, dim, (behind,), True)
    bounds = cut_of(node)
    if bounds is None:
        return None
    source, dim, start, stop = bounds
    whole = _reversed(source, dim)
    if whole is not None:
        counted = isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop <= _MOST
        return Latest(whole, dim, tuple(range(start, stop))) if counted else None
    size = sizes(source)[dim]
    further = sympy.Symbol("further", integer=True, nonnegative=True)  # positions beyond the first few
    back, count = (
        sympy.expand(sympy.sympify(e).subs(program.length, further + _MOST))
        for e in (size - stop, stop - start)
    )
    if not (back.is_Integer and count.is_Integer and count >= 1 and 0 < back + count <= _MOST):
        return None
    back, count = int(back), int(count)
    lengths = np.arange(back + count, _MOST)
    first, end, most = (program.size_values(e, lengths) for e in (start, stop, size))
    if (most - end != back).any() or (end - first != count).any():
        return None
    return Latest(source, dim, tuple(range(back + count - 1, back - 1, -1)))


def _reversed(node: fx.Node, dim: int) -> fx.Node | None:
    """What a value is in reversed order along a dimension."""
    while operator_name(node.target) == "slice" and sizes(node) == sizes(node.args[0]):  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[assignment]
    if operator_name(node.target) != "flip" or [d % len(sizes(node)) for d in node.args[1]] != [dim]:  # type: ignore[union-attr]
        return None
    return node.args[0]  # type: ignore[return-value]


def _listed(program: Program, node: fx.Node) -> Latest | None:
    """Positions that a table of their numbers names."""
    name = operator_name(node.target)
    if name not in ("index", "index_select", "gather"):
        return None
    given = given_arguments(node)
    source = given["self"]
    if name == "index":
        dims = [d for d, index in enumerate(given["indices"]) if index is not None]
        index, dim = given["indices"][dims[-1]], dims[-1]
        rows = given["indices"][dims[0]] if len(dims) == 2 else None
        by_rows = (
            rows is not None
            and dims == [0, 1]
            and _counts_rows(program, rows)
            and sizes(index) == sizes(rows)
        )
        if not (by_rows or len(dims) == 1) or len(sizes(index)) != 1:
            return None
    else:
        index, dim, by_rows = given["index"], given["dim"] % len(sizes(source)), False
    if index.meta["val"].dtype not in (torch.int64, torch.int32):
        return None  # bytes and flags say which, not where
    numbers = _numbers(program, index, alike=by_rows or name == "gather")
    if numbers is None:
        return None
    if name == "gather":
        whole = [s for d, s in enumerate(sizes(source)) if d != dim]
        count = sizes(index)[dim]
        if whole != [s for d, s in enumerate(sizes(index)) if d != dim] or not isinstance(count, int):
            return None
        numbers = numbers * count
    behind = [_behind(program, number) for number in numbers]
    return None if None in behind else Latest(source, dim, tuple(behind), by_rows)  # type: ignore[arg-type]


def _counts_rows(program: Program, index: fx.Node) -> bool:
    """Whether a table holds the numbers of the batch's rows, in order."""
    given = given_arguments(index) if operator_name(index.target) == "arange" else {}
    return (
        given.get("start", 0) == 0
        and given.get("step", 1) == 1
        and as_expr(given.get("end")) == program.batch
    )


def _numbers(program: Program, index: fx.Node, alike: bool) -> list[Any] | None:
    """The entries of a table, as numbers or expressions; ``alike``: the one that all of them are."""
    dtype = index.meta["val"].dtype
    while operator_name(index.target) in COPIES and index.op == "call_function":
        index = index.args[0]  # type: ignore[assignment]
    if index.meta["val"].dtype != dtype:
        return None
    name, given = operator_name(index.target), {}
    found: list[Any] = []
    if index.op == "placeholder":
        kinds = {program.nodes[i.name]: i.kind for i in program.inputs}
        value = program.values.get(index.name)
        if (
            kinds[index] is not Kind.CONSTANT
            or value is None
            or value.dtype == torch.bool
            or not value.numel()
        ):
            return None
        found = value.flatten().tolist()
    elif is_getitem(index):
        return None
    else:
        given = given_arguments(index)
    if name in ("full", "new_full", "full_like"):
        found = [given["fill_value"]]
        alike = alike or sizes(index) == (1,)
        return [as_expr(found[0])] if alike else None
    if name == "arange" and given.get("step", 1) == 1:
        count = as_expr(given["end"]) - as_expr(given.get("start", 0))
        if not isinstance(count, (int, sympy.Integer)) or not 0 < count < _MOST:
            return None
        found = [as_expr(given.get("start", 0)) + i for i in range(int(count))]
    elif name in ("stack", "cat"):
        pieces = [_numbers(program, piece, True) for piece in index.args[0]]  # type: ignore[union-attr]
        if any(p is None for p in pieces) or any(len(sizes(p)) > (name == "cat") for p in index.args[0]):  # type: ignore[union-attr]
            return None
        found = [p[0] for p in pieces if p is not None]
    elif name == "scalar_tensor":
        found = [as_expr(given["s"])]
    elif index.op != "placeholder":
        return None
    return found if not alike or len(found) == 1 else None


def _behind(program: Program, number: Any) -> int | None:
    """How far behind the newest position a number is, counted from the length or from the end."""
    number = as_expr(number)
    if isinstance(number, int):
        return -1 - number if number < 0 else None
    behind = sympy.expand(program.length - 1 - number) if isinstance(number, sympy.Expr) else None
    return int(behind) if behind is not None and behind.is_Integer and behind >= 0 else None


def _delayed(graph: fx.Graph, node: fx.Node, latest: Latest, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    source, dim = copied[latest.source], latest.dim
    rank = source.meta["val"].dim()

    def call(target: Any, *args: Any) -> fx.Node:
        return add_call(graph, node, node.meta["val"].fake_mode, target, args)

    length = call(aten.sym_size.int, source, dim)
    rows = []
    for by in latest.delays:
        value = source
        if by:
            in_front = [0] * (2 * (rank - dim - 1)) + [by, 0]
            value = call(
                aten.slice.Tensor, call(aten.constant_pad_nd.default, source, in_front), dim, 0, length
            )
        if latest.one:
            return call(aten.select.int, value, dim, -1)
        rows.append(call(aten.slice.Tensor, value, dim, -1, 2**63 - 1))
    return rows[0] if len(rows) == 1 else call(aten.cat.default, rows, dim)
