"""The last few positions of a value, as the newest row of as many values that are each delayed by one position more.

``x[:, -3:]`` has other rows at every length, so no row of it can be kept. Its rows are the newest rows of x, of x one
position later, and of x two positions later, and those are kept like the rows of any short filter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx, nn

from .compare import same_function
from .passes.propose_consistency import axes_of
from .pieces import cut_of
from .program import Program, add_call, measure, operator_name, sizes

aten = torch.ops.aten
_MOST = 32  # positions; each has a ring of its own


def with_latest_delayed(program: Program) -> Program:
    """The program with slices of some of the last k positions, 1 < k ≤ 32, taken from delayed values.

    Before and after::

        last = x[:, s - 2 : s]
        last = cat([pad(x, one row in front)[:, :s][:, s - 1 : s], x[:, s - 1 : s]], 1)

    With fewer than k positions a model returns as many rows as there are, so k become the fewest it may have. Where the
    twins do not compute the same, nothing is changed.
    """
    found = {node: delays for node in program.graph.nodes if (delays := _latest(program, node)) is not None}
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
    fewest = max(program.lengths.fewest, *(delays[0] + 1 for delays in found.values()))
    lengths = replace(program.lengths, fewest=fewest)
    made = replace(program, module=fx.GraphModule(nn.Module(), graph), lengths=lengths)
    return made if same_function(made, program) else program


def _latest(program: Program, node: fx.Node) -> range | None:
    """How far back the positions are that a slice takes, if they are a few of the last, and more than the newest."""
    if node not in program.input_dependent or operator_name(node.target) != "slice":
        return None
    bounds = cut_of(node)
    if bounds is None:
        return None
    source, dim, start, stop = bounds
    axes = axes_of(program, source)
    if axes.rows != (dim,):
        return None
    size = sizes(source)[dim]
    further = sympy.Symbol("further", integer=True, nonnegative=True)  # positions beyond the first few
    back, count = (
        sympy.expand(sympy.sympify(e).subs(program.length, further + _MOST))
        for e in (size - stop, stop - start)
    )
    if not (back.is_Integer and count.is_Integer and count >= 1 and 1 < back + count <= _MOST):
        return None
    back, count = int(back), int(count)
    lengths = np.arange(back + count, _MOST)
    first, end, most = (program.size_values(e, lengths) for e in (start, stop, size))
    if (most - end != back).any() or (end - first != count).any():
        return None
    return range(back + count - 1, back - 1, -1)


def _delayed(graph: fx.Graph, node: fx.Node, delays: range, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    bounds = cut_of(node)
    assert bounds is not None
    source, dim = copied[bounds[0]], bounds[1]
    rank = source.meta["val"].dim()

    def call(target: Any, *args: Any) -> fx.Node:
        return add_call(graph, node, node.meta["val"].fake_mode, target, args)

    length = call(aten.sym_size.int, source, dim)
    rows = []
    for by in delays:
        value = source
        if by:
            in_front = [0] * (2 * (rank - dim - 1)) + [by, 0]
            value = call(
                aten.slice.Tensor, call(aten.constant_pad_nd.default, source, in_front), dim, 0, length
            )
        rows.append(call(aten.slice.Tensor, value, dim, -1, 2**63 - 1))
    return call(aten.cat.default, rows, dim)
