"""Operators that meet a value with itself on the diagonal: ``x == xᵀ`` is true there, whatever x holds."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from fi_compile.program import is_tensor

from .call import Call, is_one

_DEEPEST = 8  # calls followed back to see that two values are one
# What operators make of a number and itself.
_OF_ITSELF = {
    "eq": True, "le": True, "ge": True, "ne": False, "lt": False, "gt": False, "logical_xor": False,
    "sub": 0, "rsub": 0, "bitwise_xor": 0, "__xor__": 0,
}  # fmt: skip


def mirrored(c: Call, rank: int) -> dict[tuple[int, int], Any]:
    """Pairs of dimensions on whose diagonal an operator meets each entry with itself, as in ``x == xᵀ``: its value."""
    a, b = c.arg("self"), c.arg("other")
    if c.name not in _OF_ITSELF or not (is_tensor(a) and is_tensor(b)) or c.arg("alpha", 1) != 1:
        return {}
    dtype = a.meta["val"].dtype
    # NaN equals nothing, and infinity less itself is NaN.
    if (dtype.is_floating_point or dtype.is_complex) and c.name not in ("lt", "gt"):
        return {}
    places = [_shown(c, node, rank) for node in (a, b)]
    if places[0] is None or places[1] is None or not _same_value(places[0][0], places[1][0]):
        return {}
    ours, theirs = places[0][1], places[1][1]
    apart = [(ours[d], theirs[d]) for d in ours if ours[d] != theirs.get(d)]
    found = {frozenset(pair) for pair in apart}
    if len(found) != 1:
        return {}
    query, key = found.pop()
    value = _OF_ITSELF[c.name]
    value = bool(value) if c.node.meta["val"].dtype == torch.bool else value
    return {(query, key): value, (key, query): value}


def _same_value(a: Any, b: Any, depth: int = _DEEPEST) -> bool:
    """Whether two arguments are one value, or come from the same calls of the same operators."""
    if not (isinstance(a, torch.fx.Node) and isinstance(b, torch.fx.Node)):
        return type(a) is type(b) and a == b
    if a is b:
        return True
    if not depth or a.op != "call_function" or a.target != b.target:
        return False
    ours, spec = tree_flatten((a.args, a.kwargs))
    theirs, other = tree_flatten((b.args, b.kwargs))
    return spec == other and all(_same_value(x, y, depth - 1) for x, y in zip(ours, theirs, strict=True))


def _shown(c: Call, node: torch.fx.Node, rank: int) -> tuple[Any, dict[int, int]] | None:
    """Whose entries an operand shows, and at which dimension of the result each of the base's dimensions."""
    fact = c.fact(node)
    if fact.view is None:
        return None
    missing = rank - len(fact.dims)
    base = c.fact(fact.view.base)
    places = {d: i + missing for i, d in enumerate(fact.view.dims) if d is not None}
    return fact.view.base, {d: i for d, i in places.items() if not is_one(base.dims[d])}
