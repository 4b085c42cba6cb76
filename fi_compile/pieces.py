"""Values that were joined only to go through the same operators, apart again.

A filter that is joined with the sequence, transformed with it and cut off again looks as if it depended on the
sequence, and rows of a batch that are joined with it as if they were none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import Tensor, fx, nn

from .program import Program, add_call, as_expr, is_getitem, is_tensor, operator_name, sizes

_TRANSFORMS = frozenset({"fft_rfft", "fft_fft", "fft_irfft", "fft_ifft"})
_BY_ENTRY = frozenset({"clone", "contiguous", "to", "_to_copy", "neg", "mul", "div", "_conj"})
_CUTS = frozenset({"split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"})
_OPEN_END = 1 << 62


@dataclass(frozen=True)
class Cut:
    """One piece of what was joined, cut off again.

    ``chain``: the operators between the joining and the cut, each with the argument the pieces come by.
    """

    chain: tuple[tuple[fx.Node, fx.Node], ...]
    piece: fx.Node


def with_pieces_apart(program: Program) -> Program:
    """The program with operators between a joining and a cut applied to the piece that is cut off.

    Requires operators that work on each entry along the joined dimension by itself. Before and after::

        whole = fft_rfft(cat([k, u], 1), n, 0); part = whole[:, 3:]
        part = fft_rfft(u, n, 0)
    """
    found = {node: cut for node in program.graph.nodes if (cut := _cut(node)) is not None}
    if not found:
        return program
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        cut = found.get(node)
        copied[node] = (
            graph.node_copy(node, copied.__getitem__) if cut is None else _apply(graph, cut, copied)
        )
    graph.eliminate_dead_code()
    graph.lint()
    return replace(program, module=fx.GraphModule(nn.Module(), graph))


def _apply(graph: fx.Graph, cut: Cut, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    value = copied[cut.piece]
    for node, carrier in cut.chain:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda a, c=carrier, v=value: v if a is c else copied[a]
        )
        value = add_call(graph, node, node.meta["val"].fake_mode, node.target, args, kwargs)  # type: ignore[arg-type]
    return value


def _cut(node: fx.Node) -> Cut | None:
    """The piece that a node cuts off, or None where it cuts off none, or other operators stand between."""
    bounds = cut_of(node)
    if bounds is None:
        return None
    current, dim, start, stop = bounds
    chain: list[tuple[fx.Node, fx.Node]] = []
    while operator_name(current.target) not in ("cat", "concat"):
        found = _carrier(current, dim)
        if found is None:
            return None
        chain.append((current, found[0]))
        current, dim = found
    pieces: Any = current.args[0]
    joined = _argument(current, 1, "dim", 0)
    if joined % current.meta["val"].dim() != dim or not isinstance(pieces, (list, tuple)):
        return None
    offset: Any = 0
    for piece in pieces:
        end = offset + sizes(piece)[dim] if piece.meta["val"].dim() > dim else offset
        if _same(offset, start) and _same(end, stop) and piece.meta["val"].dtype == current.meta["val"].dtype:
            return Cut(tuple(reversed(chain)), piece)
        offset = end
    return None


def cut_of(node: fx.Node) -> tuple[fx.Node, int, Any, Any] | None:
    """What is cut, along which dimension, from where to where; None for no cut."""
    if is_getitem(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if operator_name(source.target) not in _CUTS:
            return None
        whole, parts, index = source.args[0], source.meta["val"], int(node.args[1])  # type: ignore[arg-type]
        dim = _argument(source, 2, "dim", 0) % parts[0].dim()
        ends = [
            sum((as_expr(p.shape[dim]) for p in parts[:i]), start=sympy.Integer(0))
            for i in (index, index + 1)
        ]
        return whole, dim, *ends  # type: ignore[return-value]
    if node.op != "call_function" or operator_name(node.target) != "slice":
        return None
    whole = node.args[0]
    assert isinstance(whole, fx.Node)
    if _argument(node, 4, "step", 1) != 1:
        return None
    dim = _argument(node, 1, "dim", 0) % whole.meta["val"].dim()
    size = sizes(whole)[dim]
    start, end = _argument(node, 2, "start", None), _argument(node, 3, "end", None)
    start = as_expr(0 if start is None else start)
    end = size if end is None or (isinstance(end, int) and end >= _OPEN_END) else as_expr(end)
    start, end = (b + size if isinstance(b, int) and b < 0 else b for b in (start, end))
    return whole, dim, start, end


def _carrier(node: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    """The argument by which an operator's entries along ``dim`` come, each by itself, and its dimension of them."""
    name = operator_name(node.target)
    if not is_tensor(node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    value, source = node.meta["val"], node.args[0]
    if name in _TRANSFORMS:
        along = _argument(node, 2, "dim", -1) % value.dim()
        return (source, dim) if along != dim else None
    if name == "slice":
        return (source, dim) if _argument(node, 1, "dim", 0) % value.dim() != dim else None
    if name in ("constant_pad_nd", "pad"):
        padded = len(node.args[1]) // 2  # type: ignore[arg-type]
        return (source, dim) if dim < value.dim() - padded else None
    if name in ("transpose", "permute", "mT"):
        return source, _before(node, value.dim())[dim]
    if name not in _BY_ENTRY:
        return None
    tensors = [a for a in node.all_input_nodes if is_tensor(a)]
    moving = [a for a in tensors if not _broadcasts(a.meta["val"], value, dim)]
    return (moving[0], dim) if len(moving) == 1 and moving[0].meta["val"].dim() == value.dim() else None


def _before(node: fx.Node, rank: int) -> list[int]:
    """Of each dimension of a permuted value, which it was."""
    order = list(range(rank))
    if operator_name(node.target) == "permute":
        return [d % rank for d in node.args[1]]  # type: ignore[union-attr]
    a, b = node.args[1:3] if len(node.args) > 2 else (-2, -1)
    order[a], order[b] = order[b], order[a]  # type: ignore[index]
    return order


def _broadcasts(argument: Tensor, value: Tensor, dim: int) -> bool:
    own = dim - (value.dim() - argument.dim())
    return own < 0 or (isinstance(argument.shape[own], int) and argument.shape[own] == 1)


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _same(a: Any, b: Any) -> bool:
    return sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0
