"""How far an attention looks back: certified by what every operator does to one entry that lies far below the diagonal.

The tables inside depend on the lag alone, so their newest rows say what they hold at every lag. From a lag W on they
may hold one number for all, such as -inf or False. Each operator's own rule says what becomes of an entry of which that
is known; where it ends as a weight of exactly 0 in a sum over keys, no key W or more positions back counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fi_compile.facts import JUNK, LARGE, OPEN, ORDINARY, is_number
from fi_compile.program import data_arguments, operator_name
from fi_compile.proof import Proof
from fi_compile.rules.call import Call
from fi_compile.rules.triangles import VERY_LOW, in_dtype, state

from .groups import Group

_WEIGHTS = ("softmax", "_softmax")
_ATTENTION = "scaled_dot_product_attention"
# The same entries, perhaps in another type.
_COPIES = frozenset(("to", "_to_copy", "type_as", "clone", "contiguous", "dropout", "alias", "detach"))
# Operators that run on one number as on each of many.
_EACH = frozenset((
    "mul", "add", "sub", "div", "neg", "where", "masked_fill", "bitwise_and", "logical_and", "__and__",
    "bitwise_or", "logical_or", "__or__", "bitwise_not", "logical_not", "exp", "clamp", "clamp_min", "clamp_max",
    "maximum", "minimum", "relu", "nan_to_num",
))  # fmt: skip


def reach_of(
    group: Group, rows: Mapping[fx.Node, Tensor], queries: Mapping[fx.Node, int], proof: Proof
) -> int | None:
    """W: the least number of newest keys beside which all others weigh nothing; None where none is certified.

    ``rows``: of each table of two sequence axes its newest row, over all keys so far. ``queries``: the dimension
    of each node along its queries.
    """
    capacity = min(_along_keys(group, t, queries, row).shape[-1] for t, row in rows.items())
    low, high = 0, capacity  # no key may be left out beyond ``low``; all beyond ``high`` certainly
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if hides(group, rows, queries, proof, middle) else (middle, high)
    return high if high < capacity else None


def hides(
    group: Group,
    rows: Mapping[fx.Node, Tensor],
    queries: Mapping[fx.Node, int],
    proof: Proof,
    window: int,
) -> bool:
    """Whether keys of lag ``window`` or more weigh exactly nothing, up to as many as the rows hold."""
    states: dict[fx.Node, Any] = {}
    for table in group.boundary:
        if table in rows:
            seen = _along_keys(group, table, queries, rows[table])
            states[table] = _level(seen[..., : seen.shape[-1] - window])
        else:
            fact = proof.facts.get(table)
            states[table] = OPEN if fact is not None and fact.magnitude == ORDINARY else None
    for node in group.nodes:
        call = proof.call(node)
        if call is None:
            return False
        if node is group.unit.exit:
            return _sums_nothing(group, proof, call, states)
        if len(group.analysis.axes[node].rows) != 2:
            return False
        states[node] = _entry(group, proof, call, states, queries[node])
    return False


def _along_keys(group: Group, table: fx.Node, queries: Mapping[fx.Node, int], row: Tensor) -> Tensor:
    """A table's newest row with its keys last, the newest key at the end."""
    (key,) = (a for a in group.analysis.axes[table].rows if a != queries[table])
    return row.movedim(key, -1)


def _level(far: Tensor) -> Any:
    """What is known of all of these entries: one number, ordinary size, or nothing."""
    if not far.numel() or far.is_complex():
        return None
    first = far.reshape(-1)[0]
    if bool((far == first).all()):
        return first.item()
    return OPEN if far.dtype == torch.bool or bool((far.abs() <= LARGE).all()) else None


def _entry(group: Group, proof: Proof, call: Call, states: Mapping[fx.Node, Any], query: int) -> Any:
    """One far entry of an operator's result."""
    node = call.node
    given = {n: states[n] for n in call.tensors()}
    if call.name in _WEIGHTS:
        rank = node.meta["val"].dim()
        (key,) = (a for a in group.analysis.axes[node].rows if a != query)
        (score,) = given.values()
        if call.number("dim") % rank != key or not _is_hidden(score):
            return None
        return 0.0
    if not proof.row_local(node):
        return None
    if call.name in _COPIES or _is_view(node):
        (source,) = data_arguments(node)
        known = given[source]
        return in_dtype(known, node.meta["val"].dtype) if is_number(known) else known
    if call.name in _EACH:
        return state(call, given)
    fact = proof.facts[node]
    known = all(v is OPEN or (is_number(v) and abs(v) <= LARGE) for v in given.values())
    return OPEN if known and fact.magnitude == ORDINARY else None


def _is_view(node: fx.Node) -> bool:
    """Whether an operator shows the entries of its one tensor argument as they are."""
    schema = getattr(node.target, "_schema", None)
    return (
        schema is not None
        and len(data_arguments(node)) == 1
        and len(schema.returns) == 1
        and schema.returns[0].alias_info is not None
        and not schema.returns[0].alias_info.is_write
        and operator_name(node.target) not in _EACH
    )


def _is_hidden(score: Any) -> bool:
    """Whether a softmax gives such a score exactly no weight, beside the one on the diagonal."""
    return is_number(score) and not isinstance(score, bool) and score <= VERY_LOW


def _sums_nothing(group: Group, proof: Proof, call: Call, states: Mapping[fx.Node, Any]) -> bool:
    """Whether far entries add exactly nothing to the exit."""
    pairs = [n for n in call.tensors() if len(group.analysis.axes[n].rows) == 2]
    if call.name == _ATTENTION:
        mask = states.get(call.arg("attn_mask"))
        return len(pairs) == 1 and (mask is False or _is_hidden(mask))
    finite = [v is OPEN or (is_number(v) and abs(v) <= LARGE) for n, v in states.items() if n in pairs]
    return (
        all(finite)
        and any(is_number(states[n]) and states[n] == 0 and proof.linear_in(call.node, {n}) for n in pairs)
        and all(states[n] is not JUNK for n in pairs)
    )
