"""Two traces of one model compared: the same computation at given lengths, or the same operators on data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .program import Kind, Program, as_expr, given_arguments, is_integer, is_tensor, operator_name, sizes
from .symbolic import evaluate_at

_BATCHES = (3, 5)
# Operators whose integers are sizes and places, never factors or exponents.
_SIZED = frozenset(
    {
        "view", "reshape", "_unsafe_view", "expand", "roll", "unflatten", "split", "chunk",
        "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft",
    }
)  # fmt: skip
# Operators that move data and compute nothing: one graph may have them where another has not.
_MOVES = frozenset(
    {"slice", "narrow", "constant_pad_nd", "pad", "clone", "contiguous", "_assert_tensor_metadata"}
)
_COPIES = frozenset({"clone", "contiguous", "alias", "lift_fresh_copy", "lift_fresh"})
# Operators that show the value written, where it is as large as the place it is written to.
_WRITES = frozenset({"slice_scatter", "copy"})
_SLICED = {"slice": 1, "slice_scatter": 2}  # how many tensors come before the bounds
# Operators with one meaning: which of them a trace has depends on what torch knew of the strides.
_VIEWS = frozenset(
    {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default}
)
# Operators that change nothing where they leave the shape as it is.
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "expand"})


def is_same(program: Program, other: Program, at: np.ndarray, batches: Sequence[int] = _BATCHES) -> bool:
    """Whether two graphs make the same calls on the same values, each integer equal, at all these lengths and batches.

    Then either one computes the other's outputs there, bit by bit. Calls that change nothing are passed over.
    """
    try:
        return _Same(program, other, at, batches).holds()
    except KeyError:  # a size that neither the length nor the batch gives
        return False


class _Same:
    def __init__(self, program: Program, other: Program, at: np.ndarray, batches: Sequence[int]) -> None:
        self.sides = program, other
        lengths = np.asarray(at, dtype=np.int64).reshape(1, -1)
        own = [p.batch for p in self.sides if isinstance(p.batch, int)]
        self.batches = np.asarray([own[:1] if own else list(batches)], dtype=np.int64).T
        self.lengths = lengths + 0 * self.batches
        self.batches = self.batches + 0 * lengths
        self.known: dict[tuple[int, str], np.ndarray] = {}
        self.inputs = [{p.nodes[i.name]: i for i in p.inputs} for p in self.sides]

    def holds(self) -> bool:
        ours, theirs = self.sides
        if {b for b in (ours.batch, theirs.batch) if isinstance(b, int)} - set(self.batches.flat):
            return False
        if ours.out_spec != theirs.out_spec:
            return False
        todo = list(zip(ours.outputs, theirs.outputs, strict=True))
        seen: set[tuple[fx.Node, fx.Node]] = set()
        while todo:
            a, b = todo.pop()
            if isinstance(a, fx.Node) and isinstance(b, fx.Node) and not (is_integer(a) or is_integer(b)):
                a, b = self.source(0, a), self.source(1, b)
                if (a, b) in seen:
                    continue
                seen.add((a, b))
                if a.op == "placeholder" or b.op == "placeholder":
                    if not self.same_input(a, b):
                        return False
                    continue
                if _meaning(a) != _meaning(b):
                    return False
                if a.target in _VIEWS:
                    if not self.same_sizes(a, b):
                        return False
                    todo.append((a.args[0], b.args[0]))
                    continue
                x, spec = pytree.tree_flatten(_arguments(a))
                y, other_spec = pytree.tree_flatten(_arguments(b))
                if (name := operator_name(a.target)) in _SLICED:
                    if not self.same_slice(a, b):
                        return False
                    x, y = x[: _SLICED[name]], y[: _SLICED[name]]
                elif spec != other_spec:
                    return False
                todo.extend(zip(x, y, strict=True))
            elif not self.same_number(a, b):
                return False
        return True

    def source(self, side: int, node: fx.Node) -> fx.Node:
        """The value a node shows, behind calls that change nothing at these lengths."""
        while node.op == "call_function":
            name = operator_name(node.target)
            before = node.args[0] if node.args else None
            if not (isinstance(before, fx.Node) and is_tensor(before)):
                return node
            if name in _COPIES:
                node = before
                continue
            if name in _WRITES:
                written = _arguments(node)[1]
                if not self.same_shape(side, written, node):
                    return node
                node = written
                continue
            idle = name in _RESHAPES or (name == "slice" and _arguments(node)[4] == 1)
            if name in ("constant_pad_nd", "pad"):
                idle = all(not self.value(side, p).any() for p in _listed(node.args[1]))
            if not idle or not self.same_shape(side, before, node):
                return node
            node = before
        return node

    def same_shape(self, side: int, a: fx.Node, b: fx.Node) -> bool:
        # A view may read bits as numbers of another kind.
        return a.meta["val"].dtype == b.meta["val"].dtype and self.same_sizes(a, b, (side, side))

    def same_sizes(self, a: fx.Node, b: fx.Node, sides: tuple[int, int] = (0, 1)) -> bool:
        """Whether two values, one of either graph if nothing else is said, have one shape."""
        ours, theirs = sizes(a), sizes(b)
        return len(ours) == len(theirs) and all(
            np.array_equal(self.value(sides[0], x), self.value(sides[1], y))
            for x, y in zip(ours, theirs, strict=True)
        )

    def same_slice(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two slices, that are read or written, have the same bounds, as Python reads them."""
        bounds = []
        for side, node in enumerate((a, b)):
            source, dim, start, end, step = (_arguments(node)[i] for i in (0, -4, -3, -2, -1))
            size = self.value(side, sizes(source)[dim])
            shown = [
                default if v is None else self.value(side, v) for v, default in ((start, 0), (end, size))
            ]
            shown = [np.clip(np.where(v < 0, v + size, v), 0, size) for v in shown]
            bounds.append((dim % len(sizes(source)), step, shown))
        (dim, step, ours), (other_dim, other_step, theirs) = bounds
        return (dim, step) == (other_dim, other_step) and all(map(np.array_equal, ours, theirs))

    def value(self, side: int, size: Any) -> np.ndarray:
        expr = as_expr(size)
        if (side, str(expr)) not in self.known:
            program, lengths, batches = self.sides[side], self.lengths, self.batches
            if program.batch not in getattr(expr, "free_symbols", ()):  # once will do
                lengths, batches = lengths[:1], batches[:1]
            found = evaluate_at(expr, {program.length: lengths, program.batch: batches}, lengths.shape)
            self.known[side, str(expr)] = np.broadcast_to(found, self.lengths.shape)
        return self.known[side, str(expr)]

    def same_number(self, a: Any, b: Any) -> bool:
        if not (_is_number(a) and _is_number(b)):
            return type(a) is type(b) and a == b
        try:
            return _kind(a) is _kind(b) and np.array_equal(self.value(0, a), self.value(1, b))
        except (KeyError, TypeError):  # a number computed from data
            return False

    def same_input(self, a: fx.Node, b: fx.Node) -> bool:
        one, two = self.inputs[0].get(a), self.inputs[1].get(b)
        if one is None or two is None or one.kind is not two.kind:
            return False
        if one.kind is Kind.SEQUENCE:
            return True
        ours, theirs = self.sides[0].values[one.name], self.sides[1].values[two.name]
        return ours is theirs or (one.kind is Kind.CONSTANT and _identical(ours, theirs))


def _meaning(node: fx.Node) -> Any:
    """What an operator does, whatever its name."""
    return "view" if node.target in _VIEWS else node.target


def _arguments(node: fx.Node) -> list[Any]:
    """All arguments in the operator's own order, defaults put in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [*node.args, *node.kwargs.values()]
    given = given_arguments(node)
    return [given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_number(value: Any) -> bool:
    return is_integer(value) or isinstance(value, (bool, int, float))


def _kind(value: Any) -> type:
    """Integer, float or flag: operators treat them differently."""
    value = value.meta["val"] if isinstance(value, fx.Node) else value
    return {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}.get(type(value), type(value))


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and bool(torch.equal(a, b))


def are_alike(program: Program, other: Program, lengths: Iterable[int]) -> bool:
    """Whether two graphs apply the same operators to data, up to sizes and to moves.

    The tables that meet data there, evaluated at ``lengths``, have other shapes or the same values.
    """
    ours, theirs = _data_nodes(program), _data_nodes(other)
    if len(ours) != len(theirs):
        return False
    partner: dict[fx.Node, fx.Node] = {program.sequence: other.sequence}
    moved = {**_unmoved(program), **_unmoved(other)}
    tables: list[tuple[fx.Node, fx.Node]] = []

    def match(a: Any, b: Any, sized: bool) -> bool:
        ours, spec = pytree.tree_flatten(a)
        theirs, other_spec = pytree.tree_flatten(b)
        return spec == other_spec and all(same(x, y, sized) for x, y in zip(ours, theirs, strict=True))

    def same(x: Any, y: Any, sized: bool) -> bool:
        if _is_size(x) and _is_size(y) and (sized or is_integer(x) or is_integer(y)):
            return True
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            if x in program.input_dependent or y in other.input_dependent:
                return partner.get(moved.get(x, x)) is moved.get(y, y)
            tables.append((x, y))
            return True
        return type(x) is type(y) and x == y

    for a, b in zip(ours, theirs, strict=True):
        sized = operator_name(a.target) in _SIZED
        if _meaning(a) != _meaning(b) or not match((a.args, a.kwargs), (b.args, b.kwargs), sized):
            return False
        partner[a] = b
    return match(program.outputs, other.outputs, False) and all(
        _tables_agree(program, other, tables, n) for n in lengths
    )


def _tables_agree(
    program: Program, other: Program, tables: Sequence[tuple[fx.Node, fx.Node]], length: int
) -> bool:
    """Whether tables of equal shape hold the same numbers at one length, up to the rounding of their type."""
    batch = program.batch if isinstance(program.batch, int) else 1
    example = program.example
    dummy = example.new_zeros((1,) * example.dim()).expand(batch, length, *example.shape[2:])
    with torch.no_grad():
        try:
            ours = program.evaluate(dummy, keep={a for a, _ in tables})
        except Exception:
            return True  # it is not meant for this length: what comes of the tables is compared
        theirs = other.evaluate(dummy, keep={b for _, b in tables})
    return all(close(ours[a], theirs[b]) for a, b in tables)


def close(a: Any, b: Any) -> bool:
    """Whether two tables of one shape hold the same numbers, up to the rounding of their type."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape:
        return True
    if a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return bool(torch.equal(a, b))
    scale = float(a.abs().nan_to_num(posinf=0.0).max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=64 * torch.finfo(a.dtype).eps * scale, equal_nan=True)


def _data_nodes(program: Program) -> list[fx.Node]:
    data = program.input_dependent
    return [
        n
        for n in program.graph.nodes
        if n in data and n is not program.sequence and operator_name(n.target) not in _MOVES
    ]


def _unmoved(program: Program) -> dict[fx.Node, fx.Node]:
    """What each moved value was before it was moved."""
    found: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if operator_name(node.target) in _MOVES:
            (source,) = node.all_input_nodes[:1]
            found[node] = found.get(source) or source
    return found


def _is_size(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, int) and not isinstance(value, bool))
