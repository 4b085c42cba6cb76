"""What a graph made by Dynamo means: which argument is the sequence, which are weights, sizes and numbers.

Dynamo passes everything a model's forward touches as a flat list of arguments. :func:`read_roles` tells
them apart, :func:`wrap_graph` puts the weights back, and what else the caller passes in as functions of the
sequence (:mod:`fi_compile.inputs`), into a module that reads only the sequence, so that both entrances of the
compiler lead to one analysis.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.fx.traceback import preserve_node_meta

from .errors import Refusal
from .forms import BATCH, LENGTH, Form, form_of
from .inputs import Counted, Description, Extra, Filled, Fixed, build, describe, sequence_rank
from .program import as_expr, source_of

_PATH = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]|\.([A-Za-z]\w*)(?![\w(])")
_ONE_INPUT = "pass one sequence, [B, s] or [B, s, D], and beside it tensors and numbers"


@dataclass(frozen=True)
class Roles:
    """The arguments of a Dynamo graph by position, and its outputs: a form each, or the constant itself."""

    sequence: int
    weights: tuple[tuple[int, str], ...]  # position, path in the user's model
    numbers: tuple[int, ...]  # Python floats, passed as tensors without dimensions
    integers: tuple[int, ...]  # integers that are no size of the sequence
    sizes: tuple[tuple[int, str, int], ...]  # position, "size" or "stride", the sequence's axis
    extras: tuple[Extra, ...]  # tensors the caller passes beside the sequence
    outputs: tuple[Any, ...]

    def bound(self, arguments: Sequence[Any]) -> Roles:
        """The roles with the integers and widths of one call's ``arguments`` put into the outputs' forms."""
        values = {_integer(i): arguments[place] for i, place in enumerate(self.integers)}
        values |= {_width(axis): size for axis, size in enumerate(arguments[self.sequence].shape)}
        outputs = tuple(form.bound(values) if isinstance(form, Form) else form for form in self.outputs)
        return replace(self, outputs=outputs)

    @property
    def tensors(self) -> list[Form]:
        """The forms of the outputs that are tensors."""
        return [form for form in self.outputs if isinstance(form, Form) and form.dtype is not None]


@dataclass(frozen=True)
class Static:
    """A graph for one length only: the places of what may be its sequence, and of its weights."""

    sequence: int
    weights: tuple[int, ...]


def read_roles(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Roles | Static | Refusal | None:
    """Tell a graph's arguments apart; :class:`Static` without a symbolic length, a refusal where it is unclear.

    None where nothing is a sequence, or its length cannot be told from its batch.

    ``example_inputs``: what Dynamo gave the backend, one value per placeholder.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    tensors, weights, numbers, integers = {}, [], [], {}
    for place, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if isinstance(value, (int, float, torch.SymInt)):
            integers[place] = as_expr(value)
        elif not isinstance(value, Tensor):
            return _unsupported_input(node, f"a {type(value).__name__}")
        elif getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False) and not value.dim():
            numbers.append(place)  # an array of NumPy's has dimensions, and is read as what the caller passes
        elif _in_model(node, value):
            weights.append(place)
        else:
            tensors[place] = node.meta["example_value"]  # a fake tensor, with symbolic sizes
    names = {place: _source_name(placeholders[place]) for place in tensors}
    found = _find_sequence(tensors, names, example_inputs)
    if found is None:
        static = [place for place, t in tensors.items() if t.dim() in (2, 3)]
        return Static(static[0], tuple(weights)) if static else None
    shape, strides = tensors[found].shape, tensors[found].stride()
    batch, length = as_expr(shape[0]), as_expr(shape[1])
    if batch == length or not isinstance(length, sympy.Symbol):
        return None
    known = [(measure, axis) for measure in ("size", "stride") for axis in range(len(shape))]
    measures = {key: as_expr((shape if key[0] == "size" else strides)[key[1]]) for key in known}
    sizes = []
    for place, expr in list(integers.items()):
        key = next((k for k, e in measures.items() if e == expr and _moves(expr)), None)
        if key is not None:
            sizes.append((place, *key))
            del integers[place]
    extras = tuple(
        Extra(place, names[place], tuple(_axis(n, batch, length) for n in value.shape), value.dtype)
        for place, value in tensors.items()
        if place != found
    )
    paths = _paths([placeholders[p] for p in weights])
    symbols = {expr: _integer(i) for i, expr in enumerate(integers.values()) if _moves(expr)}
    symbols |= {
        as_expr(shape[axis]): _width(axis) for axis in range(2, len(shape)) if _moves(as_expr(shape[axis]))
    }
    symbols |= {length: LENGTH} | ({batch: BATCH} if isinstance(batch, sympy.Symbol) else {})
    outputs = tuple(form_of(node, symbols) for node in flat_outputs(gm))
    for form in outputs:
        if isinstance(form, Form) and not form.symbols <= set(symbols.values()):
            return _unsupported_input(placeholders[found], "laid out in memory as its caller likes")
    named = tuple(sorted(zip(weights, paths, strict=True), key=lambda both: both[1]))
    return Roles(found, named, tuple(numbers), tuple(integers), tuple(sizes), extras, outputs)


def _find_sequence(
    tensors: dict[int, Tensor], names: dict[int, str], example_inputs: Sequence[Any]
) -> int | None:
    """The place of the sequence among the tensors a caller passes; None without a symbolic length."""

    def rank(place: int) -> tuple[bool, ...]:
        value = example_inputs[place]
        form = Extra(place, names[place], ("batch", "length", *value.shape[2:]), value.dtype)
        same = value  # what equals the sequence is no less likely to be it
        described = not is_fake(value) and len(tensors) > 1 and describe(value, same, form)
        return sequence_rank(names[place], value, isinstance(described, Counted | Filled))

    dynamic = [p for p, t in tensors.items() if t.dim() >= 2 and isinstance(t.shape[1], torch.SymInt)]
    return min(dynamic, key=rank, default=None)


def _integer(i: int) -> sympy.Symbol:
    return sympy.Symbol(f"integer{i}", integer=True)


def _width(axis: int) -> sympy.Symbol:
    return sympy.Symbol(f"width{axis}", integer=True, positive=True)


def _moves(expr: Any) -> bool:
    return isinstance(expr, sympy.Basic) and bool(expr.free_symbols)


def _axis(size: Any, batch: Any, length: Any) -> str | int | None:
    """What an axis of a tensor beside the sequence follows; see :class:`Extra`."""
    expr = as_expr(size)
    if not _moves(expr):
        return int(expr)
    if expr in (batch, length):
        return "batch" if expr == batch else "length"
    return None if length in expr.free_symbols else "own"


def flat_outputs(gm: fx.GraphModule) -> tuple[Any, ...]:
    """The graph's outputs: nodes or constants."""
    found = gm.graph.output_node().args[0]
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _in_model(node: fx.Node, value: Any) -> bool:
    """Whether an argument belongs to a module or is global, and not something the caller passes."""
    if isinstance(value, nn.Parameter):
        return True
    where = getattr(getattr(node, "_dynamo_source", None), "guard_source", None)
    return where is not None and ("NN_MODULE" in where.name or where.name.startswith("GLOBAL"))


def _source_name(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = source.name if source is not None else node.name
    name = name() if callable(name) else name
    return re.sub(r"^L\['(\w+)'\]$", r"\1", name)


def _unsupported_input(node: fx.Node, what: str) -> Refusal:
    return Refusal(
        "inputs", f"{_source_name(node)} is {what}, not the sequence", (node.name,), hint=_ONE_INPUT
    )


def _paths(nodes: Sequence[fx.Node]) -> list[str]:
    """A distinct dotted path per weight: the user's own where Dynamo's name for it tells."""
    paths: list[str] = []
    for node in nodes:
        parts = [a or b for a, b in _PATH.findall(_source_name(node))]
        path = ".".join(part for part in parts if part not in ("_modules", "_parameters", "_buffers"))
        clash = any(f"{p}.".startswith(f"{path}.") or f"{path}.".startswith(f"{p}.") for p in paths)
        paths.append(node.name if not path or clash else path)
    return paths


def graph_text(gm: fx.GraphModule, roles: Roles) -> str:
    """The graph in words that do not depend on names, on the order of arguments, nor on arguments it does not use.

    Graphs of equal text compute the same function of the sequence and the weights at the same paths.
    """
    labels = {roles.sequence: "sequence", **dict(roles.weights)}
    labels |= {place: f"number {i}" for i, place in enumerate(roles.numbers)}
    labels |= {place: f"integer {i}" for i, place in enumerate(roles.integers)}
    labels |= {e.place: f"beside {i} {e.shape} {e.dtype}" for i, e in enumerate(roles.extras)}
    labels |= {place: f"{measure} {axis}" for place, measure, axis in roles.sizes}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    names = {node: f"<{labels[place]}>" for place, node in enumerate(placeholders)}
    lines: list[str] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        what = f"{node.op} {node.target} {fx.map_arg((node.args, node.kwargs), lambda n: names[n])}"
        if node.op == "get_attr":
            value = getattr(gm, str(node.target))
            what = (
                value.print_readable(print_output=False)
                if isinstance(value, fx.GraphModule)
                else f"{id(value)}"
            )
        names[node] = f"%{len(lines)}"
        lines.append(what)
    return "\n".join(lines)


class SequenceModule(nn.Module):
    """A Dynamo graph as a module of the sequence alone; its weights sit at the user's own paths."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self._sequence_graph = graph
        self._built: dict[fx.Node, str] = {}  # what stands for arguments beside the sequence: their names

    def forward(self, sequence: Tensor) -> Any:
        """Run the graph on ``sequence``; its flat tuple of outputs."""
        with preserve_node_meta():
            return fx.Interpreter(self, graph=self._sequence_graph).run(sequence)

    def written(self, sequence: Tensor) -> str | None:
        """The name of an argument beside the sequence that the graph writes to; found on fake tensors."""
        if not self._built:
            return None
        run = fx.Interpreter(self, garbage_collect_values=False, graph=self._sequence_graph)
        with FakeTensorMode(allow_non_fake_inputs=True):
            run.run(torch.empty(sequence.shape, dtype=sequence.dtype, device=sequence.device))
        return next((name for node, name in self._built.items() if run.env[node]._version), None)


def wrap_graph(
    gm: fx.GraphModule, roles: Roles, arguments: Sequence[Any], beside: Sequence[Description]
) -> SequenceModule:
    """The graph with the weights and numbers of one call's ``arguments`` put in, its tensors as outputs.

    ``beside``: what the extra tensors are, in the order of ``roles.extras``.
    """
    graph = fx.Graph()
    module = SequenceModule(graph)
    for name, part in (*gm._modules.items(), *gm._parameters.items(), *gm._buffers.items()):
        setattr(module, name, part)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    sequence = graph.placeholder("sequence")
    mapped: dict[fx.Node, Any] = {placeholders[roles.sequence]: sequence}
    for place, path in roles.weights:
        _register(module, path, arguments[place])
        mapped[placeholders[place]] = graph.get_attr(path)
    for place in roles.numbers:
        mapped[placeholders[place]] = arguments[place].item()
    for place in roles.integers:
        mapped[placeholders[place]] = arguments[place]
    for i, (extra, description) in enumerate(zip(roles.extras, beside, strict=True)):
        value = arguments[extra.place]
        if isinstance(description, Fixed):
            with torch.inference_mode(False):  # it keeps a version
                module.register_buffer(f"_beside_{i}", value.detach().clone())
            mapped[placeholders[extra.place]] = graph.get_attr(f"_beside_{i}")
        else:
            built = build(description, extra, value, graph, sequence)
            mapped[placeholders[extra.place]] = built
            if built is not sequence:
                module._built[built] = extra.name
    for place, measure, axis in roles.sizes:
        if placeholders[place].users:
            mapped[placeholders[place]] = graph.call_method(measure, (sequence, axis))
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            both = zip(flat_outputs(gm), roles.outputs, strict=True)
            graph.output(tuple(mapped[n] for n, form in both if form in roles.tensors))
        elif node.op == "call_method" and node.target == "item" and isinstance(mapped[node.args[0]], float):
            mapped[node] = mapped[node.args[0]]
        else:
            mapped[node] = graph.node_copy(node, lambda n: mapped[n])
    return module


def _register(module: nn.Module, path: str, value: Tensor) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        if owner not in module._modules:
            module.add_module(owner, nn.Module())
        module = module._modules[owner]  # type: ignore[assignment]
    if value.is_inference():  # has no version; tracing would ask it for gradients
        module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))
    elif isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def graph_refusal(gm: fx.GraphModule) -> Refusal | None:
    """Why a graph is left alone whatever its weights: it draws random numbers or changes the precision."""
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and "dropout" in name and _drops(node):
            return Refusal(
                "training",
                "activations are dropped at random: the model is in training mode",
                (node.name,),
                source_of(node),
                hint="call model.eval() first",
            )
        if "autocast" in name:
            return Refusal(
                "autocast",
                "the forward switches precision with torch.autocast",
                (node.name,),
                source_of(node),
                hint="convert the model once: model.to(torch.bfloat16)",
            )
    return None


def broken_off(gm: fx.GraphModule) -> tuple[Refusal, ...]:
    """Why Dynamo's graph ends before the model does, where it does: what stands in it is no whole model."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ()
    frames = [frame for frame in reason.user_stack if "/torch/" not in frame.filename]
    return (
        Refusal(
            "graph_break",
            f"Dynamo breaks the forward into several graphs: {reason.reason.strip().splitlines()[0][:300]}",
            source=f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None,
            hint="only a whole forward is decoded: replace what Dynamo cannot follow, or use fi_compile.decoder",
        ),
    )


def _drops(node: fx.Node) -> bool:
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    return bool(training) and not (isinstance(probability, float) and probability == 0)


__all__ = [
    "Roles",
    "SequenceModule",
    "Static",
    "broken_off",
    "flat_outputs",
    "graph_refusal",
    "read_roles",
    "wrap_graph",
]
