"""Weights that are divided by their sum: what multiplies all weights of a query cancels, whatever it is.

``exp(s - max(s)) * mask / sum(exp(s - max(s)) * mask)`` takes off the largest score of all keys, later ones among them,
and so does a softmax over all keys that is masked and normalised again. Both multiply the weights of a query by one
factor, which is gone after the division.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from .compare import same_function
from .program import (
    Program,
    add_call,
    data_arguments,
    given_arguments,
    is_getitem,
    is_integer,
    is_tensor,
    is_zero,
    needed,
    operator_name,
)
from .softmaxes import works_along_last

aten = torch.ops.aten
_SOFTMAXES = ("softmax", "_softmax")
_COPIES = frozenset({"clone", "contiguous", "alias", "detach", "_to_copy", "to"})
_LARGEST = ("amax", "max")
_PRODUCTS = frozenset({"matmul", "bmm"})


Mask = tuple[Any, bool]  # a value, and whether its nonzero entries are left


@dataclass(frozen=True)
class Factor:
    """A power of a query's factor multiplies a value; the queries are this dimension, counted from the last."""

    power: int
    queries: int


def with_quotients_masked(program: Program) -> Program:
    """The program with weights that are masked and then normalised made of masked scores.

    Before and after::

        e = exp(s - amax(s, -1, True)); ((e * mask) @ v) / (e * mask).sum(-1, True)
        e = softmax(where(mask, s, -inf)); ((e * mask) @ v) / (e * mask).sum(-1, True)

    Requires that nothing but such quotients reads them. Of several masks, one that leaves a score is enough. Where the
    twins do not compute the same, nothing is changed.
    """
    if not any(operator_name(n.target) in ("exp", *_SOFTMAXES) for n in program.graph.nodes):
        return program
    shared = _repeats_shared(program)
    found = {n: masks for n in shared.graph.nodes if (masks := _masks(n)) is not None}
    nodes, graph = list(shared.graph.nodes), fx.Graph()
    behind = {n: _behind(nodes, found[n]) & found.keys() for n in found}
    if not found or any(n in _reached(n, behind) for n in found):  # masked by each other
        return program
    copied: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> None:
        if node in copied:
            return
        if node in found:
            for each in needed(nodes, [mask for chain in found[node] for mask, _ in chain]):
                copy(each)
            copied[node] = _weights(graph, shared, node, found[node], copied)
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)

    for node in nodes:
        copy(node)
    graph.eliminate_dead_code()
    graph.lint()
    made = replace(shared, module=fx.GraphModule(nn.Module(), graph))
    return made if same_function(made, program) else program


def _repeats_shared(program: Program) -> Program:
    """The program with each call made once: what is masked for a product and again for its sum is one value.

    What asks weights for their shape, as the making of a mask may, asks the scores.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    shaped: dict[fx.Node, fx.Node] = {}  # weights: scores of one shape and type
    made: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        scores = _scores(node) if is_tensor(node) else None
        masked = next((a for a in node.all_input_nodes if a in shaped and _passes(node, a)), None)
        if scores is not None:
            shaped[node] = scores
        elif masked is not None and node.meta["val"].dtype == masked.meta["val"].dtype:
            shaped[node] = shaped[masked]
        lent = {a: shaped[a] for a in node.all_input_nodes if a in shaped and node not in _readers(a)}
        new = copied[node] = graph.node_copy(node, lambda a, lent=lent: copied[lent.get(a) or a])
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(
            node.target, "tags", ()
        ):
            continue
        first = made.setdefault(f"{node.target} {new.args!r} {new.kwargs!r}", new)  # nodes by their names
        if first is not new:
            copied[node] = first
            graph.erase_node(new)
    return replace(program, module=fx.GraphModule(nn.Module(), graph))


def _masks(node: fx.Node) -> list[list[Mask]] | None:
    """The masks on each way from exponentials to a quotient, none where one is bare; None if nothing is to change."""
    if not is_tensor(node) or _scores(node) is None:
        return None
    ways = [[node, *_masked(reader)] for reader in _readers(node) if _passes(reader, node)]
    ways = ways if len(ways) == len(_readers(node)) else [[node]]
    masks = [[m for pair in pairwise(way) if (m := _mask(pair[1], pair[0])) is not None] for way in ways]
    if not all(masks) or node in _behind(list(node.graph.nodes), masks):
        ways, masks = [[node]], []
    # Where truth values hide a score, other factors of it may be zero, too, and then are so below.
    masks = [[m for m in chain if m[0].meta["val"].dtype == torch.bool] or chain for chain in masks]
    if _cancels([way[-1] for way in ways]) and (masks or not _is_softmax(node)):
        return masks
    return [] if _is_whole(node) else None


def _behind(nodes: list[fx.Node], masks: list[list[Mask]]) -> set[fx.Node]:
    """What masks are made of."""
    return set(needed(nodes, [mask for chain in masks for mask, _ in chain]))


def _reached(node: fx.Node, behind: dict[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    """The weights that the masks of these weights are made of, and theirs."""
    found, left = set(), [node]
    while left:
        new = behind[left.pop()] - found
        found |= new
        left += new
    return found


def _masked(node: fx.Node) -> list[fx.Node]:
    """From weights to the last mask on them."""
    chain, last = [node], 0
    while len(readers := _readers(chain[-1])) == 1:
        (user,) = readers
        if not _passes(user, chain[-1]):
            break
        chain.append(user)
        last = len(chain) - 1 if operator_name(user.target) not in _COPIES else last
    return chain[: last + 1]


def _passes(user: fx.Node, weights: fx.Node) -> bool:
    """Whether a call copies weights or masks them."""
    return operator_name(user.target) in _COPIES or _mask(user, weights) is not None


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value's entries, and not its shape alone."""
    return [user for user in node.users if not is_integer(user) and node in data_arguments(user)]


def _scores(node: fx.Node) -> fx.Node | None:
    """What a node holds the exponentials of, up to a factor for each query that depends on the scores alone."""
    name = operator_name(node.target) if node.op == "call_function" else ""
    if _is_softmax(node) and works_along_last(node, 1):
        source: Any = node.args[0]
        return source if source.meta["val"].dtype == node.meta["val"].dtype else None
    difference: Any = node.args[0] if name == "exp" else None
    if difference is None or operator_name(difference.target) != "sub":
        return None
    scores, largest = difference.args[:2]
    if not is_tensor(scores) or given_arguments(difference).get("alpha", 1) != 1:
        return None
    if scores.meta["val"].dtype != node.meta["val"].dtype:
        return None  # worked out in a wider type than the scores', as a softmax of them would not be
    return scores if _taken_of(largest, *_LARGEST) is _bare(scores) or _is_whole(node) else None


def _is_softmax(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node.target) in _SOFTMAXES


def _is_whole(node: fx.Node) -> bool:
    """Whether a node is a softmax as its definition says: with the logarithm of the sum of all taken off."""
    difference: Any = node.args[0] if operator_name(node.target) == "exp" else None
    if difference is None or operator_name(difference.target) != "sub":
        return False
    return _taken_of(difference.args[1], "logsumexp") is _bare(difference.args[0])


def _taken_of(value: Any, *operators: str) -> fx.Node | None:
    """The scores that one of these operators goes over, key by key, where its result stands beside them."""
    rank, kept = (value.meta["val"].dim(), True) if is_tensor(value) else (0, True)
    while is_tensor(value) and operator_name(value.target) in ("unsqueeze", *_COPIES):
        if operator_name(value.target) == "unsqueeze":
            if not kept or value.args[1] not in (-1, rank - 1):
                return None
            kept = False
        value = value.args[0]
    if is_tensor(value) and is_getitem(value):
        value = value.args[0] if value.args[1] == 0 else None
    if not isinstance(value, fx.Node) or operator_name(value.target) not in operators:
        return None
    given = given_arguments(value)
    dims = given.get("dim")
    dims = dims if isinstance(dims, (list, tuple)) else [] if dims is None else [dims]
    along = [d % rank for d in dims] == [rank - 1]
    return _bare(given["self"]) if along and bool(given.get("keepdim")) == kept else None


def _bare(value: Any) -> Any:
    """What a copy of the same type was made of."""
    while is_tensor(value) and operator_name(value.target) in _COPIES:
        source = value.args[0]
        if source.meta["val"].dtype != value.meta["val"].dtype:
            break
        value = source
    return value


def _mask(node: fx.Node, weights: fx.Node) -> Mask | None:
    """What a node masks weights by, and whether nonzero entries of that are left; None where it does not."""
    name = operator_name(node.target)
    given = given_arguments(node) if getattr(node.target, "_schema", None) is not None else {}
    if not is_tensor(node) or node.meta["val"].shape != weights.meta["val"].shape:
        return None
    if name == "mul":
        others = [a for a in node.args[:2] if a is not weights]
        return (others[0], True) if len(others) == 1 and is_tensor(others[0]) else None
    if name == "masked_fill" and given["self"] is weights and is_zero(given["value"]):
        return given["mask"], False
    if name == "where" and given["condition"] is not weights:
        if given["self"] is weights and is_zero(given["other"]):
            return given["condition"], True
        if given["other"] is weights and is_zero(given["self"]):
            return given["condition"], False
    return None


def _cancels(weights: list[fx.Node]) -> bool:
    """Whether a factor for each query that multiplies all these weights shows in no output."""
    factors = dict.fromkeys(weights, Factor(1, 2))
    for node in weights[0].graph.nodes:
        reads = {a: factors[a] for a in node.all_input_nodes if a in factors}
        if node in factors or not any(node in _readers(a) for a in reads):
            continue
        found = _factor(node, reads)
        if found is None:
            return False
        if found.power:
            factors[node] = found
    return True


def _factor(node: fx.Node, reads: dict[fx.Node, Factor]) -> Factor | None:
    """What multiplies a call's result; None where that is no power of the factor."""
    if node.op != "call_function" or not is_tensor(node) or is_getitem(node):
        return None
    name, args, rank = operator_name(node.target), node.args, node.meta["val"].dim()
    given, source = given_arguments(node), args[0]
    first = reads.get(source) if isinstance(source, fx.Node) else None
    before = source.meta["val"].dim() if is_tensor(source) else 0  # type: ignore[union-attr]
    if name in ("mul", "div"):
        queries = {f.queries for f in reads.values()}
        if len(queries) > 1 or given.get("rounding_mode") or any(a.meta["val"].dim() != rank for a in reads):
            return None
        powers = [reads[a].power if isinstance(a, fx.Node) and a in reads else 0 for a in args[:2]]
        return Factor(powers[0] + powers[1] if name == "mul" else powers[0] - powers[1], *queries)
    if first is None or len(reads) > 1:
        return None
    if name in _COPIES:
        return first if node.meta["val"].is_floating_point() else None
    if name in _PRODUCTS:
        kept = first.queries == 2 and args[1] not in reads and rank == before
        return first if kept else None
    if name == "sum":
        return _summed(given, first, before)
    if name == "unsqueeze" and args[1] in (-1, rank - 1):
        return replace(first, queries=first.queries + 1)
    if name == "expand" and rank == before:
        return first
    return None


def _summed(given: dict[str, Any], factor: Factor, rank: int) -> Factor | None:
    """After a sum over the keys."""
    dims = given.get("dim")
    if dims is None or [d % rank for d in dims] != [rank - 1] or factor.queries != 2:
        return None
    return factor if given.get("keepdim") else replace(factor, queries=1)


def _weights(
    graph: fx.Graph, program: Program, node: fx.Node, masks: list[list[Mask]], copied: dict[fx.Node, fx.Node]
) -> fx.Node:
    """The weights anew: a softmax of the scores that the masks leave on any of the ways."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return add_call(graph, node, program.sequence.meta["val"].fake_mode, target, args, kwargs)

    def hidden(mask: fx.Node, is_kept: bool) -> fx.Node:
        """Where one mask hides a score."""
        found = copied[mask]
        if found.meta["val"].dtype != torch.bool:
            return call(aten.eq.Scalar if is_kept else aten.ne.Scalar, found, 0)
        return call(aten.logical_not.default, found) if is_kept else found

    def joined(operator: Any, values: list[fx.Node]) -> fx.Node:
        return reduce(lambda a, b: call(operator, a, b), values)

    source = _scores(node)
    assert source is not None
    scores, ways = copied[source], []
    for chain in masks:
        ways.append(joined(aten.logical_or.default, [hidden(*m) for m in dict.fromkeys(chain)]))
    if ways:
        hides = joined(aten.logical_and.default, list(dict.fromkeys(ways)))
        scores = call(aten.masked_fill.Scalar, scores, hides, -math.inf)
    return call(aten.softmax.int, scores, -1)
