"""Whether two graphs compute the same of one position: what masks, joins and sums do there is nothing.

A model may say so itself: ``if s > 1: scores = scores + mask``. The trace at longer sequences has the mask, the one at
a single position has none, and both are the same function there because that mask is all zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .alike import close
from .program import (
    Kind,
    Program,
    as_expr,
    data_arguments,
    given_arguments,
    is_getitem,
    is_integer,
    is_tensor,
    operator_name,
)

_BATCHES = (3, 5)
# Operators that do nothing where they leave shape and dtype as they are.
_IDLE = frozenset({
    "clone", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy", "view", "reshape",
    "_unsafe_view", "expand", "slice", "to", "_to_copy",
})  # fmt: skip
_RESHAPES = {"view": "reshape", "reshape": "reshape", "_unsafe_view": "reshape", "expand": "expand"}
# Operators that do nothing along a dimension of one entry.
_ALONG = frozenset({"cumsum", "cumprod", "logcumsumexp", "flip"})


def same_at_one(program: Program, other: Program) -> bool:
    """Whether both graphs make the same calls of one position, passing over calls that change nothing there.

    Masks and other tables are evaluated there; parameters and buffers are not, so they may have any values.
    """
    try:
        forms = _Forms()
        ours, theirs = forms.of(program), forms.of(other)
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError):  # the graph is not meant to run there
        return False
    return program.out_spec == other.out_spec and ours == theirs


class _Forms:
    """A number for each value there is, the same for values that are computed alike."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}
        self.tables: list[Tensor] = []
        self.program: Any = None
        self.constants: dict[fx.Node, Tensor] = {}
        self.found: dict[fx.Node, Any] = {}

    def of(self, program: Program) -> tuple[Any, ...]:
        """The forms of a program's outputs."""
        self.program, self.found = program, {}
        self.constants = _constants(program)
        inputs = {program.nodes[i.name]: i for i in program.inputs}
        for node in program.graph.nodes:
            if node in self.constants:
                self.found[node] = self.table(self.constants[node])
            elif node.op == "placeholder":
                given = inputs[node]
                self.found[node] = self.number(("input", given.kind, given.path))
            elif node.op == "call_function" and not is_integer(node):
                self.found[node] = self.call(node)
        return tuple(self.argument(o) for o in program.outputs)

    def number(self, key: Any) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def table(self, value: Tensor) -> tuple[str, int]:
        for place, known in enumerate(self.tables):
            if known.shape == value.shape and known.dtype == value.dtype and close(known, value):
                return "table", place
        self.tables.append(value)
        return "table", len(self.tables) - 1

    def size(self, value: Any) -> Any:
        """A number computed from sizes; several where it is another for each batch."""
        expr, program = as_expr(value), self.program
        if not getattr(expr, "free_symbols", None):
            return expr
        batches = [program.batch] if isinstance(program.batch, int) else _BATCHES
        found = tuple(program.size_values(expr, np.asarray([1]), b).item() for b in batches)
        return found[0] if len(set(found)) == 1 else found

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        return tuple(map(self.size, node.meta["val"].shape))

    def argument(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(self.argument, value))
        if is_integer(value) or isinstance(value, torch.SymInt):
            value = self.size(value)
        return self.found[value] if isinstance(value, fx.Node) else (type(value), value)

    # -- calls ---------------------------------------------------------------------------------------------

    def call(self, node: fx.Node) -> Any:
        name = operator_name(node.target)
        if is_getitem(node) or getattr(node.target, "_schema", None) is None:
            return self.number((str(node.target), self.argument(node.args)))
        given = given_arguments(node)
        if is_tensor(node):
            found = self.unchanged(node, name, given)
            if found is not None:
                return self.found[found]
        if name in _RESHAPES:
            return self.number(
                (_RESHAPES[name], self.argument(given["self"]), self.shape(node), node.meta["val"].dtype)
            )
        if (
            name == "scaled_dot_product_attention"
            and self.is_one(given["query"], -2)
            and self.is_one(given["key"], -2)
        ):
            given = {**given, "is_causal": False}
        passed = ("pin_memory", "layout", "memory_format", *(("start", "end") if name == "slice" else ()))
        given = {k: v for k, v in given.items() if k not in passed}
        defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # type: ignore[union-attr]
        items = {k: self.argument(v) for k, v in given.items() if k not in defaults or v != defaults[k]}
        bounds = self.bounds(node) if name == "slice" else None
        return self.number((str(node.target), tuple(sorted(items.items(), key=str)), bounds))

    def bounds(self, node: fx.Node) -> Any:
        """The first and last entry of a slice, counted from the first there is."""
        given = given_arguments(node)
        size = self.shape(given["self"])[given.get("dim", 0)]
        start, end = (None if given.get(k) is None else self.size(given[k]) for k in ("start", "end"))
        return slice(start, end).indices(size)[:2]

    def is_one(self, node: fx.Node, dim: Any) -> bool:
        return isinstance(dim, int) and self.shape(node)[dim] == 1

    def unchanged(self, node: fx.Node, name: str, given: dict[str, Any]) -> fx.Node | None:
        """The argument that a call returns as it is."""
        if name == "cat":
            filled = [t for t in given["tensors"] if not self.is_empty(t)]
            return filled[0] if len(filled) == 1 and self.is_like(filled[0], node) else None
        if name == "where":
            chosen = self.constant(given["condition"])
            sides = [s for s, empty in ((given["self"], False), (given["other"], True))
                     if chosen is not None and not bool((chosen == empty).any())]  # fmt: skip
            return sides[0] if sides and self.is_like(sides[0], node) else None
        source: Any = given.get("self", given.get("input"))
        if not is_tensor(source):
            return None
        if name in ("slice_scatter", "copy"):
            written = given["src"]
            return written if self.is_like(written, node) else source if self.is_empty(written) else None
        if (
            name in ("add", "sub", "mul", "div")
            and given.get("alpha", 1) == 1
            and not given.get("rounding_mode")
        ):
            idle = 0 if name in ("add", "sub") else 1
            pairs = [
                (source, given["other"]),
                *([(given["other"], source)] if name in ("add", "mul") else []),
            ]
            for kept, nothing in pairs:
                value = self.constant(nothing)
                if (
                    is_tensor(kept)
                    and self.is_like(kept, node)
                    and value is not None
                    and bool((value == idle).all())
                ):
                    return kept
            return None
        if not self.is_like(source, node):
            return None
        if name == "masked_fill":
            mask = self.constant(given["mask"])
            return source if mask is not None and not bool(mask.any()) else None
        if name in ("constant_pad_nd", "pad"):
            return source if not any(self.size(p) for p in given["pad"]) else None
        if name in _ALONG:
            dims = given.get("dim", given.get("dims"))
            return (
                source
                if all(self.is_one(source, d) for d in (dims if isinstance(dims, list) else [dims]))
                else None
            )
        return source if name in _IDLE else None

    def constant(self, value: Any) -> Tensor | None:
        """The entries of a table."""
        found = self.found.get(value) if isinstance(value, fx.Node) else None
        return self.tables[found[1]] if isinstance(found, tuple) and found[0] == "table" else None

    def is_empty(self, node: fx.Node) -> bool:
        return 0 in self.shape(node)

    def is_like(self, a: fx.Node, b: fx.Node) -> bool:
        return a.meta["val"].dtype == b.meta["val"].dtype and self.shape(a) == self.shape(b)


def _constants(program: Program) -> dict[fx.Node, Tensor]:
    """What neither the sequence nor a weight has a part in, at a length of 1."""
    free = {program.nodes[i.name] for i in program.inputs if i.kind is not Kind.CONSTANT}
    for node in program.graph.nodes:
        if node.op == "call_function" and any(a in free for a in data_arguments(node)):
            free.add(node)
    alone = [n for n in program.graph.nodes if n not in free and is_tensor(n)]
    batch = program.batch if isinstance(program.batch, int) else _BATCHES[0]
    example = program.example
    dummy = example.new_zeros((1,) * example.dim()).expand(batch, 1, *example.shape[2:])
    with torch.no_grad():
        return program.evaluate(dummy, keep=alone)
