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


def with_sums_plain(program: Program) -> Program:
    """The program with factors inside of sums as products by themselves.

    Before and after::

        add(a, b, alpha=c);  rsub(a, b, alpha=c);  baddbmm(m, q, k, beta=b, alpha=c)
        add(a, c * b);       b - c * a;            b * m + c * bmm(q, k)

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
        self.given: dict[str, Any] = fx.map_arg(given_arguments(node), copied.__getitem__)  # type: ignore[assignment]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return add_call(self.graph, self.node, self.mode, target, args, kwargs)

    def total(self) -> fx.Node:
        alpha = self.given.get("alpha", 1)
        if operator_name(self.node.target) == "baddbmm":
            product = self.times(
                self.call(aten.bmm.default, self.given["batch1"], self.given["batch2"]), alpha
            )
            beta = self.given.get("beta", 1)
            if is_zero(beta):  # then it is not read, whatever it holds
                return product
            return self.call(aten.add.Tensor, self.times(self.given["self"], beta), product)
        a, b = self.given["self"], self.given["other"]
        if operator_name(self.node.target) == "rsub":
            a, b = b, a
        return self.call(*self.plain(a, self.times(b, alpha)))

    def plain(self, a: Any, b: Any) -> tuple[Any, Any, Any]:
        """The call that adds or takes off, as its operands are tensors or numbers."""
        if operator_name(self.node.target) == "add":
            return (aten.add.Tensor if is_tensor(b) else aten.add.Scalar), a, b
        if not is_tensor(a):
            return aten.rsub.Scalar, b, a
        return (aten.sub.Tensor if is_tensor(b) else aten.sub.Scalar), a, b

    def times(self, value: Any, factor: Any) -> Any:
        """A value, or a number, multiplied in the type of the sum."""
        if not isinstance(factor, fx.Node) and factor == 1:
            return value
        if not is_tensor(value):
            numbers = any(isinstance(x, fx.Node) for x in (value, factor))
            return self.call(operator.mul, value, factor) if numbers else value * factor
        dtype = self.node.meta["val"].dtype
        if value.meta["val"].dtype != dtype:
            value = self.call(aten._to_copy.default, value, dtype=dtype)
        return self.call(aten.mul.Tensor, value, factor)
