"""spelled_out: an exported graph with the few operators that need it decomposed, each where it stands.

``ExportedProgram.run_decompositions`` traces the whole graph twice more, to take writes apart and to decompose. A graph
that writes nothing has only a few operators to decompose (``reshape``, ``chunk``, ``to``, …), and to trace each of
these alone gives the same graph in a third of the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy.functions import Max, Min

Decompositions = Mapping[Any, Callable[..., Any]]


def spell_out(exported: ExportedProgram, decompositions: Decompositions) -> bool:
    """Decompose, in place, what ``exported.run_decompositions(decompositions)`` would; False where that must do it.

    So it is where the graph writes to tensors, and where it calls graphs or operators of other libraries. The graph is
    as it was then.
    """
    graph = exported.graph
    called = [node for node in graph.nodes if node.op == "call_function"]
    if any(node.op in ("call_module", "get_attr") for node in graph.nodes) or not all(
        _is_plain(node) for node in called
    ):
        return False
    coarse = [node for node in called if _is_coarse(node.target, decompositions)]
    try:
        finer = [(node, _traced(node, decompositions)) for node in coarse]
    except Exception:  # it needs more than the node: what is decided on numbers of a tensor, say
        return False
    for node, sub in finer:
        _inline(graph, node, sub)
    _share_sizes(graph)
    _keep_to_one_piece(graph)
    graph.eliminate_dead_code()
    graph.lint()
    exported.graph_module.recompile()
    return True


def shape_env_of(graph: fx.Graph) -> Any:
    """What torch knows of the symbolic sizes of an exported graph; None where it has none."""
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in graph.nodes)
    return next((mode.shape_env for mode in modes if mode is not None), None)


def _is_plain(node: fx.Node) -> bool:
    """Whether a call computes something from values and writes nothing."""
    target = node.target
    if isinstance(target, OpOverload):
        return target.namespace == "aten" and not target._schema.is_mutable
    return not isinstance(target, torch._ops.OperatorBase)


def _is_coarse(target: Any, decompositions: Decompositions) -> bool:
    if not isinstance(target, OpOverload):
        return False
    return target in decompositions or (_is_cia_op(target) and not _is_preservable_cia_op(target))


def _traced(node: fx.Node, decompositions: Decompositions) -> fx.Graph:
    """A graph of finer operators, of the nodes that ``node`` reads in their order."""
    reads = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(reads, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    values = [read.meta["val"] for read in reads]
    with detect_fake_mode(values) or contextlib.nullcontext():  # for tensors made on the way
        sub = make_fx(call, decomposition_table=dict(decompositions))(*values).graph
    for inner in sub.nodes:
        if inner.op == "get_attr" or (inner.op == "call_function" and not _is_plain(inner)):
            raise NotImplementedError(f"{node.target} writes to a tensor or makes one")
    return sub


def _inline(graph: fx.Graph, node: fx.Node, sub: fx.Graph) -> None:
    """Put a graph in the place of a call, told of the same line of the source."""
    known = dict(zip(sub.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with graph.inserting_before(node):
        for inner in sub.nodes:
            if inner.op == "call_function":
                copied = known[inner] = graph.node_copy(inner, known.__getitem__)
                copied.meta = {**node.meta, "val": inner.meta["val"]}
    outputs: Any = fx.map_arg(sub.output_node().args[0], known.__getitem__)
    if isinstance(outputs, fx.Node):
        node.replace_all_uses_with(outputs)
    else:
        for user in list(node.users):  # each takes an entry out
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)


def _share_sizes(graph: fx.Graph) -> None:
    """Compute each size once."""
    known: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt):
            first = known.setdefault(node.meta["val"].node.expr, node)
            if first is not node:
                node.replace_all_uses_with(first)


def _keep_to_one_piece(graph: fx.Graph) -> None:
    """Guard which side of a minimum or maximum the sizes are on, as torch's traces do in checking the guards there are.

    ``min(s, 64)`` is one function of s below 64 and another beyond; what is proved of it is proved of one.
    """
    env = shape_env_of(graph)
    for guard in list(env.guards) if env is not None else ():
        for least in guard.expr.atoms(Min):
            _ask(env, least.args, sympy.Lt)
        for most in guard.expr.atoms(Max):
            _ask(env, most.args, sympy.Gt)


def _ask(env: Any, sizes: Sequence[sympy.Basic], is_beyond: Callable[..., Any]) -> None:
    found, *others = sizes
    for size in others:
        if env.evaluate_expr(is_beyond(size, found)):
            found = size
