"""The certificate of a program: what is known of each node at every length, and what that says of paths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from torch import fx

from .errors import Refusal
from .facts import Deny, Fact, Quantity
from .program import Program, data_arguments, operator_name
from .rules import RULES, Call


@dataclass(frozen=True)
class Step:
    """One line of the certificate: which rule certified which node, under which condition."""

    rule: str
    node: str
    condition: str


@dataclass
class Proof:
    """What is certified of every node of a program, for every admitted length up to ``capacity``."""

    program: Program
    capacity: int
    facts: dict[fx.Node, Fact] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    values_read: frozenset[str] = frozenset()
    rows_independent: bool = False
    length: Quantity = 0  # the sequence length, at every admitted one
    data: set[fx.Node] = field(default_factory=set)
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    denied: dict[fx.Node, Deny] = field(default_factory=dict)

    def proved(self, node: fx.Node) -> bool:
        """``V_s(x)`` narrowed to r on its sequence axes is ``V_r(x[:r])``, for all admitted r ≤ s."""
        fact = self.facts.get(node)
        return fact is not None and fact.proved(self.length)

    def newest(self, node: fx.Node) -> bool:
        """The value is a function of row s-1 of proved values (and of constants)."""
        fact = self.facts.get(node)
        return fact is not None and fact.newest

    def row_local(self, node: fx.Node) -> bool:
        """The operator's own rule: each row of the result needs only the same row of each argument."""
        call = self.calls.get(node)
        fact = self.facts.get(node)
        if call is None or fact is None or not call.row_local:
            return False
        return all(
            axis.plain for n in (node, *call.tensors()) if n in self.facts for axis in self.facts[n].axes
        )

    def by_entry(self, node: fx.Node) -> bool:
        """The operator's own rule: each entry of the result needs only the entries in its place."""
        call = self.calls.get(node)
        return call is not None and call.by_entry and self.row_local(node)

    def call(self, node: fx.Node) -> Call | None:
        """The call a certified node's rule saw, or ``None``."""
        return self.calls.get(node) if node in self.facts else None

    def linear_in(self, node: fx.Node, inputs: Collection[fx.Node]) -> bool:
        """The operator is jointly linear in exactly these arguments, the others held fixed."""
        call = self.calls.get(node)
        return call is not None and frozenset(inputs) in call.linear

    def affine_in(self, node: fx.Node, inputs: Collection[fx.Node]) -> bool:
        """The operator is jointly linear in these arguments up to a term that does not contain them."""
        call = self.calls.get(node)
        if call is None or not inputs:
            return False
        return any(frozenset(inputs) <= group for group in [*call.linear, *call.affine_groups])

    def shift_invariant(self, node: fx.Node, inputs: Collection[fx.Node] | None = None) -> bool:
        """The data path from ``inputs`` to ``node`` is linear and commutes with shifts, up to a fixed term.

        Without ``inputs`` the path is followed back to the nearest proved values. Together with
        ``proved(node)``: the node is a causal convolution of them with input-independent filters.
        """
        return self._path(node, inputs, lambda call: call.invariant)

    def homogeneous(self, node: fx.Node, inputs: Collection[fx.Node]) -> bool:
        """The data path from ``inputs`` to ``node`` is linear, and no fixed term is added to it."""

        def whole(call: Call) -> list[frozenset[fx.Node]]:
            data = {a for a in data_sources(call.node) if a in self.data}
            return [group for group in call.linear if group <= data]

        return self._path(node, inputs, whole)

    def _path(
        self,
        node: fx.Node,
        inputs: Collection[fx.Node] | None,
        groups: Callable[[Call], Iterable[frozenset[fx.Node]]],
    ) -> bool:
        """Whether every operator on the data path takes its data arguments within one of its groups."""
        data = self.data
        todo, seen = [node], {node}
        while todo:
            current = todo.pop()
            call = self.calls.get(current)
            sources = {a for a in data_sources(current) if a in data}
            if not sources:
                return False
            if call is not None and not any(sources <= group for group in groups(call)):
                return False
            if call is None and current.op == "placeholder":
                return False
            for source in sources - seen:
                stop = self.proved(source) if inputs is None else source in inputs
                if not stop:
                    todo.append(source)
                seen.add(source)
        return True

    def beside(self, seen: Refusal) -> list[Refusal]:
        """What is said of an inconsistency that was seen: the draws, which look like any, or it and what is denied."""
        drawn = [r for r in self.refusals if r.kind == "random"]
        return drawn or [seen, *self.refusals]

    def why(self, node: fx.Node) -> str | None:
        """Why a node has no certificate: the refusal of its own rule, or ``None``."""
        denied = self.denied.get(node)
        return None if denied is None else denied.reason


def data_sources(node: fx.Node) -> list[fx.Node]:
    """The arguments whose data a node reads: not those it only takes a shape from."""
    sources = data_arguments(node) if node.op == "call_function" else []
    rule = RULES.get(operator_name(node.target))
    if rule is None or not rule.lends or not sources:
        return sources
    lent = {Call(node, None).arg(name) for name in rule.lends}  # type: ignore[arg-type]
    return [a for a in sources if a not in lent]
