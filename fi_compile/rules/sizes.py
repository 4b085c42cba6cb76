"""How large entries can become, as numbers: what a mask of -10000 needs that is not minus infinity.

In exp(score - largest score) a hidden position weighs exactly 0 where its score lies far enough below a visible one.
That is a matter of the weights: a norm bounds its rows, a matrix what it makes of them, and by Cauchy and Schwarz a
product of two rows is at most that of their lengths. The bounds hold for every input; they are computed only where a
mask asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fi_compile.facts import is_number
from fi_compile.program import is_integer, is_tensor, operator_name

from .call import Call, Context

_SPLITS = ("split", "split_with_sizes", "chunk", "unbind")


@dataclass(frozen=True)
class Size:
    """``each``: the largest absolute entry. ``rows``: of dimensions, the largest 2-norm of the vectors along them.

    ``convex``: entries along the last dimension are not negative and sum up to at most 1.
    """

    each: float
    rows: Mapping[int, float] = field(default_factory=dict)
    convex: bool = False


class Sizes:
    """The sizes of a program's values, computed when asked for."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.known: dict[fx.Node, Size | None] = {}

    def of(self, node: fx.Node) -> Size | None:
        """What bounds a value, whatever the sequence holds; None where nothing is known."""
        if node not in self.known:
            self.known[node] = None
            self.known[node] = self._of(node)
        return self.known[node]

    def _of(self, node: fx.Node) -> Size | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or (value.is_complex() and self.context.is_data(node)):
            return None
        if not self.context.is_data(node):
            table = self.context.table(node)
            return None if table is None else _of_table(table)
        if node.op != "call_function":
            return None
        call = Call(node, self.context)
        rule = _RULES.get(call.name)
        return None if rule is None else rule(self, call)

    def row(self, node: fx.Node, dim: int) -> float | None:
        """The largest 2-norm along a dimension."""
        size, val = self.of(node), node.meta["val"]
        if size is None:
            return None
        dim %= max(val.dim(), 1)
        count = val.shape[dim]
        by_entry = size.each * math.sqrt(count) if isinstance(count, int) else math.inf
        return min(size.rows.get(dim, math.inf), by_entry)


def _of_table(table: Tensor) -> Size | None:
    if not table.numel():
        return Size(0.0)
    value = table.detach()
    value = value.abs().double() if not value.is_complex() else value.abs()
    if not bool(torch.isfinite(value).all()):
        return None
    rows = {d: float(value.norm(dim=d).max()) for d in range(value.dim())}
    return Size(float(value.max()), rows)


def _copied(sizes: Sizes, call: Call) -> Size | None:
    """The same entries."""
    return sizes.of(call.tensors()[0]) if _floating(call) else None


def _shrunk(sizes: Sizes, call: Call) -> Size | None:
    """Entries of the same place, or fewer of them; at most as large as they were."""
    size = sizes.of(call.tensors()[0]) if _floating(call) else None
    return None if size is None else Size(size.each, size.rows)


def _floating(call: Call) -> bool:
    """Whether argument and result are floating: integers wrap around."""
    return all(n.meta["val"].is_floating_point() for n in (call.node, call.tensors()[0]))


def _expanded(sizes: Sizes, call: Call) -> Size | None:
    size, before = sizes.of(call.tensors()[0]), call.tensors()[0].meta["val"].shape
    if size is None:
        return None
    after = call.node.meta["val"].shape
    more = len(after) - len(before)
    same = {d for d, n in enumerate(before) if isinstance(n, int) and after[d + more] == n}
    return Size(size.each, {d + more: r for d, r in size.rows.items() if d in same})


def _picked(sizes: Sizes, call: Call) -> Size | None:
    """A piece of a value that was split."""
    source = call.node.args[0]
    if not isinstance(source, fx.Node) or operator_name(source.target) not in _SPLITS:
        return None
    (whole,) = source.all_input_nodes[:1]
    size = sizes.of(whole)
    if size is None:
        return None
    return Size(size.each, {} if operator_name(source.target) == "unbind" else size.rows)


def _bounded(sizes: Sizes, call: Call) -> Size:
    """At most 1 whatever comes in."""
    return Size(1.0)


def _view(sizes: Sizes, call: Call) -> Size | None:
    """The last dimension whole, or a part of it: the norm of a part is no larger."""
    (node,) = call.tensors()[:1]
    size = sizes.of(node)
    before, after = node.meta["val"].shape, call.node.meta["val"].shape
    if size is None or not before or not after:
        return size
    a, b = before[-1], after[-1]
    part = isinstance(a, int) and isinstance(b, int) and a % b == 0
    row = sizes.row(node, -1) if part else None
    return Size(size.each, {} if row is None else {len(after) - 1: row})


def _permuted(sizes: Sizes, call: Call) -> Size | None:
    (node,) = call.tensors()[:1]
    size = sizes.of(node)
    if size is None:
        return None
    order = list(range(node.meta["val"].dim()))
    if call.name == "permute":
        order = [call.dim(d, len(order)) for d in call.arg("dims")]
    else:
        a, b = (call.dim(call.arg(k), len(order)) for k in [k for k in call.arguments if k != "self"][:2])
        order[a], order[b] = order[b], order[a]
    return Size(size.each, {new: size.rows[old] for new, old in enumerate(order) if old in size.rows})


def _unsqueezed(sizes: Sizes, call: Call) -> Size | None:
    size = sizes.of(call.tensors()[0])
    if size is None:
        return None
    dim = call.dim(call.arg("dim"), call.node.meta["val"].dim())
    return Size(size.each, {d + (d >= dim): r for d, r in size.rows.items()})


def _sum(sizes: Sizes, call: Call) -> Size | None:
    scale = call.arg("alpha", 1)
    parts = [_part(sizes, call, "self"), _part(sizes, call, "other")]
    if not is_number(scale) or any(p is None for p in parts):
        return None
    a, b = parts
    assert a is not None
    assert b is not None
    rank = call.node.meta["val"].dim()
    rows = {}
    for d in range(rank):
        both = [_row(sizes, call, name, d - rank) for name in ("self", "other")]
        if both[0] is not None and both[1] is not None:
            rows[d] = both[0] + abs(scale) * both[1]
    return Size(a.each + abs(scale) * b.each, rows)


def _row(sizes: Sizes, call: Call, name: str, dim: int) -> float | None:
    """The norm along a dimension, counted from the end, of an operand that has it whole."""
    node = call.arg(name)
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return None
    shape, whole = node.meta["val"].shape, call.node.meta["val"].shape
    if -dim > len(shape) or not isinstance(whole[dim], int) or shape[dim] != whole[dim]:
        return None
    return sizes.row(node, dim)


def _part(sizes: Sizes, call: Call, name: str) -> Size | None:
    value = call.arg(name)
    if isinstance(value, fx.Node):
        return None if is_integer(value) else sizes.of(value)
    return Size(float(abs(value))) if is_number(value) else None


def _product(sizes: Sizes, call: Call) -> Size | None:
    for name, other in (("self", "other"), ("other", "self")):
        if _is_rms(call.arg(name), call.arg(other), call.context):
            length, last = math.sqrt(call.node.meta["val"].shape[-1]), call.node.meta["val"].dim() - 1
            return Size(length, {last: length})
    a, b = _part(sizes, call, "self"), _part(sizes, call, "other")
    if a is None or b is None:
        return None
    rank, rows = call.node.meta["val"].dim(), {}
    for d in range(rank):
        ways = []
        for name, other in (("self", b), ("other", a)):
            row = _row(sizes, call, name, d - rank)
            if row is not None:
                ways.append(row * other.each)
        if ways:
            rows[d] = min(ways)
    return Size(a.each * b.each, rows)


def _is_rms(x: Any, scale: Any, context: Context) -> bool:
    """Whether ``scale`` is 1 / sqrt(mean of x² over the last dimension + ε)."""
    nodes = []
    for name in ("rsqrt", "add", "mean"):
        if (
            not isinstance(scale, fx.Node)
            or operator_name(scale.target) != name
            or not isinstance(x, fx.Node)
        ):
            return False
        nodes.append(Call(scale, context))
        scale = nodes[-1].arg("self")
    over, square = nodes[2], scale
    added = nodes[1].arg("other")
    if not (is_number(added) and added >= 0 and over.arg("keepdim") and isinstance(square, fx.Node)):
        return False
    rank, dims = x.meta["val"].dim(), over.arg("dim")
    whole = isinstance(x.meta["val"].shape[-1], int) and [d % rank for d in dims or ()] == [rank - 1]
    power = operator_name(square.target) == "pow" and square.args[1] == 2 and square.args[0] is x
    times = operator_name(square.target) == "mul" and tuple(square.args) == (x, x)
    return whole and bool(power or times)


def _quotient(sizes: Sizes, call: Call) -> Size | None:
    size, by = sizes.of(call.arg("self")), call.arg("other")
    if size is None or not is_number(by) or by == 0 or call.arg("rounding_mode") is not None:
        return None
    return Size(size.each / abs(by), {d: r / abs(by) for d, r in size.rows.items()})


def _normed(sizes: Sizes, call: Call) -> Size | None:
    """A normalised row has length √D at most."""
    shape = call.arg("normalized_shape")
    if len(shape) != 1 or not isinstance(shape[0], int):
        return None
    length, last = math.sqrt(shape[0]), call.node.meta["val"].dim() - 1
    weight, bias = (
        sizes.of(call.arg(k)) if call.has(k) else Size(d) for k, d in (("weight", 1.0), ("bias", 0.0))
    )
    if weight is None or bias is None:
        return None
    each = length * weight.each
    return Size(each + bias.each, {last: each + bias.rows.get(0, 0.0)})


def _linear(sizes: Sizes, call: Call) -> Size | None:
    """The rows of the matrix against a row of the input."""
    return _mapped(sizes, call, call.arg("input"), call.arg("weight"), call.arg("bias"), turned=False)


def _addmm(sizes: Sizes, call: Call) -> Size | None:
    if call.arg("alpha", 1) != 1 or call.arg("beta", 1) != 1:
        return None
    return _mapped(sizes, call, call.arg("mat1"), call.arg("mat2"), call.arg("self"), turned=True)


def _mapped(
    sizes: Sizes, call: Call, x: fx.Node, weight: fx.Node, bias: fx.Node | None, *, turned: bool
) -> Size | None:
    """A row of x times a matrix [out, in], or [in, out] ``turned``, plus a bias."""
    row = sizes.row(x, -1)
    if row is None or sizes.context.is_data(weight):
        return None
    table = sizes.context.table(weight)
    added = sizes.of(bias) if isinstance(bias, fx.Node) else Size(0.0)
    if table is None or table.dim() != 2 or added is None or table.is_complex():
        return None
    matrix = (table.mT if turned else table).detach().double()
    each = float(matrix.norm(dim=1).max()) * row
    whole = float(torch.linalg.matrix_norm(matrix, 2)) * row
    last = call.node.meta["val"].dim() - 1
    rank = 1 if bias is None else bias.meta["val"].dim()
    return Size(each + added.each, {last: whole + added.rows.get(rank - 1, 0.0)} if rank == 1 else {})


def _weights(sizes: Sizes, call: Call) -> Size:
    rank = call.node.meta["val"].dim()
    last = call.dim(call.arg("dim"), rank) == rank - 1
    return Size(1.0, {rank - 1: 1.0} if last else {}, convex=last)


def _matmul(sizes: Sizes, call: Call) -> Size | None:
    """Weights that sum up to 1 average the rows; else Cauchy and Schwarz."""
    a, b = call.node.args[:2]
    left, right = sizes.of(a), sizes.of(b)  # type: ignore[arg-type]
    if left is None or right is None:
        return None
    rank, last = call.node.meta["val"].dim(), b.meta["val"].dim() - 1  # type: ignore[union-attr]
    if b.meta["val"].dim() < 2:  # type: ignore[union-attr]
        return None
    if b.meta["val"].dim() == 2 and not sizes.context.is_data(b):  # type: ignore[union-attr, arg-type]
        return _mapped(sizes, call, a, b, None, turned=True)  # type: ignore[arg-type]
    if left.convex:
        return Size(right.each, {rank - 1: right.rows[last]} if last in right.rows else {})
    rows = sizes.row(a, -1), sizes.row(b, -2)  # type: ignore[arg-type]
    if rows[0] is None or rows[1] is None or not math.isfinite(rows[0] * rows[1]):
        return None
    return Size(rows[0] * rows[1])


def _attention(sizes: Sizes, call: Call) -> Size | None:
    value = sizes.of(call.arg("value"))
    if value is None:
        return None
    last = call.node.meta["val"].dim() - 1
    return Size(value.each, {last: value.rows[last]} if last in value.rows else {})


def _embedded(sizes: Sizes, call: Call) -> Size | None:
    size, last = sizes.of(call.arg("weight")), call.node.meta["val"].dim() - 1
    return None if size is None else Size(size.each, {last: size.rows[1]})


def _joined(sizes: Sizes, call: Call) -> Size | None:
    joined = list(call.arg("tensors"))  # one of them may occur twice
    parts = [sizes.of(n) for n in joined]
    found = [p for p in parts if p is not None]
    if len(found) < len(parts) or call.name != "cat":
        return Size(max(p.each for p in found)) if found and len(found) == len(parts) else None
    rank = call.node.meta["val"].dim()
    dim = call.dim(call.arg("dim", 0), rank)
    rows = [sizes.row(n, dim) for n in joined]
    known = [r for r in rows if r is not None and math.isfinite(r)]
    whole = {dim: math.sqrt(sum(r * r for r in known))} if len(known) == len(rows) else {}
    return Size(max(p.each for p in found), whole)


_RULES: dict[str, Callable[[Sizes, Call], Size | None]] = {
    **dict.fromkeys(("to", "_to_copy", "type_as", "clone", "contiguous", "dropout", "alias", "detach"), _copied),
    **dict.fromkeys(("neg", "abs", "relu", "silu", "gelu", "slice"), _shrunk),
    **dict.fromkeys(("sigmoid", "tanh", "sin", "cos"), _bounded),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _view),
    **dict.fromkeys(("transpose", "permute"), _permuted),
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    **dict.fromkeys(("softmax", "_softmax"), _weights),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normed),
    **dict.fromkeys(("cat", "stack"), _joined),
    "expand": _expanded,
    "getitem": _picked,
    "unsqueeze": _unsqueezed,
    "mul": _product,
    "div": _quotient,
    "linear": _linear,
    "addmm": _addmm,
    "embedding": _embedded,
    "scaled_dot_product_attention": _attention,
}  # fmt: skip
