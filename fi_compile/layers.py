"""layers: a step graph as a few distinct parts, each called once for every layer that is like it.

The layers of a model are the same operators on other weights and other state. A run of consecutive segments
of the step graph that are equal up to the values they read becomes one part, called once a segment; what
differs is its inputs. So what is compiled does not grow with the depth.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

# A run of like segments is worth a part of its own if so many nodes less are compiled.
_LEAST_SAVED = 24
_TRIED_PERIODS = 4

Run = Callable[[list[Any]], Sequence[Tensor]]


@dataclass(frozen=True)
class Call:
    """A part run once: ``inputs`` are the values its placeholders read, ``outputs`` those it makes.

    Values are numbers: the step graph's inputs in their order, then whatever calls make.
    """

    part: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Layers:
    """A step graph as calls of parts, in the order they run; ``outputs`` are the values it returns."""

    parts: tuple[fx.GraphModule, ...] = field(repr=False)
    calls: tuple[Call, ...]
    outputs: tuple[int, ...]

    def bind(self, runs: Sequence[Run], inputs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """The whole step on the tensors ``inputs``, where part i runs as ``runs[i]``; it records no gradients."""
        known = len(inputs)
        plan = []
        for call in self.calls:
            args = [inputs[value] if value < known else None for value in call.inputs]
            fed = [(place, value) for place, value in enumerate(call.inputs) if value >= known]
            plan.append((runs[call.part], args, fed, call.outputs))

        def step() -> list[Tensor]:
            made: dict[int, Tensor] = {}
            with torch.no_grad():
                for run, args, fed, names in plan:
                    for place, value in fed:
                        args[place] = made[value]
                    made.update(zip(names, run(args), strict=True))
            return [made[value] for value in self.outputs]

        return step


def split_layers(graph: fx.Graph) -> Layers:
    """Find the repetition in a step graph and cut it there.

    Requires: ``meta["val"]`` of static shape on every node, writes to placeholders only, no placeholder among what is
    returned. Ensures: the calls run every node once, in the graph's own order, so they compute and write the same. A
    graph in which nothing repeats is one part, called once. Before and after, for two layers of one operator::

        h = layer(x, w0); y = layer(h, w1); return (norm(y),)

        parts: (a, b) -> (layer(a, b),)      (a,) -> (norm(a),)
        calls: part 0 of (x, w0) -> h, part 0 of (h, w1) -> y, part 1 of (y,)
    """
    splitter = _Splitter(graph)
    pieces = list(splitter.pieces(range(len(splitter.nodes))))
    return splitter.cut(pieces) if splitter.may_cut(pieces) else whole(graph)


def whole(graph: fx.Graph) -> Layers:
    """A step graph as one part, called once."""
    splitter = _Splitter(graph)
    return splitter.cut([[range(len(splitter.nodes))]])


class _Splitter:
    """The call nodes of a graph by their number, and what is known of each."""

    def __init__(self, graph: fx.Graph) -> None:
        self.placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.nodes = [n for n in graph.nodes if n.op == "call_function"]
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.returned = _reads(next(n for n in graph.nodes if n.op == "output"))
        self.forms = np.asarray(_numbered(_form(node) for node in self.nodes), dtype=np.int64)
        end = len(self.nodes)
        self.last_use = np.asarray(
            [max((self.number.get(user, end) for user in node.users), default=-1) for node in self.nodes]
        )
        self.written = {node.args[0] for node in self.nodes if is_write(node)}

    def pieces(self, span: range) -> Iterator[list[range]]:
        """A span of nodes as runs of like segments, and single ones between them."""
        run = self._best_run(span)
        if run is None:
            if span:
                yield [span]
            return
        yield from self.pieces(range(span.start, run[0].start))
        yield run
        yield from self.pieces(range(run[-1].stop, span.stop))

    def may_cut(self, pieces: list[list[range]]) -> bool:
        """Whether what the segments hand on is no view of the graph's inputs: it would not see later writes."""
        views: set[fx.Node] = set(self.placeholders)
        for node in self.nodes:
            if _may_be_view(node) and not views.isdisjoint(node.all_input_nodes):
                views.add(node)
        segments = [segment for run in pieces for segment in run]
        handed_on = {self.nodes[segment[o]] for segment in segments for o in self._leaving([segment])}
        return self.written <= set(self.placeholders) and views.isdisjoint(handed_on)

    def cut(self, pieces: list[list[range]]) -> Layers:
        """One part for each run, with a call for each of its segments."""
        value: dict[fx.Node, int] = {node: i for i, node in enumerate(self.placeholders)}
        parts, calls = [], []
        for segments in pieces:
            linked = self._link(segments)
            assert linked is not None
            slots, sources = linked
            leaving = self._leaving(segments)
            for place, segment in enumerate(segments):
                inputs = tuple(value[slot[place]] for slot in slots)
                made = [self.nodes[segment[offset]] for offset in leaving]
                value |= {node: len(value) + i for i, node in enumerate(made)}
                calls.append(Call(len(parts), inputs, tuple(value[node] for node in made)))
            parts.append(self._part(segments[0], slots, sources, leaving))
        return Layers(tuple(parts), tuple(calls), tuple(value[node] for node in self.returned))

    def _best_run(self, span: range) -> list[range] | None:
        """The run of like segments that saves most; of its possible beginnings the one with least to hand on."""
        forms, found = self.forms[span.start : span.stop], []
        for period in range(1, len(forms) // 2 + 1):
            start, length = _longest_true(forms[:-period] == forms[period:])
            saved = length // period * period
            if saved >= _LEAST_SAVED:
                found.append((-saved, period, span.start + start, length))
        for _, period, start, length in sorted(found)[:_TRIED_PERIODS]:
            firsts = range(start, start + length % period + 1)
            first = min(firsts, key=lambda cut: self._handed_on(cut + period))
            run = [range(first + k * period, first + (k + 1) * period) for k in range(length // period + 1)]
            # The first layer may differ in what it reads, and the last.
            for alike in (run, run[1:], run[:-1], run[1:-1]):
                if (len(alike) - 1) * period >= _LEAST_SAVED and self._link(alike) is not None:
                    return alike
        return None

    def _handed_on(self, cut: int) -> int:
        """How many values made before node number ``cut`` are used from it on."""
        return int((self.last_use[:cut] >= cut).sum())

    def _link(self, segments: list[range]) -> tuple[list[tuple[fx.Node, ...]], list[list[int]]] | None:
        """How like segments are wired; None where they are not alike.

        First what they read from outside: slots, a node for each segment. Then for each node what its arguments
        are: ``i`` the segment's own node i, ``-1 - i`` slot i.
        """
        slots: dict[tuple[fx.Node, ...], int] = {}
        sources: list[list[int]] = []
        for offset in range(len(segments[0])):
            sources.append([])
            for reads in zip(*(_reads(self.nodes[segment[offset]]) for segment in segments), strict=True):
                inside = {self._inside(node, segment) for node, segment in zip(reads, segments, strict=True)}
                if len(inside) > 1:
                    return None
                (own,) = inside
                if own is None and len({tensor_form(node) for node in reads}) > 1:
                    return None
                sources[-1].append(-1 - slots.setdefault(reads, len(slots)) if own is None else own)
        for place in range(len(segments)):  # a part knows nothing of inputs that are one tensor
            read = [slot[place] for slot in slots]
            if any(read.count(node) > 1 for node in self.written.intersection(read)):
                return None
        return list(slots), sources

    def _inside(self, node: fx.Node, segment: range) -> int | None:
        number = self.number.get(node, -1)
        return number - segment.start if number in segment else None

    def _leaving(self, segments: list[range]) -> list[int]:
        """Which of the segments' nodes are used outside, in any of them."""
        return [
            offset
            for offset in range(len(segments[0]))
            if any(self.last_use[segment[offset]] >= segment.stop for segment in segments)
        ]

    def _part(
        self, first: range, slots: list[tuple[fx.Node, ...]], sources: list[list[int]], leaving: list[int]
    ) -> fx.GraphModule:
        graph = fx.Graph()
        inputs, made = [], []
        for i, slot in enumerate(slots):
            inputs.append(graph.placeholder(f"in_{i}"))
            inputs[-1].meta["val"] = slot[0].meta["val"]
        for at, reads in zip(first, sources, strict=True):
            node, operands = self.nodes[at], iter([made[i] if i >= 0 else inputs[-1 - i] for i in reads])
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _, o=operands: next(o))
            made.append(graph.call_function(node.target, args, kwargs))
            made[-1].meta["val"] = node.meta["val"]
        graph.output(tuple(made[offset] for offset in leaving))
        return fx.GraphModule({}, graph)


def is_write(node: fx.Node) -> bool:
    """Whether a node writes to its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def returns_written(node: fx.Node) -> bool:
    """Whether what a node returns is its first argument, which it wrote to."""
    return is_write(node) and _may_be_view(node)


def _may_be_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _reads(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, as often as they occur there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _form(node: fx.Node) -> str:
    """All that two like nodes have in common: everything but where their arguments come from."""
    args = fx.map_arg((node.args, node.kwargs), lambda _: "a value")  # None is another thing
    return f"{node.target} {args} {tensor_form(node)}"


def tensor_form(node: fx.Node) -> Any:
    """Shape, strides, dtype and device of a node's value; of each, where it is several."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(
        (tuple(v.shape), v.stride(), v.dtype, v.device) if isinstance(v, Tensor) else v for v in values
    )


def returned_values(part: fx.GraphModule) -> list[Tensor]:
    """Tensors of the shapes, strides and dtypes of what a part returns, without contents."""
    (output,) = (node for node in part.graph.nodes if node.op == "output")
    return [node.meta["val"] for node in _reads(output)]


def lies_as(tensor: Tensor, form: Tensor) -> bool:
    """Whether a tensor has another's shape, dtype and strides."""
    same = (tensor.dtype, tensor.shape) == (form.dtype, form.shape)
    return same and strided_alike(form.shape, tensor.stride(), form.stride())


def strided_alike(shape: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether tensors of a shape lie alike in memory; strides of single entries mean nothing."""
    return 0 in shape or all(n == 1 or s == t for n, s, t in zip(shape, one, other, strict=True))


def _numbered(keys: Iterable[str]) -> list[int]:
    known: dict[str, int] = {}
    return [known.setdefault(key, len(known)) for key in keys]


def _longest_true(mask: Any) -> tuple[int, int]:
    """Start and length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    if not len(edges):
        return 0, 0
    lengths = edges[1::2] - edges[::2]
    best = int(lengths.argmax())
    return int(edges[2 * best]), int(lengths[best])
