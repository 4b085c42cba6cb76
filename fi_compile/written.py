"""Tensors that are filled in place, as the values they come to hold.

Functionalised, ``y[:, 1:] = v`` is ``slice_scatter(y, copy(y[:, 1:], v))``: whole tensors with a piece exchanged, whose
rows nobody can tell apart. The same tensor is ``where(position >= 1, v moved to its place, y)``, and every row of that
is made of rows.
"""

from __future__ import annotations

import contextlib
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .compare import same_function
from .pieces import cut_of
from .program import Program, add_call, as_expr, given_arguments, is_tensor, is_zero, operator_name, sizes
from .rules.pointwise import UNARY_ANY, UNARY_LINEAR, UNARY_ZERO

aten = torch.ops.aten
_WRITES = frozenset({"slice_scatter", "select_scatter", "copy", "fill", "index_put", "index_copy"})
_BY_ENTRY = frozenset({*UNARY_LINEAR, *UNARY_ZERO, *UNARY_ANY, "add", "sub", "rsub", "mul", "div"})
_BY_ENTRY -= {
    "view_as_real",
    "polar",
    "complex",
    "prelu",
    "_unsafe_view_copy",
}  # these place dimensions their own way
# Also of whole numbers: what they do to rows that nobody reads is no error.
_NEVER_FAIL = frozenset({
    "gt", "ge", "lt", "le", "eq", "ne", "logical_and", "logical_or", "logical_not", "add", "sub", "mul", "to",
    "_to_copy", "where", "masked_fill", "clone",
})  # fmt: skip
_COPIES = frozenset({"clone", "contiguous", "alias"})
_ALONG_LAST = frozenset({"linear", "layer_norm", "rms_norm"})
_OPEN_END = 1 << 62
_MOST_STEPS = 16  # of a slice that is written: so many slices are stacked


def with_writes_resolved(program: Program) -> Program:
    """The program with pieces that are written into other tensors put together without a write.

    Before and after, for a write to positions, to features, to every second feature and to what was all zeros::

        slice_scatter(y, v, 1, 1)              where(arange(s)[:, None] >= 1, v at its positions, y)
        slice_scatter(y, v, 2, 3, 5)           cat([y[..., :3], v, y[..., 5:]], 2)
        slice_scatter(y, v, 2, 1, end, 2)      stack([y[..., ::2], v], 3).flatten(2)
        slice_scatter(zeros, v, 1, 0, s)       constant_pad_nd(v, …)
        index_put(y, [None, arange(s)], v)     as slice_scatter(y, v, 1, 0, s)

    v at its positions is ``f(y, x[t - 1])`` where it was ``f(y[:, 1:], x[:, :-1])``, and v padded else. Where the
    twins do not compute the same, nothing is changed.
    """
    if not any(operator_name(n.target) in _WRITES for n in program.graph.nodes if n.op == "call_function"):
        return program
    found = _Resolving(program).run()
    return found if same_function(found, program) else program


class _Resolving:
    """The new graph as it grows."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.node: fx.Node = program.sequence
        self.paddings = 0  # of values with no better place
        self.stacked: dict[
            fx.Node, tuple[int, list[fx.Node]]
        ] = {}  # by value: along which dimension, of what

    def run(self) -> Program:
        copied: dict[fx.Node, fx.Node] = {}
        for node in self.program.graph.nodes:
            self.node = node
            made = None
            if node.op == "call_function" and operator_name(node.target) in (*_WRITES, "slice"):
                with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):  # sizes do not fit
                    made = self.made(node, copied)
            copied[node] = made or self.graph.node_copy(node, copied.__getitem__)
            if node.target is aten.view.default:  # of a value that may lie in memory in another order now
                copied[node].target = aten.reshape.default
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return replace(self.program, module=fx.GraphModule(nn.Module(), self.graph))

    def made(self, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node | None:
        """What stands in place of a slice or a write; None where that is itself."""
        name = operator_name(node.target)
        given = {key: fx.map_arg(value, copied.__getitem__) for key, value in given_arguments(node).items()}
        if name == "copy":
            return self.copy(given["self"], given["src"])
        if name == "fill":
            value, place = given["value"], given["self"].meta["val"]
            if not is_tensor(value):
                value = self.call(aten.full.default, [], value, dtype=place.dtype, device=place.device)
            return self.copy(given["self"], value)
        whole: fx.Node = given["input" if "input" in given else "self"]
        if name == "index_put":
            return self.put(whole, given["indices"], given["values"], bool(given.get("accumulate")))
        dim = given.get("dim", 0) % whole.meta["val"].dim()
        if name == "index_copy":
            return self.put(whole, [None] * dim + [given["index"]], given["source"], False)
        if name == "select_scatter":
            source = self.call(aten.unsqueeze.default, given["src"], dim)
            return self.written(whole, source, dim, given["index"], _after(given["index"]), 1)
        bounds = (given.get("start"), given.get("end"), given.get("step", 1))
        if name == "slice_scatter":
            return self.written(whole, given["src"], dim, *bounds)
        return self.read(whole, dim, *bounds)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node in place of the present one."""
        return add_call(
            self.graph, self.node, self.program.sequence.meta["val"].fake_mode, target, args, kwargs
        )

    def size(self, node: fx.Node, dim: int) -> Any:
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, dim)

    # -- what is read and written --------------------------------------------------------------------------

    def copy(self, place: fx.Node, source: fx.Node) -> fx.Node | None:
        """A source in the shape and dtype of the place that it is copied to."""
        if place.meta["val"].device != source.meta["val"].device:
            return None
        if place.meta["val"].dtype != source.meta["val"].dtype:
            source = self.call(aten._to_copy.default, source, dtype=place.meta["val"].dtype)
        if sizes(place) == sizes(source):
            return source
        return self.call(aten.expand.default, source, [self.size(place, d) for d in range(len(sizes(place)))])

    def read(self, whole: fx.Node, dim: int, start: Any, end: Any, step: int) -> fx.Node | None:
        """A slice of everything, of what was written just there, or of every k-th of what was stacked."""
        found = _bounds(whole, dim, start, end)
        if step == 1 and _is_all(whole, dim, found):
            return whole
        if whole in self.stacked:
            along, pieces = self.stacked[whole]
            if along == dim and step == len(pieces) and found == (start, sizes(whole)[dim]) and start < step:
                return pieces[start]
        if operator_name(whole.target) == "slice_scatter" and step == 1:
            given = given_arguments(whole)
            place = given.get("dim", 0) % whole.meta["val"].dim()
            written = _bounds(whole, place, given.get("start"), given.get("end"))
            if place == dim and given.get("step", 1) == 1 and found is not None and written == found:
                return given["src"]
        return None

    def written(
        self, whole: fx.Node, source: fx.Node, dim: int, start: Any, end: Any, step: int
    ) -> fx.Node | None:
        found = _bounds(whole, dim, start, end)
        if found is None or whole.meta["val"].dtype != source.meta["val"].dtype:
            return None
        if step == 1 and _is_all(whole, dim, found):
            return source
        size = sizes(whole)[dim]
        if step != 1:
            return self.every(whole, source, dim, found, step) if isinstance(size, int) else None
        if isinstance(size, int) and all(isinstance(b, int) for b in found):
            pieces = [self.cut(whole, dim, 0, found[0]), source, self.cut(whole, dim, found[1], size)]
            return self.call(aten.cat.default, [p for p in pieces if p is not None], dim)
        if not isinstance(found[0], int):
            return None  # a start that follows the length
        if size != self.program.length or (found[1] != size and not isinstance(found[1], int)):
            return self.padded(source, dim, found[0], whole) if is_zero(whole) else None
        if self.is_slice_of(source, whole, dim, found):
            return whole
        whole = self.without_wrapping(whole, dim, found)
        self.paddings = 0
        placed = self.placed(source, dim, found[0], whole)
        if is_zero(whole) and (self.paddings or _slice_of(source, dim) is not None):
            return self.padded(source, dim, found[0], whole)
        return self.call(aten.where.self, self.within(whole, dim, found), placed, whole)

    def put(self, whole: fx.Node, indices: list[Any], source: fx.Node, adds: bool) -> fx.Node | None:
        """What is written to entries named one by one, if they are all from one to another along one dimension."""
        named = [d for d, index in enumerate(indices) if index is not None]
        found = _consecutive(indices[named[0]]) if len(named) == 1 and not adds else None
        if found is None:
            return None
        (dim,), count = named, self.size(indices[named[0]], 0)
        shape = [count if d == dim else self.size(whole, d) for d in range(len(sizes(whole)))]
        if len(sizes(source)) != len(shape) or any(
            as_expr(a) != as_expr(b) for a, b in zip(sizes(source), shape, strict=True)
        ):
            source = self.call(aten.expand.default, source, shape)
        return self.written(whole, source, dim, *found, 1)

    def cut(self, whole: fx.Node, dim: int, start: int, end: int) -> fx.Node | None:
        return self.call(aten.slice.Tensor, whole, dim, start, end) if start < end else None

    def every(
        self, whole: fx.Node, source: fx.Node, dim: int, found: tuple[Any, Any], step: int
    ) -> fx.Node | None:
        """Every k-th entry of a dimension exchanged, by the k slices stacked."""
        start, size = found[0], sizes(whole)[dim]
        if not (
            isinstance(start, int) and start < step <= _MOST_STEPS and size % step == 0 and found[1] == size
        ):
            return None
        along, before = self.stacked.get(whole, (dim, []))
        pieces = (
            list(before)
            if along == dim and len(before) == step
            else [self.call(aten.slice.Tensor, whole, dim, i, size, step) for i in range(step)]
        )
        pieces[start] = source
        made = self.call(
            aten.reshape.default,
            self.call(aten.stack.default, pieces, dim + 1),
            [self.size(whole, d) for d in range(len(sizes(whole)))],
        )
        self.stacked[made] = dim, pieces
        return made

    def is_slice_of(self, source: fx.Node, whole: fx.Node, dim: int, found: tuple[Any, Any]) -> bool:
        """Whether what is written is what is there."""
        cut = _slice_of(source, dim)
        return cut is not None and cut[0] is whole and (cut[1], cut[1] + sizes(source)[dim]) == found

    def without_wrapping(self, whole: fx.Node, dim: int, found: tuple[Any, Any]) -> fx.Node:
        """A rotated value, whose entries that came around are written, as one that was moved."""
        turned: Any = whole
        while operator_name(turned.target) in _COPIES:
            turned = turned.args[0]
        if operator_name(turned.target) != "roll" or found[0] != 0:
            return whole
        given = given_arguments(turned)
        by, dims = (given.get(key, []) for key in ("shifts", "dims"))
        if len(dims) != 1 or dims[0] % len(sizes(whole)) != dim or not isinstance(by[0], int):
            return whole
        return self.later(given["self"], dim, by[0]) if 0 < by[0] <= found[1] else whole

    # -- positions -----------------------------------------------------------------------------------------

    def within(self, whole: fx.Node, dim: int, found: tuple[Any, Any]) -> fx.Node:
        """Which positions are written, ones for the dimensions after theirs."""
        positions = self.call(aten.arange.default, self.size(whole, dim), device=whole.meta["val"].device)
        for _ in range(len(sizes(whole)) - 1 - dim):
            positions = self.call(aten.unsqueeze.default, positions, -1)
        start, end = found
        parts = [self.call(aten.ge.Scalar, positions, start)] if start > 0 else []
        if isinstance(end, int):
            parts.append(self.call(aten.lt.Scalar, positions, end))
        return parts[0] if len(parts) == 1 else self.call(aten.logical_and.default, *parts)

    def placed(self, source: fx.Node, dim: int, start: int, whole: fx.Node) -> fx.Node:
        """A value as long as the whole, the source in its place from ``start`` on, and anything before and after."""
        name = operator_name(source.target) if source.op == "call_function" else ""
        if sizes(source)[dim] == 1 and name in ("unsqueeze", "expand"):
            return source  # one entry for all positions
        cut = _slice_of(source, dim)
        if cut is not None and sizes(cut[0])[dim] == sizes(whole)[dim] and cut[1] <= start:
            return cut[0] if cut[1] == start else self.later(cut[0], dim, start - cut[1])
        rank, value = len(sizes(source)), source.meta["val"]
        first: Any = source.args[0] if source.args else None
        if name == "expand" and is_tensor(first):
            own = dim - (rank - first.meta["val"].dim())
            if own < 0 or sizes(first)[own] == 1:
                return first
        if name in _ALONG_LAST and dim < rank - 1:
            return self.call(source.target, self.placed(first, dim, start, whole), *source.args[1:])
        if name == "slice" and cut is None and (found := cut_of(source)) is not None and found[1] != dim:
            return self.call(source.target, self.placed(first, dim, start, whole), *source.args[1:])
        if name == "cat" and given_arguments(source).get("dim", 0) % rank != dim:
            pieces = [self.placed(piece, dim, start, whole) for piece in first]
            return self.call(source.target, pieces, *source.args[1:])
        if name in _BY_ENTRY and (value.is_floating_point() or name in _NEVER_FAIL):
            new: dict[fx.Node, fx.Node] = {}
            for argument in filter(is_tensor, source.all_input_nodes):
                own = dim - (rank - argument.meta["val"].dim())
                if own >= 0 and sizes(argument)[own] != 1:
                    new[argument] = self.placed(argument, own, start, whole)
            args, kwargs = fx.map_arg((source.args, source.kwargs), lambda a: new.get(a, a))
            return self.call(source.target, *args, **kwargs)
        return self.padded(source, dim, start, whole)

    def later(self, whole: fx.Node, dim: int, by: int) -> fx.Node:
        """A value with every entry as many positions later, zeros before."""
        in_front = [0] * (2 * (len(sizes(whole)) - dim - 1)) + [by, 0]
        padded = self.call(aten.constant_pad_nd.default, whole, in_front)
        return self.call(aten.slice.Tensor, padded, dim, 0, self.size(whole, dim))

    def padded(self, source: fx.Node, dim: int, start: int, whole: fx.Node) -> fx.Node:
        """A value with zeros before it and after it, as long as the whole."""
        self.paddings += 1
        behind: Any = 0
        rest = as_expr(sizes(whole)[dim]) - start - sizes(source)[dim]
        if rest != 0:
            taken = self.call(operator.add, self.size(source, dim), start)
            behind = self.call(operator.sub, self.size(whole, dim), taken)
        return self.call(
            aten.constant_pad_nd.default, source, [0] * (2 * (len(sizes(source)) - dim - 1)) + [start, behind]
        )


def _consecutive(index: fx.Node) -> tuple[Any, Any] | None:
    """First and end of indices one after another."""
    while operator_name(index.target) in (*_COPIES, "to", "_to_copy"):
        index = index.args[0]  # type: ignore[assignment]
    if operator_name(index.target) != "arange" or index.meta["val"].dtype != torch.int64:
        return None
    given = given_arguments(index)
    start = given.get("start", 0)
    return (
        (start, given["end"]) if given.get("step", 1) == 1 and isinstance(start, int) and start >= 0 else None
    )


def _after(index: Any) -> Any:
    """The end of a slice of one entry."""
    return index + 1 if isinstance(index, int) and index != -1 else None


def _bounds(whole: fx.Node, dim: int, start: Any, end: Any) -> tuple[Any, Any] | None:
    """First and end of a slice, counted from the first entry; None where that is a matter of the length."""
    size = sizes(whole)[dim]
    first = as_expr(0 if start is None else start)
    last = size if end is None or (isinstance(end, int) and end >= _OPEN_END) else as_expr(end)
    if isinstance(size, int):
        first, last = (b + size if isinstance(b, int) and b < 0 else b for b in (first, last))
        first, last = (min(max(b, 0), size) if isinstance(b, int) else b for b in (first, last))
    if any(isinstance(b, int) and b < 0 for b in (first, last)):
        return None
    return first, last


def _is_all(whole: fx.Node, dim: int, found: tuple[Any, Any] | None) -> bool:
    return found is not None and found[0] == 0 and found[1] == sizes(whole)[dim]


def _slice_of(node: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    """What a node is a slice of along a dimension, and from where on."""
    if node.op != "call_function" or operator_name(node.target) != "slice":
        return None
    given = given_arguments(node)
    whole, start = given["self"], given.get("start") or 0
    if given.get("dim", 0) % node.meta["val"].dim() != dim or given.get("step", 1) != 1:
        return None
    return (whole, start) if isinstance(start, int) and start >= 0 else None
