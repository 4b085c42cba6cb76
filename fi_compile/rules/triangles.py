"""What elementwise maps do to the knowledge above and on a diagonal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fi_compile.facts import (
    EXTREME,
    JUNK,
    LARGE,
    LOW,
    OPEN,
    ORDINARY,
    Fact,
    Triangle,
    constant,
    is_number,
)
from fi_compile.program import is_tensor

from .call import Call
from .magnitude import magnitude
from .mirrors import mirrored

# In a softmax, scores this low weigh exactly nothing beside an ordinary one.
VERY_LOW = -1e30


def of_operand(fact: Fact, rank: int, query: int, key: int) -> tuple[Any, Any]:
    """An operand's state above and on the diagonal of two dimensions of the result."""
    if is_number(fact.fill):
        return fact.fill, fact.fill
    ordinary = OPEN if fact.magnitude == ORDINARY else None
    missing = rank - len(fact.dims)
    for t in fact.triangles:
        if (t.query + missing, t.key + missing) == (query, key):
            return (ordinary if t.above is None else t.above), t.diagonal
    return ordinary, ordinary


def pairs(facts: Sequence[Fact], rank: int) -> set[tuple[int, int]]:
    """The (query, key) pairs any operand knows about, as dimensions of the result."""
    return {(t.query + rank - len(f.dims), t.key + rank - len(f.dims)) for f in facts for t in f.triangles}


def combined(c: Call, rank: int) -> tuple[Triangle, ...]:
    """The triangles of an elementwise operator's result."""
    nodes = c.tensors()
    facts = [c.fact(n) for n in nodes]
    found = []
    itself = mirrored(c, rank)
    for query, key in sorted(pairs(facts, rank) | itself.keys()):
        states = [of_operand(f, rank, query, key) for f in facts]
        above = state(c, dict(zip(nodes, (s[0] for s in states), strict=True)))
        diagonal = itself.get((query, key))
        if diagonal is None:
            diagonal = state(c, dict(zip(nodes, (s[1] for s in states), strict=True)))
        if above is JUNK or is_number(above):
            found.append(Triangle(query, key, above, diagonal))
        elif is_number(diagonal):
            found.append(Triangle(query, key, None, diagonal))
    return tuple(found)


def decided(table: Tensor, query: int, key: int) -> Iterator[Triangle]:
    """The one value above the diagonal of two dimensions of a table, if there is one."""
    moved = table.movedim((query, key), (-2, -1))
    above = moved[..., torch.ones(moved.shape[-2:], dtype=torch.bool, device=table.device).triu(1)]
    if above.numel() == 0:
        return
    first = above.reshape(-1)[0]
    if bool((above == first).all()):
        diagonal = moved.diagonal(dim1=-2, dim2=-1)
        start = diagonal.reshape(-1)[0]
        level = start.item() if bool((diagonal == start).all()) else None
        if level is None and diagonal.dtype != torch.bool and bool((diagonal.abs() <= LARGE).all()):
            level = OPEN
        yield Triangle(query, key, first.item(), level)


def of_table(c: Call, node: torch.fx.Node, query: int, key: int) -> tuple[Triangle, ...]:
    """What the values of an input-independent table say above a diagonal, at the longest length.

    The table must be certified along both dimensions: its values at shorter lengths are then among these.
    """
    fact = c.fact(node)
    if c.context.is_data(node) or not fact.proved(c.context.length):
        return ()
    table = c.context.table(node)
    return () if table is None or table.is_complex() else tuple(decided(table, query, key))


def state(c: Call, states: dict[Any, Any]) -> Any:
    """One entry of the result, given that entry of every tensor operand: a number, OPEN, ``None`` or JUNK."""
    value = _state(c, states)
    return in_dtype(value, c.node.meta["val"].dtype) if is_number(value) else value


def in_dtype(number: float, dtype: torch.dtype) -> Any:
    """A number as a tensor of this type holds it; ``None`` where it cannot."""
    if dtype.is_complex:
        return number
    try:
        return torch.full((), number, dtype=dtype).item()
    except (RuntimeError, ValueError, OverflowError):
        return None


def _state(c: Call, states: dict[Any, Any]) -> Any:
    special = _SPECIAL.get(c.name)
    if special is not None:
        result = special(c, states)
        if result is not _UNDECIDED:
            return result
    if all(is_number(v) for v in states.values()) and not any(
        isinstance(a, torch.fx.Node) and a not in states for a in c.node.all_input_nodes
    ):
        return evaluated(c, states)
    if any(v is JUNK for v in states.values()):
        return JUNK
    levels = [ORDINARY if _moderate(v) else EXTREME for v in states.values()]
    return OPEN if states and magnitude(c, levels, own=False) == ORDINARY else None


def _moderate(value: Any) -> bool:
    return value is OPEN or (is_number(value) and abs(value) <= LARGE)


def evaluated(c: Call, states: dict[Any, Any]) -> Any:
    """The operator itself, run on numbers."""

    def scalar(node: Any) -> torch.Tensor:
        dtype = node.meta["val"].dtype
        return torch.tensor(states[node], dtype=dtype)

    args, kwargs = torch.fx.map_arg((c.node.args, c.node.kwargs), scalar)
    try:
        value = c.node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError):
        return None
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.is_complex():
        return None
    number = value.item()
    return None if isinstance(number, float) and math.isnan(number) else number


_UNDECIDED = object()


def _operand(c: Call, name: str, states: dict[Any, Any]) -> Any:
    raw = c.arg(name)
    return states.get(raw) if isinstance(raw, torch.fx.Node) else raw


def _where(c: Call, states: dict[Any, Any]) -> Any:
    condition = _operand(c, "condition", states)
    if isinstance(condition, bool):
        return _operand(c, "self" if condition else "other", states)
    return _UNDECIDED


def _masked_fill(c: Call, states: dict[Any, Any]) -> Any:
    mask = _operand(c, "mask", states)
    if isinstance(mask, bool):
        return _operand(c, "value" if mask else "self", states)
    return _UNDECIDED


def _product(c: Call, states: dict[Any, Any]) -> Any:
    values = [_operand(c, "self", states), _operand(c, "other", states)]
    if any(is_number(v) and v == 0 for v in values):
        other = values[1] if is_number(values[0]) and values[0] == 0 else values[0]
        if other is OPEN and not _may_overflow(c):
            return 0
        if is_number(other) and math.isfinite(other):
            return 0
        return JUNK
    return _UNDECIDED


def _may_overflow(c: Call) -> bool:
    """Whether the factor beside a zero is a table that is not finite everywhere (0 · inf is NaN)."""
    for node in c.tensors():
        if not c.context.is_data(node) and len([a for a in c.fact(node).axes if not constant(a.size)]) > 1:
            table = c.context.table(node)
            if table is None or not bool(torch.isfinite(table).all()):
                return True
    return False


def _sum(c: Call, states: dict[Any, Any]) -> Any:
    a, b = _operand(c, "self", states), _operand(c, "other", states)
    if c.name == "sub":
        b = -b if is_number(b) and not isinstance(b, bool) else b if b in (None, OPEN, JUNK) else _UNDECIDED
    if b is _UNDECIDED or a is JUNK or b is JUNK or c.arg("alpha", 1) != 1:
        return _UNDECIDED
    for known, beside in ((a, "other"), (b, "self")):
        raw = c.arg(beside)
        if known == -math.inf and is_tensor(raw) and c.fact(raw).magnitude <= LOW:
            return known  # whatever stands there is no NaN, and not +inf
    for known, other in ((a, b), (b, a)):
        if (
            is_number(known)
            and known <= VERY_LOW
            and (other is OPEN or (is_number(other) and abs(other) <= LARGE))
        ):
            return float(known)
    return _UNDECIDED


def _and(c: Call, states: dict[Any, Any]) -> Any:
    values = [_operand(c, "self", states), _operand(c, "other", states)]
    return False if any(v is False for v in values) else _UNDECIDED


def _or(c: Call, states: dict[Any, Any]) -> Any:
    values = [_operand(c, "self", states), _operand(c, "other", states)]
    return True if any(v is True for v in values) else _UNDECIDED


def _quotient(c: Call, states: dict[Any, Any]) -> Any:
    numerator, denominator = _operand(c, "self", states), _operand(c, "other", states)
    if not is_number(numerator) or c.arg("rounding_mode") is not None:
        return _UNDECIDED
    if numerator == 0 and denominator in (None, OPEN):
        return numerator
    if numerator <= VERY_LOW and is_number(denominator) and denominator > 0:
        return float(numerator) / denominator
    return _UNDECIDED


def _greater(c: Call, states: dict[Any, Any]) -> Any:
    """Beside a very low number the other one is the greater, where that is of ordinary size."""
    values = [_operand(c, name, states) for name in ("self", "other")]
    for low, other in (values, values[::-1]):
        if is_number(low) and not isinstance(low, bool) and low <= VERY_LOW and other is OPEN:
            return OPEN
    return _UNDECIDED


_SPECIAL = {
    "maximum": _greater,
    "max": _greater,
    "fmax": _greater,
    "where": _where,
    "masked_fill": _masked_fill,
    "mul": _product,
    "add": _sum,
    "sub": _sum,
    "bitwise_and": _and,
    "logical_and": _and,
    "__and__": _and,
    "bitwise_or": _or,
    "logical_or": _or,
    "__or__": _or,
    "div": _quotient,
}
