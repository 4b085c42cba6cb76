"""Finite masks: whether a softmax gives what they hide exactly no weight, for given weights."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from fi_compile.facts import Fact, Triangle, is_number
from fi_compile.program import operator_name

from .call import Call
from .sizes import Size, Sizes
from .triangles import of_operand

# exp(-746) is 0 in double precision, and so in every smaller type.
UNDERFLOW = -750.0
_COPIES = ("to", "_to_copy", "clone", "contiguous")
_ROUNDING = 1.1  # room for the roundings of low precision


def is_hidden(sizes: Sizes, scores: fx.Node, triangle: Triangle) -> str | None:
    """Why a softmax over ``scores`` gives entries above a diagonal exactly no weight, or None.

    They are a number, or a number and a score, and lie far enough below the score on the diagonal.
    """
    while operator_name(scores.target) in _COPIES:
        scores = scores.all_input_nodes[0]
    call = Call(scores, sizes.context)
    tensors = call.tensors()
    if call.name in ("masked_fill", "where"):
        seen = [n for n in tensors if sizes.context.is_data(n)]
        if len(seen) != 1 or not _finite(triangle.above) or not _shows_diagonal(call, seen[0], triangle):
            return None
        return _far(triangle.above, 0.0, sizes.of(seen[0]), moved=False)
    if call.name != "add" or call.arg("alpha", 1) != 1 or len(tensors) != 2:
        return None
    seen, masks = (
        [n for n in tensors if sizes.context.is_data(n)],
        [n for n in tensors if not sizes.context.is_data(n)],
    )
    if len(seen) != 1:
        return None
    rank = scores.meta["val"].dim()
    return _of_mask(sizes, masks[0], rank, (triangle.query, triangle.key), sizes.of(seen[0]))


def is_hidden_by(sizes: Sizes, mask: fx.Node, query: fx.Node, key: fx.Node, scale: float) -> str | None:
    """The same of an additive mask beside scores ``scale · query · key``."""
    rank = mask.meta["val"].dim()
    rows = sizes.row(query, -1), sizes.row(key, -1)
    if rows[0] is None or rows[1] is None:
        return None
    return _of_mask(sizes, mask, rank, (rank - 2, rank - 1), Size(abs(scale) * rows[0] * rows[1]))


def _of_mask(
    sizes: Sizes, mask: fx.Node, rank: int, place: tuple[int, int], scores: Size | None
) -> str | None:
    fact = sizes.context.fact(mask)
    if not isinstance(fact, Fact):
        return None
    missing = rank - len(fact.dims)
    for t in fact.triangles:
        if (t.query + missing, t.key + missing) == place and _finite(t.above) and _finite(t.diagonal):
            return _far(t.above, t.diagonal, scores, moved=True)
    return None


def _shows_diagonal(call: Call, scores: fx.Node, triangle: Triangle) -> bool:
    """Whether the mask of a choice leaves the scores on the diagonal: else a row may be masked as a whole."""
    mask = call.arg("condition" if call.name == "where" else "mask")
    fact = call.context.fact(mask) if isinstance(mask, fx.Node) else None
    if not isinstance(fact, Fact):
        return False
    _, diagonal = of_operand(fact, call.node.meta["val"].dim(), triangle.query, triangle.key)
    return diagonal is (call.name == "where" and call.arg("self") is scores)


def _finite(value: Any) -> bool:
    return is_number(value) and not isinstance(value, bool) and math.isfinite(value)


def _far(above: float, diagonal: float, scores: Size | None, moved: bool) -> str | None:
    if scores is None:
        return None
    bound = _ROUNDING * scores.each
    if not above + (2 if moved else 1) * bound - diagonal < UNDERFLOW:
        return None
    return (
        f"scores are at most {bound:.3g} for these weights: exp({above:g} and less) is exactly 0 beside them"
    )
