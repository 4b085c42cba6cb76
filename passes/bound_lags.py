"""bound_lags: how many lags the filter of a convolution can have, at any length, by the rules alone.

A filter that is known to end early need not be computed up to the capacity.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from fi_compile.facts import EVERYWHERE, Fact
from fi_compile.passes.prove_prefix import Walker
from fi_compile.proof import Proof
from fi_compile.rules import Call
from fi_compile.units import Unit


def bound_lags(proof: Proof, unit: Unit, x: fx.Node, most: int | None = None) -> int | None:
    """A number of lags from which on the filter of ``unit``, a convolution of ``x``, is zero; None where none is known.

    With ``most``: None also where they are more than that, or more than a quarter of the capacity.

    Requires ``proof.shift_invariant(unit.exit, {x})``. The rules are asked once more, of a sequence that is zero but
    at position 0: where its response may differ from zero bounds the filter, at every length up to ``proof.capacity``.
    """
    known = proof.facts.get(x)
    if known is None or not known.proved(proof.length) or len([a for a in known.axes if not a.fixed]) != 1:
        return None
    walker = _Impulse(proof, unit, x)
    for node in unit.nodes:
        walker.visit(node)
    response = walker.results.get(unit.exit)
    if not isinstance(response, Fact) or not response.proved(proof.length):
        return None
    (axis,) = [a for a in response.axes if not a.fixed]
    found = int(np.max(axis.hi)) + 1
    return found if most is None or found <= min(most, proof.capacity // 4) else None


class _Impulse(Walker):
    """The rules' context where ``x`` is an impulse at position 0, and terms without ``x`` are left out."""

    def __init__(self, proof: Proof, unit: Unit, x: fx.Node) -> None:
        super().__init__(proof.program, proof.capacity, {})
        inside = set(unit.nodes)
        self.results: dict[fx.Node, Any] = {n: f for n, f in proof.facts.items() if n not in inside}
        dims = tuple(
            tuple(a if a.fixed else replace(a, valid=EVERYWHERE, lo=0, hi=0) for a in dim)
            for dim in proof.facts[x].dims
        )
        self.results[x] = Fact(dims)
        self.data = {x}
        self.known = proof

    def _apply(self, call: Call) -> Fact | list[Fact]:
        known = self.known.call(call.node)
        data = [a for a in call.node.all_input_nodes if a in self.data]
        if known is None or len(data) != 1:
            return super()._apply(call)
        beside = frozenset().union(*(group for group in known.linear if data[0] in group)) - {data[0]}
        if beside and known.row_local and _shape(data[0]) == _shape(call.node):
            return self.results[data[0]]
        for name, argument in call.arguments.items():
            if isinstance(argument, fx.Node) and argument in beside:
                call.arguments[name] = None  # a rule that cannot do without it gives no bound
        return super()._apply(call)


def _shape(node: fx.Node) -> str:
    return str(tuple(node.meta["val"].shape))
