"""raise: replace each recognised unit by one semantic node.

Before::

    %fft_rfft   = fft_rfft(%u, 2*s)
    %fft_rfft_1 = fft_rfft(%filter, 2*s)
    %mul        = mul(%fft_rfft, %fft_rfft_1)
    %fft_irfft  = fft_irfft(%mul, 2*s)
    %y          = slice(%fft_irfft, 2, None, s)

After::

    %y_kernel   = placeholder()            # derived once per weight version, [C, capacity]
    %y          = long_conv(%u, %y_kernel)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from fi_compile.program import Input, Kind, Program
from fi_compile.units import Plan


def raise_mixers(program: Program, plan: Plan, derived: Mapping[str, Mapping[str, Tensor]]) -> Program:
    """The program with a semantic node for every unit that has a mixer with a full-sequence form of its own.

    ``derived`` maps a mixer's name to the tensors its reference takes beside its input, by keyword. Requires: a
    plan of this program. Ensures: the same function at every length up to the filters' capacity; the node that replaces
    ``exit`` carries the name of ``exit`` and its meta, and ``meta["mixer"]``.
    """
    found = [(unit.exit, unit.mixer) for unit in plan.units if unit.mixer is not None]
    mixers = {node: mixer for node, mixer in found if mixer.reference is not None}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    inputs, values = list(program.inputs), dict(program.values)
    extra: dict[fx.Node, dict[str, fx.Node]] = {}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node in placeholders:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    for exit_node, mixer in mixers.items():
        extra[exit_node] = {}
        for suffix, tensor in derived[mixer.name].items():
            name = f"{mixer.name}_{suffix}"
            placeholder = graph.placeholder(name)
            placeholder.meta["val"] = tensor
            inputs.append(Input(placeholder.name, Kind.DERIVED, name))
            values[placeholder.name] = tensor
            extra[exit_node][suffix] = placeholder
    for node in program.graph.nodes:
        if node.op == "placeholder":
            continue
        if node in mixers:
            copied[node] = _semantic_node(graph, node, mixers[node], copied, extra[node])
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            copied[node].kwargs = {**copied[node].kwargs, **node.meta.get("whole", {})}
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.lint()
    module = fx.GraphModule(nn.Module(), graph)
    return replace(program, module=module, inputs=tuple(inputs), values=values)


def _semantic_node(
    graph: fx.Graph,
    exit_node: fx.Node,
    mixer: Any,
    copied: Mapping[fx.Node, fx.Node],
    derived: Mapping[str, fx.Node],
) -> fx.Node:
    options = {**derived, **mixer.reference_options}
    inputs = tuple(copied[x] for x in mixer.inputs)
    node = graph.create_node("call_function", mixer.reference, inputs, options, exit_node.name)
    node.meta = {**exit_node.meta, "mixer": mixer}
    return node
