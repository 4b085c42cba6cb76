"""Attention with its mask spelled out.

``scaled_dot_product_attention(is_causal=True)`` counts rows from the first one it is given: of a single query it no
longer knows the position. With the mask as a comparison of positions the planner's ordinary rules find what a new query
reads: its own row, and all keys and values so far, which become the cache. The causal form stays with the node, for
running over whole sequences without a mask in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fi_compile.passes.propose_consistency import axes_of
from fi_compile.program import Program, add_call, given_arguments, is_tensor, operator_name

WHOLE = "whole"  # of a node's meta: the keyword arguments that give the same value of whole sequences
_CAUSAL = {"attn_mask": None, "is_causal": True}


def with_masks(program: Program) -> Program:
    """The same program with the mask of every causal attention operator as a value of its own.

    Such a node keeps its name and meta, to which ``meta["whole"]`` is added.
    """
    if not any(_is_causal(node) for node in program.graph.nodes):
        return program
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        mask = _mask(graph, node, copied) if _is_causal(node) else None
        new = copied[node] = graph.node_copy(node, copied.__getitem__)
        if mask is not None:
            new.args, new.kwargs = (), {**given_arguments(new), "attn_mask": mask, "is_causal": False}
            new.meta = {**node.meta, WHOLE: _CAUSAL}
    graph.lint()
    return replace(program, module=fx.GraphModule(nn.Module(), graph))


def with_queries_apart(program: Program) -> Program:
    """The same program where no value enters an operator over pairs of positions twice: one of the two is a copy.

    Before and after::

        y = scaled_dot_product_attention(x, x, x, mask)
        y = scaled_dot_product_attention(clone(x), x, x, mask)

    Of queries the newest row is demanded, of keys all rows so far: the copy is read one way, its source the other.
    """
    shared = {
        node: query for node in program.graph.nodes if (query := _shared_query(program, node)) is not None
    }
    if not shared:
        return program
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in shared:
            copied[node] = _apart(graph, node, shared[node], copied)
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.lint()
    return replace(program, module=fx.GraphModule(nn.Module(), graph))


def _apart(graph: fx.Graph, node: fx.Node, query: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    """The call with a copy where it first reads the query."""
    clone = torch.ops.aten.clone.default
    place = [add_call(graph, node, node.meta["val"].fake_mode, clone, (copied[query],))]
    place[0].meta.pop(WHOLE, None)
    return graph.node_copy(node, lambda of: place.pop() if of is query and place else copied[of])


def _shared_query(program: Program, node: fx.Node) -> fx.Node | None:
    """The first sequence that an operator makes or weighs pairs of positions of, if it is another of them too."""
    if node.op != "call_function" or not is_tensor(node) or node not in program.input_dependent:
        return None
    if operator_name(node.target) != "scaled_dot_product_attention" and len(axes_of(program, node).rows) < 2:
        return None
    read: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: read.append(n) or n)
    first = next(filter(is_tensor, read))
    return first if read.count(first) > 1 and len(axes_of(program, first).rows) == 1 else None


def _is_causal(node: fx.Node) -> bool:
    if operator_name(node.target) != "scaled_dot_product_attention":
        return False
    given = given_arguments(node)
    return given.get("is_causal") is True and given.get("attn_mask") is None


def _mask(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    """Key ≤ query, bool [L, S]."""
    aten = torch.ops.aten
    query, key = (copied[given_arguments(node)[name]] for name in ("query", "key"))
    fake = node.meta["val"].fake_mode

    def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return add_call(graph, node, fake, target, args, kwargs)

    def positions(of: fx.Node) -> fx.Node:
        value = of.meta["val"]
        size = call(aten.sym_size.int, of, value.dim() - 2)
        return call(aten.arange.default, size, device=value.device)

    rows = call(aten.unsqueeze.default, positions(query), -1)
    return call(aten.le.Tensor, positions(key), rows)
