"""Heads that were folded into the batch, apart again.

Attention is often written on ``[batch · heads, length, width]``, so that one ``bmm`` serves all. Rows of that dimension
are neither rows of the batch nor features, and nothing can be kept of it row by row. The same operators run on
``[batch, heads, length, width]``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx, nn

from .compare import same_function
from .program import Program, add_call, as_expr, given_arguments, is_integer, is_tensor, operator_name, sizes
from .rules.pointwise import UNARY_ANY, UNARY_LINEAR, UNARY_ZERO

aten = torch.ops.aten
_BY_ENTRY = frozenset(
    {*UNARY_LINEAR, *UNARY_ZERO, *UNARY_ANY, "add", "sub", "rsub", "mul", "div", "true_divide"}
)
_BY_ENTRY -= {"view_as_real", "polar", "complex"}
_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten"})
_ALONG = frozenset({
    "softmax", "_softmax", "log_softmax", "_log_softmax", "sum", "mean", "amax", "amin", "logsumexp", "cumsum", "slice",
    "select", "narrow", "index_select", "unsqueeze", "squeeze", "flip", "roll", "cat", "stack", "cumprod",
})  # fmt: skip
_LAST = frozenset({"tril", "triu", "constant_pad_nd", "pad", "layer_norm", "linear"})
_FACTORIES = frozenset({"zeros", "ones", "full", "empty"})


@dataclass(frozen=True)
class Fold:
    """A dimension of ``outer · inner`` entries: the rows of the batch and so many heads, in either order."""

    dim: int
    outer: Any
    inner: Any


def with_heads_apart(program: Program) -> Program:
    """The program with dimensions of batch · heads as two, as far as operators on them are known.

    Before and after::

        scores = bmm(view(q, [b * 4, s, 8]), view(k, [b * 4, 8, s]))
        scores = matmul(view(q, [b, 4, s, 8]), view(k, [b, 4, 8, s]))

    Any other operator gets the dimension as it was. Where the twins do not compute the same, nothing is changed.
    """
    if isinstance(program.batch, int) or not any(
        _folded(program, node) is not None for node in program.input_dependent
    ):
        return program
    found = _Unfolding(program).run()
    return found if same_function(found, program) else program


def _folded(program: Program, node: fx.Node) -> tuple[int, int] | None:
    """The one dimension of k rows for each row of the batch, and k."""
    if not is_tensor(node):
        return None
    found = []
    for dim, size in enumerate(sizes(node)):
        if getattr(size, "free_symbols", None) == {program.batch}:
            share = sympy.simplify(size / program.batch)
            if share.is_Integer and int(share) > 1:
                found.append((dim, int(share)))
    return found[0] if len(found) == 1 else None


class _Unfolding:
    """The new graph as it grows: every node as it was, of folded ones also the form with heads apart."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.copied: dict[fx.Node, fx.Node] = {}
        self.apart: dict[fx.Node, tuple[fx.Node, Fold]] = {}
        self.node: fx.Node = program.sequence

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            self.node = node
            try:
                made = self.unfold(node)
            except (RuntimeError, TypeError, ValueError, IndexError):  # the operator does not take it so
                made = None
            if made is not None:
                self.apart[node] = made
            if made is None or is_integer(node):
                for used in node.all_input_nodes:
                    self.whole(used)
                self.copied[node] = self.graph.node_copy(node, self.copied.__getitem__)
            elif _folded(self.program, node) is None:  # split again: nothing is folded any more
                self.copied[node] = made[0]
                del self.apart[node]
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return replace(self.program, module=fx.GraphModule(nn.Module(), self.graph))

    # -- pieces --------------------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node in place of the present one, with its value's shape."""
        mode = self.program.sequence.meta["val"].fake_mode
        return add_call(self.graph, self.node, mode, target, args, kwargs)

    def whole(self, node: fx.Node) -> fx.Node:
        """A value as it was, folded."""
        if node not in self.copied:
            value, _ = self.apart[node]
            self.copied[node] = self.shaped(value, node.meta["val"].shape)
        return self.copied[node]

    def shaped(self, node: fx.Node, shape: Sequence[Any]) -> fx.Node:
        """A value in another shape, if it has not that shape already."""
        if list(sizes(node)) == [as_expr(size) for size in shape]:
            return node
        return self.call(aten.reshape.default, node, self.numbers(shape))

    def numbers(self, shape: Sequence[Any]) -> list[Any]:
        """Sizes as a call takes them: numbers, or nodes of the graph."""
        return [self.number(size) for size in shape]

    def number(self, size: Any) -> Any:
        """A size as a number or a node of the graph."""
        expr = as_expr(size)
        if not getattr(expr, "free_symbols", None):
            return int(expr)
        for node in self.graph.nodes:
            if is_integer(node) and as_expr(node) == expr:
                return node
        for node in self.graph.nodes:
            if is_tensor(node) and expr in sizes(node):
                return self.call(aten.sym_size.int, node, sizes(node).index(expr))
        rows = self.number(self.program.batch)
        return self.call(operator.mul, rows, int(sympy.simplify(expr / self.program.batch)))

    def split(self, node: fx.Node, fold: Fold) -> fx.Node:
        """A folded value with its heads apart, in this order."""
        if node in self.apart and self.apart[node][1] == fold:
            return self.apart[node][0]
        return self.shaped(self.whole(node), _with(node.meta["val"].shape, fold))

    def operand(self, node: fx.Node, rank: int, fold: Fold) -> fx.Node:
        """What broadcasts, aligned at the right, with a result of ``rank`` dimensions that is folded so."""
        own = fold.dim - rank + node.meta["val"].dim()
        if own < 0:
            return self.whole(node)
        if as_expr(node.meta["val"].shape[own]) == 1:
            return self.call(aten.unsqueeze.default, self.whole(node), own)
        return self.split(node, replace(fold, dim=own))

    # -- operators -----------------------------------------------------------------------------------------

    def unfold(self, node: fx.Node) -> tuple[fx.Node, Fold] | None:
        """The node with heads apart; None where it has none, or the operator is not known."""
        if node.op != "call_function" or not is_tensor(node):
            return None
        name, shape = operator_name(node.target), _folded(self.program, node)
        if name in _VIEWS:
            return self.view(node, shape)
        if shape is None:
            return None
        dim, heads = shape
        if name in ("repeat", "repeat_interleave"):
            return self.repeated(node, dim, heads)
        fold = self.fold(node, dim, heads)
        if fold is None:
            return None
        rank = node.meta["val"].dim()
        if name in _BY_ENTRY:
            return self.mapped(node, rank, fold), fold
        if name == "type_as":
            lent = node.args[1]
            other = self.apart[lent][0] if lent in self.apart else self.whole(lent)  # type: ignore[index, arg-type]
            return self.again(node, {"self": self.split(_first(node), fold), "other": other}), fold
        if name in _FACTORIES:
            listed = self.numbers(_with(node.meta["val"].shape, fold))
            return self.again(node, {"size": listed}), fold
        if name in ("transpose", "permute"):
            return self.permuted(node)
        if name == "expand":
            listed = self.numbers(_with(node.meta["val"].shape, fold))
            return self.call(aten.expand.default, self.operand(_first(node), rank, fold), listed), fold
        if name in ("bmm", "matmul", "scaled_dot_product_attention") and dim < rank - 2:
            return self.product(node, name, rank, fold), fold
        if name == "einsum":
            return self.einsum(node, fold)
        if name in _ALONG:
            return self.along(node, fold)
        if name in _LAST and dim == 0 and rank > 2 and _first(node).meta["val"].dim() == rank:
            return self.again(node, {next(iter(given_arguments(node))): self.split(_first(node), fold)}), fold
        return None

    def fold(self, node: fx.Node, dim: int, heads: int) -> Fold | None:
        """How a node's folded dimension is made up: as that of what comes in."""
        folds = [self.apart[a][1] for a in node.all_input_nodes if a in self.apart]
        if not folds and operator_name(node.target) not in _FACTORIES:
            return None
        batch = self.program.batch
        outer, inner = (folds[0].outer, folds[0].inner) if folds else (batch, heads)
        return Fold(dim, outer, inner) if _same(outer * inner, heads * batch) else None

    def view(self, node: fx.Node, shape: tuple[int, int] | None) -> tuple[fx.Node, Fold] | None:
        source = _first(node)
        known = self.apart.get(source)
        if shape is None:
            if known is None:
                return None
            return self.shaped(known[0], node.meta["val"].shape), known[1]
        dim, heads = shape
        value = known[0] if known is not None else self.whole(source)
        before = sympy.Mul(*map(sympy.sympify, sizes(node)[:dim]))
        passed: Any = sympy.Integer(1)
        rest = list(sizes(value))
        while rest and (not _same(passed, before) or rest[0] == 1):
            passed = passed * rest.pop(0)
        batch = self.program.batch
        outer, inner = (batch, heads) if rest and rest[0] == batch else (heads, batch)
        fold = Fold(dim, outer, inner)
        return self.shaped(value, _with(node.meta["val"].shape, fold)), fold

    def repeated(self, node: fx.Node, dim: int, heads: int) -> tuple[fx.Node, Fold] | None:
        """Rows of the batch, each once for every head: side by side, or the whole batch again and again."""
        source = _first(node)
        given, batch = given_arguments(node), self.program.batch
        if source.meta["val"].dim() != node.meta["val"].dim() or sizes(source)[dim] != batch:
            return None
        if any(a != b for d, (a, b) in enumerate(zip(sizes(source), sizes(node), strict=True)) if d != dim):
            return None
        together = operator_name(node.target) == "repeat"
        if not together and not isinstance(given.get("repeats"), int):
            return None
        fold = Fold(dim, heads, batch) if together else Fold(dim, batch, heads)
        one = self.call(aten.unsqueeze.default, self.whole(source), dim if together else dim + 1)
        listed = self.numbers(_with(node.meta["val"].shape, fold))
        return self.call(aten.expand.default, one, listed), fold

    def mapped(self, node: fx.Node, rank: int, fold: Fold) -> fx.Node:
        def given(a: fx.Node) -> fx.Node:
            return self.copied[a] if is_integer(a) else self.operand(a, rank, fold)

        args, kwargs = fx.map_arg((node.args, node.kwargs), given)
        return self.call(node.target, *args, **kwargs)  # type: ignore[arg-type]

    def permuted(self, node: fx.Node) -> tuple[fx.Node, Fold] | None:
        source = _first(node)
        if source not in self.apart:
            return None
        value, fold = self.apart[source]
        rank = source.meta["val"].dim()
        order = list(range(rank))
        if operator_name(node.target) == "permute":
            order = [d % rank for d in node.args[1]]  # type: ignore[union-attr]
        else:
            a, b = (d % rank for d in node.args[1:3])  # type: ignore[operator]
            order[a], order[b] = order[b], order[a]
        to = order.index(fold.dim)
        wide = [d + (d > fold.dim) for d in order]
        wide.insert(to + 1, fold.dim + 1)
        return self.call(aten.permute.default, value, wide), replace(fold, dim=to)

    def product(self, node: fx.Node, name: str, rank: int, fold: Fold) -> fx.Node:
        given = given_arguments(node)
        if name == "scaled_dot_product_attention":
            new = {k: self.operand(v, rank, fold) for k, v in given.items() if is_tensor(v)}
            return self.again(node, new)
        a, b = (self.operand(given[k], rank, fold) for k in ("self", "mat2" if name == "bmm" else "other"))
        return self.call(aten.matmul.default, a, b)

    def einsum(self, node: fx.Node, fold: Fold) -> tuple[fx.Node, Fold] | None:
        given = given_arguments(node)
        equation, operands = str(given["equation"]).replace(" ", ""), list(given["tensors"])
        left, arrow, out = equation.partition("->")
        if not arrow or "." in equation:
            return None
        letter = out[fold.dim]
        second = next(c for c in "abcdefghijklmnopqrstuvwxyz" if c not in equation)
        new = []
        for names, operand in zip(left.split(","), operands, strict=True):
            if names.count(letter) > 1:
                return None
            here = names.find(letter)
            new.append(self.whole(operand) if here < 0 else self.split(operand, replace(fold, dim=here)))
        equation = equation.replace(letter, letter + second)
        return self.call(aten.einsum.default, equation, new), fold

    def along(self, node: fx.Node, fold: Fold) -> tuple[fx.Node, Fold] | None:
        """An operator along one dimension, or some, that are not the folded one."""
        given = given_arguments(node)
        key = next((k for k in ("dim", "dims") if k in given), None)
        if key is None and operator_name(node.target) not in ("slice", "cat", "stack"):
            return None
        asked = given.get(key or "dim", 0)
        listed = asked if isinstance(asked, (list, tuple)) else [asked]
        before = _first(node)
        rank = before.meta["val"].dim() + (operator_name(node.target) in ("unsqueeze", "stack"))
        dims = [d % rank for d in listed]
        if not dims:
            return None
        made = fold.dim  # the folded dimension of what comes in
        own = _folded(self.program, before)
        if own is None or (operator_name(node.target) not in ("unsqueeze", "stack") and own[0] in dims):
            return None
        source = replace(fold, dim=own[0])
        if operator_name(node.target) in ("unsqueeze", "stack"):
            moved = [d + (d > made) for d in dims]
        else:
            moved = [d + (d > own[0]) for d in dims]
        first = next(iter(given))
        parts = given[first]
        values = (
            [self.split(p, source) for p in parts]
            if isinstance(parts, (list, tuple))
            else self.split(parts, source)
        )
        new = {first: values, key or "dim": moved if isinstance(asked, (list, tuple)) else moved[0]}
        return self.again(node, new), fold

    def again(self, node: fx.Node, new: Mapping[str, Any]) -> fx.Node:
        """The same operator with some arguments replaced, by name."""
        given = fx.map_arg({k: v for k, v in given_arguments(node).items() if k not in new}, self.whole)
        merged = {**given, **new}
        schema = node.target._schema  # type: ignore[union-attr]
        args = [merged[a.name] for a in schema.arguments if not a.kwarg_only and a.name in merged]
        by_place = [a.name for a in schema.arguments if not a.kwarg_only]
        present = [a for a in by_place if a in merged]
        kwargs = {a.name: merged[a.name] for a in schema.arguments if a.kwarg_only and a.name in merged}
        if present != by_place[: len(present)]:  # some left out in between: by name from there on
            args, kwargs = [], merged
        return self.call(node.target, *args, **kwargs)  # type: ignore[arg-type]


def _with(shape: Sequence[Any], fold: Fold) -> list[Any]:
    return [*shape[: fold.dim], fold.outer, fold.inner, *shape[fold.dim + 1 :]]


def _same(a: Any, b: Any) -> bool:
    return sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0


def _first(node: fx.Node) -> fx.Node:
    first: Any = node.args[0]
    return first[0] if isinstance(first, (list, tuple)) else first
