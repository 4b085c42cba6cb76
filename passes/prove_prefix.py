"""prove_prefix: the static certificate that a program's values agree between all lengths up to a capacity."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fi_compile.errors import Refusal
from fi_compile.facts import (
    EXTREME,
    OPEN,
    ORDINARY,
    Deny,
    Dim,
    Fact,
    Quantity,
    View,
    by_batch,
    constant,
    fixed,
    is_number,
    same,
    sequence,
    tidy,
)
from fi_compile.program import (
    Kind,
    Program,
    as_expr,
    is_integer,
    is_tensor,
    operator_name,
    source_of,
)
from fi_compile.proof import Proof, Step, data_sources
from fi_compile.rules import RULES, Call
from fi_compile.rules.affine import exact, holds
from fi_compile.rules.magnitude import magnitude, of_table
from fi_compile.rules.sizes import Sizes
from fi_compile.rules.triangles import decided, in_dtype
from fi_compile.symbolic import evaluate_at

# Conditions are evaluated at two batch sizes, so that no size coincides with the length by chance.
_BATCHES = (3, 1_000_003)
# Tables of at most this many elements are decided by their values at the capacity.
_LARGEST_TABLE = 1 << 25


def prove_prefix(program: Program, capacity: int, bounded: Mapping[fx.Node, float] | None = None) -> Proof:
    """Walk ``program`` once and certify what each node's rule allows.

    ``bounded``: input-independent tables taken as agreeing between lengths, because they were evaluated at all of
    them, with the bound found.

    Requires a functional program. Ensures ``proof.proved(node)`` holds only if the node's values at any
    two admitted lengths up to ``capacity`` agree on the shorter one's rows, for every input. Never raises
    for an unprovable program: ``proof.refusals`` says what stood in the way of its outputs.
    """
    walker = Walker(program, capacity, bounded or {})
    for node in program.graph.nodes:
        walker.visit(node)
    proof = walker.finish()
    walker.tables.clear()  # which the proof's calls would keep
    return proof


class Walker:
    """The context rules run in: facts so far, and sizes evaluated at every length."""

    def __init__(self, program: Program, capacity: int, bounded: Mapping[fx.Node, float]) -> None:
        self.program, self.bounded = program, bounded
        lengths = program.lengths.upto(capacity)
        batches = _BATCHES if not isinstance(program.batch, int) else (program.batch,)
        self.lengths = np.broadcast_to(lengths, (len(batches), len(lengths))) + np.zeros(
            (1, 1), dtype=np.int64
        )
        self.batches = np.array(batches, dtype=np.int64)[:, None] + np.zeros(
            (1, len(lengths)), dtype=np.int64
        )
        self.length: Quantity = self.lengths if len(lengths) else 0
        self.empty = not len(lengths)
        self.sizes: dict[Any, Any] = {}
        self.results: dict[fx.Node, Fact | list[Fact]] = {}
        self.tables: dict[fx.Node, Tensor | None] = {}
        self.read_values: set[str] = set()
        self.data: set[fx.Node] = {program.sequence}  # nodes whose data comes from the sequence
        self.proof = Proof(program, capacity, length=self.length, data=self.data)

    # -- what rules ask for

    def evaluate(self, expr: Any) -> Any:
        """A size expression at every admitted length, for each batch size."""
        if isinstance(expr, (bool, int, float)):
            return expr
        key = str(expr)
        if key not in self.sizes:
            at = {self.program.length: self.lengths, self.program.batch: self.batches}
            try:
                value = evaluate_at(expr, at, self.lengths.shape)
            except (KeyError, TypeError) as error:
                raise Deny("data_dependent", f"a size depends on data: {error}") from error
            if value.dtype == np.bool_:
                raise Deny("length_as_value", f"a truth value computed from the length: {expr}")
            self.sizes[key] = tidy(value) if np.issubdtype(value.dtype, np.integer) else _number(value)
        return self.sizes[key]

    def follows_batch(self, expr: Any) -> bool:
        """Whether a size expression is computed from the batch size, whatever its value."""
        return self.program.batch in getattr(expr, "free_symbols", ())

    def fact(self, node: fx.Node) -> Fact | list[Fact]:
        """The fact of an argument; a missing one is not this node's fault."""
        if node not in self.results:
            raise _Missing
        return self.results[node]

    @cached_property
    def entry_sizes(self) -> Sizes:
        """How large values can become, as numbers."""
        return Sizes(self)

    def is_data(self, node: fx.Node) -> bool:
        """Whether a node's data comes from the sequence."""
        return node in self.data

    def table(self, node: fx.Node) -> Tensor | None:
        """An input-independent node's value at the longest length, or ``None`` where it is too large."""
        if node not in self.tables:
            self.tables[node] = self._table(node)
        return self.tables[node]

    def _table(self, node: fx.Node) -> Tensor | None:
        if node in self.data or self.empty:
            return None
        length = int(self.lengths[0, -1])
        cone = [node]
        for n in cone:
            cone.extend(a for a in n.all_input_nodes if a not in cone)
        at = {self.program.length: np.array([[length]]), self.program.batch: np.array([[3]])}
        for n in cone:
            if is_tensor(n):
                elements = 1
                for d in n.meta["val"].shape:
                    elements *= int(evaluate_at(as_expr(d), at, (1, 1))[0, 0])
                if elements > _LARGEST_TABLE and n.op != "placeholder":
                    return None
        example = self.program.example
        batch = self.program.batch if isinstance(self.program.batch, int) else 3
        dummy = torch.zeros((batch, length, *example.shape[2:]), dtype=example.dtype, device=example.device)
        self.read_values |= {n.name for n in cone if n.op == "placeholder" and n is not self.program.sequence}
        with torch.no_grad():
            return self.program.evaluate(dummy, keep=[node])[node]

    # -- the walk

    def visit(self, node: fx.Node) -> None:
        """Certify one node, or record why not."""
        if node.op == "output" or is_integer(node) or self.empty:
            return
        value = node.meta.get("val")
        if not isinstance(value, (Tensor, list, tuple)):
            return
        call: Call | None = None
        if any(a in self.data for a in data_sources(node)):
            self.data.add(node)
        try:
            if node.op == "placeholder":
                result: Fact | list[Fact] = self._placeholder(node)
            elif node in self.bounded:
                result = self._bounded(node)
            elif _picks(node):
                picked = self.fact(node.args[0])  # type: ignore[arg-type]
                assert isinstance(picked, list)
                result = picked[node.args[1]]  # type: ignore[index]
                source = self.proof.calls.get(node.args[0])  # type: ignore[arg-type]
                call = Call(node, self)
                if source is not None:
                    call.row_local = source.row_local
                    whole = frozenset([node.args[0]])
                    call.linear, call.invariant = [whole], [whole]  # type: ignore[list-item]
            else:
                call = Call(node, self)
                result = self._apply(call)
            result = self._checked(node, result, call)
        except _Missing:
            return
        except Deny as denied:
            self.proof.denied[node] = denied
            return
        except Exception as error:  # a rule met what it was not written for: nothing is certified
            self.proof.denied[node] = Deny("internal", f"the rule for {node.name} failed: {error!r}")
            return
        self.results[node] = result
        if call is not None:
            self.proof.calls[node] = call
        if isinstance(result, Fact):
            self.proof.facts[node] = result
        if call is not None and node.op == "call_function" and not _picks(node):
            self._record(node, call, result)

    def _placeholder(self, node: fx.Node) -> Fact:
        shape = [tidy(self.evaluate(as_expr(d))) for d in node.meta["val"].shape]
        if node is self.program.sequence:
            axes = [fixed(shape[0], batch=True), sequence(shape[1]), *(fixed(d) for d in shape[2:])]
        else:
            axes = [fixed(d) if constant(d) else sequence(d) for d in shape]
        if any(not constant(d) for i, d in enumerate(shape) if node is not self.program.sequence or i != 1):
            raise Deny("length_as_value", "an input whose size follows the length")
        value = None if node is self.program.sequence else self.program.values.get(node.name)
        kinds = {spec.name: spec.kind for spec in self.program.inputs}
        fill = None
        if (
            value is not None
            and value.numel() == 1
            and kinds[node.name] is Kind.CONSTANT
            and not value.is_complex()
        ):
            fill = value.item()
            self.read_values.add(node.name)
        level = ORDINARY
        if node is not self.program.sequence and kinds[node.name] is not Kind.PARAMETER:
            level = of_table(self.program.values.get(node.name))
            self.read_values.add(node.name)
        return Fact(tuple((a,) for a in axes), fill=fill, magnitude=level)

    def _bounded(self, node: fx.Node) -> Fact:
        """A table that was evaluated at every length: each dimension of size s holds positions."""
        behind, axes = [node], []
        for n in behind:
            behind.extend(a for a in n.all_input_nodes if a not in behind)
        self.read_values |= {n.name for n in behind if n.op == "placeholder"} - {self.program.sequence.name}
        for size in node.meta["val"].shape:
            extent = tidy(self.evaluate(as_expr(size)))
            axes.append((sequence(extent) if same(extent, self.length) else fixed(extent),))
        condition = f"all lengths evaluated, spread {self.bounded[node]:.1e} of the norm"
        self.proof.steps.append(Step("numerically bounded", node.name, condition))
        return Fact(tuple(axes))

    def _apply(self, call: Call) -> Fact | list[Fact]:
        node = call.node
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and operator_name(node.target) not in RULES:
            raise Deny("random", f"{call.name} draws random numbers", "call model.eval()")
        rule = RULES.get(call.name)
        facts = []
        for argument in data_sources(node):
            fact = self.fact(argument)
            facts.extend(fact if isinstance(fact, list) else [fact])
        still = all(f.fixed or (f.newest and not f.scaled and not f.junk) for f in facts)
        newest = any(f.newest for f in facts)
        if newest and not still:
            raise Deny("unproved", "combines the newest row with whole sequences")
        try:
            if rule is None:
                raise Deny(
                    "unknown_operator",
                    f"no rule for the operator {node.target}",
                    "spell it with operators that have one, or register a mixer",
                )
            if not rule.scales and any(f.scaled for f in facts):
                raise Deny(
                    "length_as_value",
                    f"{call.name} of a value that carries a factor of the length (such as 1/n) not cancelled",
                    "values may not follow the sequence length: cancel the factor or use a constant",
                )
            if not rule.junk and any(f.junk for f in facts):
                raise Deny("unproved", f"{call.name} uses entries that are certified only below a diagonal")
            result = rule.apply(call)
            self._all_read(call)
        except Deny as denied:
            if denied.kind == "batch_as_value" or not still or not self._still(call, rule is None):
                raise denied from None
            call.linear, call.invariant, call.affine_groups = [], [], []
            result = self._unchanging(node)
        if newest:
            many = result if isinstance(result, list) else [result]
            if not all(f.fixed for f in many):
                raise Deny("unproved", "repeats the newest row along the sequence")
            many = [replace(f, newest=True) for f in many]
            result = many if isinstance(result, list) else many[0]
        return result

    def _all_read(self, call: Call) -> None:
        for n in call.node.all_input_nodes:
            if is_integer(n) and n not in call.read:
                call.no_batch(n)
            if is_integer(n) and n not in call.read and not constant(self.evaluate(as_expr(n))):
                raise Deny(
                    "length_as_value",
                    f"{call.name} reads the sequence length as a value",
                    "values may not follow the sequence length",
                )

    def _still(self, call: Call, unknown: bool) -> bool:
        """Any deterministic operator of values constant in s, with no length among its arguments."""
        if not isinstance(call.node.target, torch._ops.OpOverload):
            return False
        if torch.Tag.nondeterministic_seeded in call.node.target.tags:
            return False
        if call.node.target.namespace != "aten" and unknown and call.node in self.data:
            return False
        numbers = [as_expr(n) for n in call.node.all_input_nodes if is_integer(n)]
        facts = [self.results[a] for a in data_sources(call.node)]
        axes = [a for f in facts for g in (f if isinstance(f, list) else [f]) for a in g.axes]
        if any(map(self.follows_batch, numbers)) or any(by_batch(a.size) and not a.batch for a in axes):
            return False
        return all(constant(self.evaluate(n)) for n in numbers)

    def _unchanging(self, node: fx.Node) -> Fact | list[Fact]:
        value = node.meta["val"]

        def one(tensor: Tensor) -> Fact:
            return Fact(tuple((fixed(tidy(self.evaluate(as_expr(d)))),) for d in tensor.shape))

        return [one(v) for v in value] if isinstance(value, (list, tuple)) else one(value)

    def _checked(self, node: fx.Node, result: Fact | list[Fact], call: Call | None) -> Fact | list[Fact]:
        """The result, if its axes have the traced sizes, with the batch fact and what values decide."""
        value = node.meta["val"]
        if isinstance(result, list):
            return [
                self._sized(node, v, f, call)
                for v, f in zip(value, result, strict=True)
                if isinstance(v, Tensor)
            ]
        if result.view is None:
            result = replace(result, view=View(node, tuple(range(len(result.dims)))))
        return self._with_values(node, self._sized(node, value, result, call))

    def _sized(self, node: fx.Node, value: Tensor, fact: Fact, call: Call | None) -> Fact:
        if len(fact.dims) != value.dim():
            raise Deny(
                "internal", f"the rule for {node.name} gives {len(fact.dims)} dimensions, not {value.dim()}"
            )
        for dim, size in zip(fact.dims, value.shape, strict=True):
            product: Quantity = 1
            for axis in dim:
                product = tidy(np.multiply(product, axis.size))
            traced = tidy(self.evaluate(as_expr(size)))
            if not same(product, traced):
                if _ends(product) and _ends(traced) and _longest(product) == _longest(traced):
                    raise Deny(
                        "moving",
                        f"{node.name} holds {_longest(traced)} positions that move on, and fewer in short sequences",
                        "return all positions, or up to the last 32",
                    )
                raise Deny("internal", f"the rule for {node.name} gives another size than the trace")
        fact = self._held(node, value, fact, call)
        if node not in self.data:
            return replace(fact, rows=True)
        sources = [self.results[a] for a in data_sources(node) if a in self.data and a in self.results]
        flat = [f for s in sources for f in (s if isinstance(s, list) else [s])]
        single = sum(a.batch for a in fact.axes) == 1 and not (call is not None and call.mixes_rows)
        return replace(fact, rows=single and all(f.rows for f in flat))

    def _held(self, node: fx.Node, value: Tensor, fact: Fact, call: Call | None) -> Fact:
        """What is known of the values, as far as the tensor's type holds them."""
        sizes = [_extent(dim) for dim in fact.dims]
        form, bounds, fill = fact.affine, fact.bounds, fact.fill
        if form is not None and not exact(form, sizes, value.dtype):
            form = None
        if bounds is not None and not value.is_floating_point() and not holds(*bounds, value.dtype):
            bounds = None
        level = fact.magnitude
        if node in self.bounded:
            level = of_table(self.table(node))
        elif call is not None:
            sources = [self.results[a] for a in data_sources(node)]
            level = magnitude(
                call, [f.magnitude for s in sources for f in (s if isinstance(s, list) else [s])]
            )
        if is_number(fill):
            fill = in_dtype(fill, value.dtype)
            level = max(level, of_table(torch.tensor(float(fill))) if is_number(fill) else EXTREME)
        triangles = []
        for t in (
            fact.triangles
        ):  # of one row only its first entry is on the diagonal; of one key nothing is above
            if same(sizes[t.key], 1):
                continue
            triangles.append(replace(t, diagonal=None) if same(sizes[t.query], 1) else t)
        return replace(
            fact, affine=form, bounds=bounds, fill=fill, magnitude=level, triangles=tuple(triangles)
        )

    def _with_values(self, node: fx.Node, fact: Fact) -> Fact:
        """Input-independent tables that meet data are decided by value, at the longest length."""
        meets_data = any(u in self.program.input_dependent for u in node.users)
        if node in self.data or not meets_data or fact.fill is not None:
            return fact
        moving = [d for d, dim in enumerate(fact.dims) if not all(a.fixed for a in dim)]
        if len(moving) < 2 or not fact.proved(self.length):
            return fact
        every = {(t.query, t.key): t for t in fact.triangles}
        known = {place: t for place, t in every.items() if t.above is not None}
        # Whether a diagonal is in sight may depend on more than what rules follow.
        vague = [
            p
            for p, t in known.items()
            if is_number(t.above)
            and (t.diagonal is None or (t.diagonal is OPEN and isinstance(t.above, bool)))
        ]
        table = self.table(node) if vague or not known else None
        if table is None or table.is_complex():
            return fact
        found = {(q, k): t for q, k in itertools.permutations(moving, 2) for t in decided(table, q, k)}
        found = {
            p: t for p, t in found.items() if p not in known or (p in vague and t.above == known[p].above)
        }
        if found:
            self.proof.steps.append(Step("by value", node.name, "decided at the longest length"))
        return replace(fact, triangles=tuple({**every, **found}.values()))

    def _record(self, node: fx.Node, call: Call, result: Fact | list[Fact]) -> None:
        facts = result if isinstance(result, list) else [result]
        if all(f.fixed for f in facts) and not call.conditions:
            return
        condition = "; ".join(call.conditions) or "; ".join(dict.fromkeys(_describe(f) for f in facts))
        self.proof.steps.append(Step(call.name, node.name, condition))

    # -- the outcome

    def finish(self) -> Proof:
        """The proof, with the first causes of what is missing."""
        proof = self.proof
        proof.values_read = frozenset(self.read_values)
        outputs = [o for o in self.program.outputs if is_tensor(o)]
        if self.empty:
            proof.refusals.append(Refusal("lengths", f"the program admits no length up to {proof.capacity}"))
        missing = [o for o in outputs if not proof.proved(o) and not proof.newest(o)]
        causes: dict[fx.Node, Deny] = {}
        for output in missing if not self.empty else []:
            causes.update(self._causes(output))
        order = {n: i for i, n in enumerate(self.program.graph.nodes)}
        for node in sorted(causes, key=order.__getitem__):
            denied = causes[node]
            proof.refusals.append(
                Refusal(denied.kind, denied.reason, (node.name,), source_of(node), denied.hint)
            )
        proof.rows_independent = bool(outputs) and all(
            o not in self.data or (o in proof.facts and proof.facts[o].rows) for o in outputs
        )
        return proof

    def _causes(self, output: fx.Node) -> Iterator[tuple[fx.Node, Deny]]:
        todo, seen = [output], {output}
        while todo:
            node = todo.pop()
            if node in self.proof.denied:
                yield node, self.proof.denied[node]
            elif node in self.results:
                if node is output:
                    fact = self.results[node]
                    assert isinstance(fact, Fact)
                    yield node, _not_certified(fact)
            else:
                arguments = [a for a in node.all_input_nodes if not is_integer(a)]
                if all(a in self.results for a in arguments):
                    yield node, Deny("unproved", f"nothing is certified of {node.name!r}, a table")
                todo += [a for a in arguments if a not in seen]
                seen.update(arguments)


def _extent(dim: Dim) -> Quantity:
    total: Quantity = 1
    for axis in dim:
        total = tidy(np.multiply(total, axis.size))
    return total


class _Missing(Exception):
    """An argument has no fact: the cause lies before this node."""


def _number(value: np.ndarray) -> Any:
    """A real quantity: a float where it does not follow the length."""
    first = value.flat[0]
    return float(first) if bool((value == first).all()) else value


def _not_certified(fact: Fact) -> Deny:
    """Why an output that has a fact is no certified one."""
    held = [_longest(a.size) for a in fact.axes if not a.fixed and _ends(a.size)]
    if held and all(a.fixed or a.prefix for a in fact.axes):
        return Deny(
            "unproved",
            f"the output holds the first {held[0]} positions, and fewer in short sequences",
            "return all positions, and cut what is returned",
        )
    if held:
        return Deny(
            "moving",
            f"the output holds {held[0]} positions that move on when the sequence grows",
            "return all positions, or up to the last 32",
        )
    reason = _describe(fact, True)
    hint = "return all positions, and cut or shift what is returned" if reason == _OTHER_SIZE else None
    return Deny("unproved", f"the output is not certified: {reason}", hint)


_OTHER_SIZE = "a size follows the length in another way than the sequence does"


def _ends(size: Quantity) -> bool:
    """Whether a size is one number at the longest quarter of lengths."""
    values = np.atleast_2d(np.asarray(size))
    return bool((values[:, values.shape[1] * 3 // 4 :] == values[-1, -1]).all())


def _longest(size: Quantity) -> Any:
    return np.asarray(size).reshape(-1)[-1]


def _picks(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node.target) == "getitem"


def _describe(fact: Fact, missing: bool = False) -> str:
    words = [str(a) for a in fact.axes if not a.fixed]
    if missing:
        words = [w for w in words if w != "certified"]
        if fact.scaled:
            words.append("a factor that follows the length is left")
        if fact.junk:
            words.append("entries above a diagonal are not certified")
        if any(len(dim) > 1 for dim in fact.dims):
            words.append("positions are merged with another dimension")
    if fact.newest:
        words.append("the newest row")
    return ", ".join(dict.fromkeys(words)) or _OTHER_SIZE
