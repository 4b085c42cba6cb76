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


def with_operands_apart(program: Program) -> Program:
    """The same program where no value enters weights over pairs of positions twice: all uses but one read copies.

    Before and after::

        y = scaled_dot_product_attention(x, x, x, mask)         y = (x @ x.mT * mask) @ x
        y = scaled_dot_product_attention(clone(x), x, x, mask)  y = (x @ x.mT * mask) @ clone(x)

    Of queries the newest row is demanded, of keys all rows so far, and what is linear in each use alone is not in all.
    The keys and values of an attention operator stay one.
    """
    entered: dict[fx.Node, frozenset[fx.Node]] = {}
    copies = {node: found for node in program.graph.nodes if (found := _copies(program, node, entered))}
    if not copies:
        return program
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        clones = [of and _clone(graph, node, of, copied) for of in copies.get(node, ())]
        uses = iter(clones)
        copied[node] = graph.node_copy(node, lambda of, uses=uses: next(uses, None) or copied[of])
    graph.lint()
    return replace(program, module=fx.GraphModule(nn.Module(), graph))


def _clone(graph: fx.Graph, node: fx.Node, of: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    clone = add_call(graph, node, node.meta["val"].fake_mode, torch.ops.aten.clone.default, (copied[of],))
    clone.meta.pop(WHOLE, None)
    return clone


def _copies(
    program: Program, node: fx.Node, entered: dict[fx.Node, frozenset[fx.Node]]
) -> list[fx.Node | None] | None:
    """Of every value a call reads, in order, itself where it is to be copied; None where nothing is.

    ``entered`` says of values over pairs of positions which values of one position are behind them; kept up to date.
    """
    if node.op != "call_function" or not is_tensor(node) or node not in program.input_dependent:
        return None
    read: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: read.append(n) or n)
    ones = [n for n in read if is_tensor(n) and len(axes_of(program, n).rows) == 1]
    inside = frozenset[fx.Node]().union(*(entered.get(n, ()) for n in read))
    attends = operator_name(node.target) == "scaled_dot_product_attention"
    makes_pairs = len(axes_of(program, node).rows) > 1
    if makes_pairs:
        entered[node] = inside.union(ones)
    if not (attends or makes_pairs or any(is_tensor(n) and len(axes_of(program, n).rows) > 1 for n in read)):
        return None
    again = [n in inside or n in (read[i + 1 :] if i == 0 or not attends else ()) for i, n in enumerate(read)]
    found = [
        n if twice and n in ones and n in program.input_dependent else None
        for n, twice in zip(read, again, strict=True)
    ]
    return found if any(found) else None


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
