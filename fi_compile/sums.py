"""Sums with factors of their own, ``a + alpha · b``, as plain sums of products."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .program import Program, add_call, given_arguments, is_tensor, is_zero, operator_name

aten = torch.ops.aten
_SUMS = ("add", "sub", "rsub")
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # what a sum is worked out in


def with_sums_plain(program: Program) -> Program:
    """The program with factors inside of sums as products by themselves.

    Before and after::

        add(a, b, alpha=c);  rsub(a, b, alpha=c);  baddbmm(m, q, k, beta=b, alpha=c)
        add(a, c * b);       b - c * a;            b * m + c * bmm(q, k)

    In half precision these are worked out in single precision, and rounded once, as the operators do.
    A factor may be a length: what is known of a product is known of it there too.
    """
    if not any(map(_has_factors, program.graph.nodes)):
        return program
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if _has_factors(node):
            copied[node] = _Plain(graph, node, copied, program.sequence.meta["val"].fake_mode).total()
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.lint()
    return replace(program, module=fx.GraphModule(nn.Module(), graph))


def _has_factors(node: fx.Node) -> bool:
    if node.op != "call_function" or not is_tensor(node):
        return False
    name = operator_name(node.target)
    return name == "baddbmm" or (name in _SUMS and given_arguments(node).get("alpha", 1) != 1)


class _Plain:
    """One sum, anew."""

    def __init__(self, graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node], mode: Any) -> None:
        self.graph, self.node, self.mode = graph, node, mode
        self.dtype: torch.dtype = node.meta["val"].dtype
        self.given: dict[str, Any] = fx.map_arg(given_arguments(node), copied.__getitem__)  # type: ignore[assignment]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return add_call(self.graph, self.node, self.mode, target, args, kwargs)

    def total(self) -> fx.Node:
        """The sum, rounded once: in half precision a product by itself may be too large where the sum is not."""
        given = {k: self.widened(v) if is_tensor(v) else v for k, v in self.given.items()}
        found = self.product_added(given) if "batch1" in given else self.sum_of(given)
        return self.converted(found, self.dtype) if self.dtype in _WIDER else found

    def product_added(self, given: dict[str, Any]) -> fx.Node:
        product = self.times(
            self.call(aten.bmm.default, given["batch1"], given["batch2"]), given.get("alpha", 1)
        )
        beta = given.get("beta", 1)
        if is_zero(beta):  # then it is not read, whatever it holds
            return product
        return self.call(aten.add.Tensor, self.times(given["self"], beta), product)

    def sum_of(self, given: dict[str, Any]) -> fx.Node:
        a, b = given["self"], given["other"]
        if operator_name(self.node.target) == "rsub":
            a, b = b, a
        return self.call(*self.plain(a, self.times(b, given.get("alpha", 1))))

    def plain(self, a: Any, b: Any) -> tuple[Any, Any, Any]:
        """The call that adds or takes off, as its operands are tensors or numbers."""
        if operator_name(self.node.target) == "add":
            return (aten.add.Tensor if is_tensor(b) else aten.add.Scalar), a, b
        if not is_tensor(a):
            return aten.rsub.Scalar, b, a
        return (aten.sub.Tensor if is_tensor(b) else aten.sub.Scalar), a, b

    def times(self, value: Any, factor: Any) -> Any:
        """A value in the type of the sum, or a number, multiplied."""
        if not isinstance(factor, fx.Node) and factor == 1:
            return value
        if is_tensor(value):
            value = self.converted(value, _WIDER.get(self.dtype, self.dtype))
            return self.call(aten.mul.Tensor, value, factor)
        numbers = any(isinstance(x, fx.Node) for x in (value, factor))
        return self.call(operator.mul, value, factor) if numbers else value * factor

    def widened(self, value: fx.Node) -> fx.Node:
        """A value in the type that its sum is worked out in, where that is wider than the sum's own."""
        if self.dtype not in _WIDER:
            return value
        return self.converted(self.converted(value, self.dtype), _WIDER[self.dtype])

    def converted(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        same = value.meta["val"].dtype == dtype
        return value if same else self.call(aten._to_copy.default, value, dtype=dtype)
