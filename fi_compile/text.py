"""Graphs as readable text: one line a node, with shapes in the sequence's symbols."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .program import Program, as_expr, is_integer, operator_name


def program_text(program: Program) -> str:
    """The program as text; ``s`` is the sequence length and ``b`` the batch."""
    names = {str(program.length): "s", str(program.batch): "b"}
    kinds = {i.name: (i.kind.value, i.path) for i in program.inputs}
    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind, path = kinds[node.name]
            note = f"{kind} {path}" if path else kind
            lines.append(f"%{node.name}{_shape(node, names)} = {note}")
        elif node.op == "call_function" and not is_integer(node):
            lines.append(f"%{node.name}{_shape(node, names)} = {_call(node, names)}")
        elif node.op == "output":
            lines.append(f"return {_value(node.args[0], names)}")
    return "\n".join(lines)


def graph_text(graph: fx.Graph) -> str:
    """A step graph as text."""
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            lines.append(f"%{node.name}{_shape(node, {})} = input")
        elif node.op == "call_function":
            lines.append(f"%{node.name}{_shape(node, {})} = {_call(node, {})}")
        elif node.op == "output":
            lines.append(f"return {_value(node.args[0], {})}")
    return "\n".join(lines)


def _call(node: fx.Node, names: dict[str, str]) -> str:
    args = [_value(a, names) for a in node.args]
    args += [f"{k}={_value(v, names)}" for k, v in node.kwargs.items() if v is not None]
    return f"{operator_name(node.target)}({', '.join(args)})"


def _value(value: Any, names: dict[str, str]) -> str:
    if isinstance(value, fx.Node):
        return _renamed(as_expr(value), names) if is_integer(value) else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(v, names) for v in value) + "]"
    return "…" if value == torch.iinfo(torch.int64).max else str(value)


def _shape(node: fx.Node, names: dict[str, str]) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    sizes = ", ".join(_renamed(as_expr(size), names) for size in value.shape)
    return f": {str(value.dtype).removeprefix('torch.')}[{sizes}]"


def _renamed(expr: Any, names: dict[str, str]) -> str:
    text = str(expr)
    for old, new in names.items():
        text = text.replace(old, new)
    return text
