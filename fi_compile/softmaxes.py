"""What a softmax over keys does not see, left out, and what it sees of other columns, by itself.

A number added to all scores of one query changes no weight. So a largest score that is taken off first does nothing,
and a bias that is linear in the key's position may be counted from the newest position, as ``arange(1 - s, 1)`` is,
instead of from the query: which moves with the length, though no weight does. Columns that only join the sum of the
weights, and are cut off after it, scale all weights of a query by one factor.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .compare import same_function
from .facts import is_number
from .passes.propose_consistency import Axes, agrees, axes_of, sample_lengths
from .pieces import cut_of
from .program import (
    Kind,
    Program,
    add_call,
    as_expr,
    given_arguments,
    is_getitem,
    is_tensor,
    needed,
    operator_name,
    sizes,
)
from .rules.triangles import VERY_LOW
from .twin import TwinValues, widen, widen_call

aten = torch.ops.aten
_SOFTMAXES = ("softmax", "_softmax")
_COPIES = ("to", "_to_copy", "clone", "contiguous", "alias", "detach", "dropout")
_LONGEST, _MOST_ELEMENTS = 1 << 17, 1 << 26
_HALVES, _FEWEST_EXACT = frozenset({torch.float16, torch.bfloat16}), 128


def with_softmaxes_bare(program: Program) -> Program:
    """The program with scores freed of what moves with the length and changes no weight.

    Before and after::

        softmax(masked_fill(q @ k + slope * arange(1 - s, 1), later, -inf))
        softmax(masked_fill(q @ k + slope * -(i - j), later, -inf))

        softmax(cat([x, sink], -1) - amax(cat([x, sink], -1), -1))[..., :-1]
        softmax(x) * sigmoid(logsumexp(x) - sink)

    A bias is linear as far as it is evaluated: up to 2^17 positions, which the program is then cut off at. Where the
    twins do not compute the same, nothing is changed.
    """
    if not any(
        operator_name(n.target) in (*_SOFTMAXES, "scaled_dot_product_attention") for n in program.graph.nodes
    ):
        return program
    baring = _Baring(program)
    found = baring.run()
    return found if baring.changed and same_function(found, program) else program


class _Baring:
    """The new graph as it grows."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.copied: dict[fx.Node, fx.Node] = {}
        self.biases: dict[fx.Node, fx.Node | None] = {}
        self.changed = False
        self.most = program.lengths.maximum
        self.by_query = False  # whether the scores at hand have the queries before the keys
        self.node: fx.Node = program.sequence

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            self.node = node
            made = self.made(node)
            self.changed |= made is not None
            self.copied[node] = made or self.graph.node_copy(node, self.copied.__getitem__)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        lengths = replace(self.program.lengths, maximum=self.most)
        return replace(self.program, module=fx.GraphModule(nn.Module(), self.graph), lengths=lengths)

    def made(self, node: fx.Node) -> fx.Node | None:
        """What stands in place of a node; None where that is itself."""
        name = operator_name(node.target) if node.op == "call_function" else ""
        if name == "slice":
            return self.without_columns(node)
        if name in _SOFTMAXES and works_along_last(node, 1):
            key: Any = 0
        elif name == "scaled_dot_product_attention" and is_tensor(given_arguments(node).get("attn_mask")):
            key = 3 if len(node.args) > 3 else "attn_mask"
        else:
            return None
        scores: Any = node.kwargs[key] if isinstance(key, str) else node.args[key]
        self.by_query = sizes(scores)[-2:-1] == (self.program.length,)
        bare = self.bare(scores)
        if bare is self.copied[scores]:
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda a: bare if a is scores else self.copied[a])
        return self.call(node.target, *args, **kwargs)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node in place of the present one."""
        mode = self.program.sequence.meta["val"].fake_mode
        return add_call(self.graph, self.node, mode, target, args, kwargs)

    # -- scores --------------------------------------------------------------------------------------------

    def bare(self, node: fx.Node) -> fx.Node:
        """Scores in the new graph that differ by a number for each query, where that makes them simpler."""
        name = operator_name(node.target) if node.op == "call_function" else ""
        followed: list[Any] = self.followed(node, name)
        if name in ("add", "sub") and given_arguments(node).get("alpha", 1) == 1:
            a, b = node.args[:2]
            if name == "sub" and is_tensor(a) and _is_largest(b) and sizes(a) == sizes(node):  # type: ignore[arg-type]
                return self.bare(a)  # type: ignore[arg-type]
            followed = [x for x in (a, b) if is_tensor(x)]
        new = {x: self.bias(x) or self.bare(x) for x in followed}
        if all(self.copied[x] is n for x, n in new.items()):
            return self.copied[node]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: new.get(x) or self.copied[x])
        return self.call(node.target, *args, **kwargs)

    def followed(self, node: fx.Node, name: str) -> list[Any]:
        """The arguments in which a number for each query stays one, beside entries that are masked."""
        args = node.args
        if not node.meta["val"].is_floating_point() or "rounding_mode" in node.kwargs:
            return []  # what is rounded to whole numbers moves by more or less than the number that was added
        if name in _COPIES or (name == "masked_fill" and _very_low(args[2])):
            return [args[0]]
        if name in ("mul", "div") and is_number(args[1]) and args[1] > 0:
            return [args[0]]
        if name == "where" and any(map(_very_low, args[1:3])):
            return [a for a in args[1:3] if is_tensor(a) and not _very_low(a)]
        return []

    def bias(self, node: fx.Node) -> fx.Node | None:
        """A bias by the key's distance from the newest position, as one by its distance from the query."""
        if not self.by_query:
            return None
        if node not in self.biases:
            found = self.repeated(node) or self.from_the_end(node)
            found = found or (self.by_lag(node) if self.is_moving(node) else self.multiple(node))
            self.biases[node] = found
        return self.biases[node]

    def repeated(self, node: fx.Node) -> fx.Node | None:
        """A bias that is the same for every row of a batch, head or query."""
        name, source = (
            operator_name(node.target) if node.op == "call_function" else "",
            node.all_input_nodes[:1],
        )
        if name not in ("expand", "repeat") or not is_tensor(source[0]) or source[0].meta["val"].dim() < 2:
            return None
        by_lag = self.bias(source[0])
        if by_lag is None:
            return None
        given: Any = fx.map_arg(node.args[1], self.copied.__getitem__)
        again = [*given[:-2], *([-1, -1] if name == "expand" else [1, 1])]  # it has all queries and keys
        return self.call(node.target, by_lag, again) if sizes(node)[-1] == sizes(source[0])[-1] else None

    def from_the_end(self, node: fx.Node) -> fx.Node | None:
        """A square cut from the end of a table in which lags alone count, cut from its beginning instead."""
        program, table, ends = self.program, node, set()
        while (cut := cut_of(table)) is not None and operator_name(table.target) == "slice":
            if cut[1] < node.meta["val"].dim() - 2 or cut[3] != sizes(cut[0])[cut[1]]:
                return None
            table = cut[0]
            ends.add(cut[1])
        if len(ends) < 2 or sizes(node)[-1] != sizes(node)[-2] or sizes(table)[-1] != sizes(table)[-2]:
            return None
        behind = _behind(table)
        if program.sequence in behind or not all(is_number(size) for size in sizes(table)):
            return None
        if any(s.kind is Kind.PARAMETER and program.nodes[s.name] in behind for s in program.inputs):
            return None  # new weights would have to be asked again
        for rewrite, of in ((widen_call, TwinValues(program)), (None, program.values)):
            value = _table(program, table, program.example.shape[1], of, rewrite)
            if not bool((value[..., 1:, 1:] == value[..., :-1, :-1]).all()):
                return None
        found, length = self.copied[table], self.call(aten.sym_size.int, self.copied[node], -1)
        for dim in (-2, -1):
            found = self.call(aten.slice.Tensor, found, dim, 0, length)
        return found

    def multiple(self, node: fx.Node) -> fx.Node | None:
        """A bias by its distance from the newest position, times a number for each head or query: learned, say."""
        if operator_name(node.target) != "mul" or not all(map(is_tensor, node.args)):
            return None
        if node.meta["val"].dtype in _HALVES:
            return None  # a product that is rounded by the distance from the newest position
        for number, table in (node.args, node.args[::-1]):
            shape = sizes(number)  # type: ignore[arg-type]
            if not shape or self.is_one(shape[-1]):
                by_lag = self.bias(table)  # type: ignore[arg-type]
                if by_lag is not None:
                    return self.call(node.target, self.copied[number], by_lag)  # type: ignore[index]
        return None

    def is_moving(self, node: fx.Node) -> bool:
        """Whether a value is one bias for each key, the same to all queries, and moves with the length."""
        program, rank = self.program, node.meta["val"].dim()
        return (
            node not in program.input_dependent
            and rank > 0
            and axes_of(program, node) == Axes((rank - 1,), (), True)
            and (rank == 1 or self.is_one(sizes(node)[-2]))
            and node.meta["val"].dtype not in (torch.bool, torch.uint8)
            and not node.meta["val"].is_complex()
            and self.is_linear(node)
        )

    def is_one(self, size: Any) -> bool:
        lengths = self.program.lengths.upto(_LONGEST)
        return bool((self.program.size_values(size, lengths) == 1).all())

    def is_linear(self, node: fx.Node) -> bool:
        """Whether, from its end, a table is one and the same at all lengths, and a multiple of the distance."""
        program = self.program
        if any(s.kind is Kind.PARAMETER and program.nodes[s.name] in _behind(node) for s in program.inputs):
            return False  # new weights would have to be asked again
        values = TwinValues(program)
        longest, lengths = self.longest(node), sample_lengths(program)
        if longest is None or longest < 2 or len(lengths) < 2:
            return False
        short, long = lengths[:2]
        a, b = (_table(program, node, n, values) for n in (short, long))
        if agrees(a, b[..., :short]) or not agrees(a, b[..., -short:]):
            return False
        kinds = {
            n.meta["val"].dtype for n in _behind(node) if is_tensor(n) and n.meta["val"].is_floating_point()
        }
        for rewrite, of in ((widen_call, values), (None, program.values)):
            straight = _is_straight(
                _table(program, node, longest, of, rewrite), 4 * torch.finfo(torch.float32).eps
            )
            if not straight.all():
                # Half precision counts as far as it is exact: rounding of far keys would change their weights.
                longest = int(straight.flip(0).long().cumprod(0).sum())
                if kinds.isdisjoint(_HALVES) or longest < _FEWEST_EXACT:
                    return False
        self.most = longest if self.most is None else min(self.most, longest)
        return True

    def longest(self, node: fx.Node) -> int | None:
        """The longest length at which a table is evaluated."""
        behind = [n for n in _behind(node) if is_tensor(n)]
        most = (
            _LONGEST if self.program.lengths.maximum is None else min(_LONGEST, self.program.lengths.maximum)
        )
        while most > 1:
            at = np.asarray([most])
            counts = [
                math.prod(int(self.program.size_values(as_expr(s), at, 1)[0]) for s in n.meta["val"].shape)
                for n in behind
            ]
            if max(counts) <= _MOST_ELEMENTS:
                admitted = self.program.lengths.upto(most)
                return int(admitted[-1]) if len(admitted) else None
            most //= 2
        return None

    def by_lag(self, node: fx.Node) -> fx.Node:
        """``table[s - 1 - (i - j)]`` for queries i and keys j; its negative for later keys."""
        table = self.copied[node]
        length = self.call(aten.sym_size.int, table, -1)
        positions = self.call(aten.arange.default, length, device=node.meta["val"].device)
        lag = self.call(aten.sub.Tensor, self.call(aten.unsqueeze.default, positions, 1), positions)
        turned = self.call(aten.flip.default, table, [-1])
        if len(sizes(node)) > 1:
            turned = self.call(aten.select.int, turned, -2, 0)
        place = [None] * (turned.meta["val"].dim() - 1)
        entries = self.call(aten.index.Tensor, turned, [*place, self.call(aten.abs.default, lag)])
        return self.call(aten.mul.Tensor, entries, self.call(aten.sign.default, lag))

    # -- columns -------------------------------------------------------------------------------------------

    def without_columns(self, node: fx.Node) -> fx.Node | None:
        """Weights cut from those that more columns than the keys were weighed with."""
        bounds = cut_of(node)
        if bounds is None or bounds[1] != node.meta["val"].dim() - 1:
            return None
        after, softmax = _through(bounds[0])
        if operator_name(softmax.target) not in _SOFTMAXES or not works_along_last(softmax, 1):
            return None
        before, joined = _through(softmax.args[0])  # type: ignore[arg-type]
        if operator_name(joined.target) == "sub" and _is_largest(joined.args[1]):
            more, joined = _through(joined.args[0])  # type: ignore[arg-type]
            before = [*more, *before]
        if operator_name(joined.target) not in ("cat", "concat") or not works_along_last(joined, 1):
            return None
        pieces: Any = joined.args[0]
        offset: Any = 0
        for piece in pieces:
            end = offset + sizes(piece)[-1]
            if offset == bounds[2] and end == bounds[3]:
                others = [p for p in pieces if p is not piece]
                return self.weighed(softmax, piece, others, before, after) if others else None
            offset = end
        return None

    def weighed(
        self,
        softmax: fx.Node,
        piece: fx.Node,
        others: list[fx.Node],
        before: list[fx.Node],
        after: list[fx.Node],
    ) -> fx.Node:
        dtype = softmax.meta["val"].dtype

        def prepared(value: fx.Node) -> fx.Node:
            for step in before:
                value = self.call(step.target, value, *step.args[1:], **step.kwargs)
            same = value.meta["val"].dtype == dtype
            return value if same else self.call(aten._to_copy.default, value, dtype=dtype)

        # As they are: what is added to scores alone does not change their weights, but their share beside the others.
        scores, rest = prepared(self.copied[piece]), [prepared(self.copied[o]) for o in others]
        beside = rest[0] if len(rest) == 1 else self.call(aten.cat.default, rest, -1)
        if beside.meta["val"].shape[-1] != 1:
            beside = self.call(aten.logsumexp.default, beside, [-1], True)
        own = self.call(aten.logsumexp.default, scores, [-1], True)
        share = self.call(aten.sigmoid.default, self.call(aten.sub.Tensor, own, beside))
        value = self.call(aten.mul.Tensor, self.call(aten.softmax.int, scores, -1), share)
        for step in after:
            value = self.call(step.target, value, *step.args[1:], **step.kwargs)
        return value


def _is_straight(table: Tensor, rounding: float) -> Tensor:
    """[longest]: whether all entries of a key are its distance from the last times one number, which each row has."""
    table = table.double().reshape(-1, table.shape[-1])
    distance = torch.arange(table.shape[-1] - 1, -1, -1, dtype=table.dtype, device=table.device)
    line = table[:, -2:-1] * distance
    # By each entry's own size: the furthest is so large that its rounding would hide a bend among the near ones.
    return ((table - line).abs() <= rounding * line.abs()).all(0)


def _table(program: Program, node: fx.Node, length: int, values: Any, rewrite: Any = widen_call) -> Tensor:
    """A table at one length: as the twin has it, or (``rewrite`` None) in the model's own types."""
    example = program.example
    batch = program.batch if isinstance(program.batch, int) else 1
    shape = (batch, length, *example.shape[2:])
    dtype = widen(example.dtype) if rewrite is not None else example.dtype
    sequence = example.new_zeros((1,) * len(shape), dtype=dtype).expand(shape)
    with torch.no_grad():
        return program.evaluate(sequence, values, keep=[node], rewrite=rewrite)[node]


def _behind(node: fx.Node) -> set[fx.Node]:
    return {node, *(n for n in needed(list(node.graph.nodes), [node]))}


def works_along_last(node: fx.Node, place: int) -> bool:
    """Whether an operator works along the last dimension."""
    dim: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return dim % node.meta["val"].dim() == node.meta["val"].dim() - 1


def _through(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """The copies a value went through, in order, and what was copied."""
    steps: list[fx.Node] = []
    while operator_name(node.target) in _COPIES:
        steps.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    return steps, node


def _is_largest(value: Any) -> bool:
    """Whether a value is the largest entry along the last dimension, which is kept."""
    if not is_tensor(value) or value.meta["val"].dim() == 0 or value.meta["val"].shape[-1] != 1:
        return False
    source = value
    if is_getitem(value):
        if value.args[1] != 0:
            return False
        source = value.args[0]
    given = given_arguments(source) if source.op == "call_function" and not is_getitem(source) else {}
    if operator_name(source.target) not in ("amax", "max") or "dim" not in given or not given.get("keepdim"):
        return False
    dims = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
    return [d % value.meta["val"].dim() for d in dims] == [value.meta["val"].dim() - 1]


def _very_low(value: Any) -> bool:
    """Whether an argument is one number that no softmax gives a weight."""
    if isinstance(value, fx.Node) and operator_name(value.target) in ("full", "scalar_tensor"):
        value = value.args[1 if operator_name(value.target) == "full" else 0]
    return is_number(value) and not isinstance(value, bool) and value <= VERY_LOW
