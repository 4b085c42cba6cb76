"""Increments that users register for operators of their own.

An operator the compiler cannot look into comes with what autodiff would call its derivative: the state of no positions,
and how one more row of its inputs gives one more row of its result and the next state. The prover takes the declaration
for causality; that the step is the operator is compared at every position of random sequences, whenever the weights or
the capacity change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fi_compile.errors import InputError, Refusal, Unsupported
from fi_compile.facts import Axis, Deny, Fact, fixed, least
from fi_compile.passes.propose_consistency import Consistency, agrees
from fi_compile.program import Program, is_integer, is_tensor, operator_name, source_of
from fi_compile.proof import Proof
from fi_compile.rules.call import RULES, Call, Rule, one
from fi_compile.twin import widen, widen_call
from fi_compile.units import Unit

from .convolution import layout_of, parameters_behind
from .layout import STATE_TYPE, Layout

_ROWS = 16
_COMPARED = 200  # positions
_TOLERANCE = 1e-9

Initial = Callable[..., Tensor]
Step = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Registration:
    """What is known of one operator; see :func:`register_mixer`."""

    operator: str
    initial: Initial
    step: Step
    axis: int
    kind: str


REGISTERED: dict[str, Registration] = {}


def register_mixer(
    operator: str, *, initial: Initial, step: Step, axis: int = 1, kind: str = "registered"
) -> None:
    """Register how an operator of your own computes one more position.

    ``operator``: its qualified name, ``"library::name"``, of an operator made with ``torch.library`` that takes
    tensors and numbers and returns one tensor. ``axis``: the sequence axis of the result, and of each argument that
    has one; such arguments and the result have the batch at dimension 0 and are floating. Arguments are passed on in
    their order:

    - ``initial(*arguments) -> state``: the state [B, …] before any position; rows [B, …], without the sequence axis,
      stand for sequences: their shapes, dtype and device count, not their values.
    - ``step(state, *arguments) -> (row, state)``: the result's newest row, without the sequence axis, and the state
      after it. Traceable, out of place, of static shapes.

    By registering you declare that each row of the result depends on that row and earlier ones alone, whatever the
    length, and that rows of the batch do not meet. The step is compared with the operator on random input; one that
    disagrees is refused. ``kind`` names the mixer in reports. Raises :class:`InputError` for an operator that has a
    rule already.
    """
    if "::" not in operator:
        raise InputError(f"operator {operator!r}: expected a qualified name such as 'library::name'")
    if operator in RULES and operator not in REGISTERED:
        raise InputError(f"operator {operator!r} has a rule of its own")
    REGISTERED[operator] = Registration(operator, initial, step, axis, kind)
    RULES[operator] = Rule(_certified)


def _certified(call: Call) -> Fact:
    """What a registration declares: sequences of positions in, such a sequence out, rows of the batch apart."""
    axis, out = REGISTERED[call.name].axis, call.node.meta["val"]
    if not isinstance(out, Tensor):
        raise Deny(
            "unproved", f"{call.name} returns more than one tensor", "register operators of one result"
        )
    rows: tuple[Axis, Axis] | None = None
    for node in call.tensors():
        fact = call.fact(node)
        moving = [d for d, dim in enumerate(fact.dims) if not all(a.fixed for a in dim)]
        if not moving:
            if call.context.is_data(node):
                raise Deny("unproved", f"{call.name} of data without a sequence axis")
            continue
        along = one(fact.dims[axis])
        if moving != [axis] or not along.plain:
            raise Deny("misaligned", f"{call.name} of a sequence that does not run along dimension {axis}")
        valid = along.valid if rows is None else least(along.valid, rows[1].valid)
        rows = one(fact.dims[0]), replace(along, valid=valid)
    if rows is None:
        raise Deny("unproved", f"{call.name} of no sequence")
    call.conditions.append("declared causal by its registration, compared on random input")
    dims = [(fixed(size),) for size in call.out]
    dims[0], dims[axis] = (rows[0],), (rows[1],)
    return Fact(tuple(dims))


@dataclass(frozen=True)
class Registered:
    """A unit that is one registered operator: ``inputs`` are its sequences, ``others`` its other tensors."""

    program: Program = field(repr=False)
    unit: Unit = field(repr=False)
    registration: Registration
    inputs: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]
    layouts: tuple[Layout, ...]
    layout_out: Layout
    depends_on: tuple[str, ...]

    lowering = "registered"
    verdict = "declared causal; equals its registered step on random input"
    support = None
    source = None
    reference = None

    @property
    def name(self) -> str:
        """The name of the node whose value this makes."""
        return self.unit.exit.name

    @property
    def kind(self) -> str:
        """As it was registered."""
        return self.registration.kind

    def flatten(self, values: Sequence[Tensor]) -> Tensor:
        """Whole values of the inputs, side by side: [B, C, n]."""
        flat = [layout.flatten(v) for layout, v in zip(self.layouts, values, strict=True)]
        dtype = flat[0].dtype
        for f in flat[1:]:
            dtype = torch.promote_types(dtype, f.dtype)
        return torch.cat([f.to(dtype) for f in flat], 1)

    def derive(self, values: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
        """The other tensors, in double precision, by name."""
        example = self.program.example
        batch = self.program.batch if isinstance(self.program.batch, int) else 1
        shape = (batch, self.program.lengths.at_least(2) or 2, *example.shape[2:])
        sequence = example.new_zeros((1,) * len(shape), dtype=widen(example.dtype)).expand(shape)
        with torch.no_grad():
            found = self.program.evaluate(sequence, values, keep=self.others, rewrite=widen_call)
        return {node.name: found[node] for node in self.others}

    def arguments(
        self, rows: Sequence[Tensor], others: Mapping[str, Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The operator's arguments with ``rows`` for its sequences."""
        given = {**dict(zip(self.inputs, rows, strict=True)), **{n: others[n.name] for n in self.others}}
        return fx.map_arg((self.unit.exit.args, self.unit.exit.kwargs), given.__getitem__)

    def rows(self, x: Tensor, double: bool) -> list[Tensor]:
        """The newest rows [B, …] of the inputs, without their sequence axis, from x [B, C]."""
        found = []
        parts = x.split([layout.count for layout in self.layouts], 1)
        for node, layout, part in zip(self.inputs, self.layouts, parts, strict=True):
            own = node.meta["val"].dtype
            value = layout.as_value(part.unsqueeze(-1), widen(own) if double else own)
            found.append(value.squeeze(self.registration.axis))
        return found

    def holds(self, proof: Proof, values: Mapping[str, Tensor], capacity: int) -> bool:
        """Whether the registered step is the operator, at every position of random sequences."""
        generator = torch.Generator().manual_seed(41)
        n, others = min(capacity, _COMPARED), self.derive(values, capacity)
        given = []
        for layout in self.layouts:
            batch = 1 if layout.batch is None else 2
            flat = torch.randn(batch, layout.count, n, dtype=torch.float64, generator=generator)
            given.append(layout.unflatten(flat.to(self.program.example.device)))
        args, kwargs = self.arguments(given, others)
        target: Any = self.unit.exit.target
        flat, step, found = self.flatten(given), RegisteredStep(self), []
        weights = step.weights(others, None, torch.float64)
        with torch.no_grad():
            whole = self.layout_out.flatten(target(*args, **kwargs))
            ring = step.ring(flat.shape[0], weights)
            for t in range(n):
                position = torch.tensor([t], device=flat.device)
                found.append(step.step(ring, position, flat[..., t], weights))
        return agrees(torch.stack(found, -1), whole, _TOLERANCE)


def recognise_registered(analysis: Consistency, unit: Unit) -> Registered | None:
    """The registered operator a unit is, or None."""
    node, program = unit.exit, analysis.program
    registration = REGISTERED.get(operator_name(node.target))
    if registration is None or any(is_integer(a) for a in node.all_input_nodes):
        return None
    tensors = [a for a in node.all_input_nodes if is_tensor(a)]
    inputs = tuple(a for a in tensors if analysis.axes[a].rows)
    others = tuple(a for a in tensors if a not in inputs)
    layouts = [layout_of(analysis, a) for a in (*inputs, node)]
    known = [layout for layout in layouts if layout is not None]
    if len(known) < len(layouts) or any(a in program.input_dependent for a in others):
        return None
    if any(k.axis != registration.axis or k.batch != known[0].batch for k in known):
        return None
    behind = parameters_behind(program, others)
    return Registered(program, unit, registration, inputs, others, tuple(known[:-1]), known[-1], behind)


def disagreement(found: Registered) -> Unsupported:
    """The refusal of a step that is not its operator."""
    node = found.unit.exit
    return Unsupported(
        Refusal(
            "registered",
            f"the step registered for {found.registration.operator} gives other rows than the operator",
            (node.name,),
            source_of(node),
            "compare both in float64 on a short sequence; the state of no positions comes from `initial`",
        )
    )


@dataclass(frozen=True)
class RegisteredStep:
    """Increment of a registered operator: its states after the newest positions."""

    mixer: Registered

    reads = 1
    rows = _ROWS

    @property
    def needs(self) -> tuple[str, ...]:
        """Its tensors without a sequence axis."""
        return (STATE_TYPE, *(node.name for node in self.mixer.others))

    def weights(
        self, found: Mapping[str, Tensor], source: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """These tensors in their own types; where the state is float64, in double precision."""
        kept = {STATE_TYPE: torch.zeros(0, dtype=dtype, device=self.mixer.program.example.device)}
        for node in self.mixer.others:
            own = node.meta["val"].dtype
            kept[node.name] = found[node.name].to(widen(own) if dtype == torch.float64 else own)
        return kept

    def ring(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """States of no positions: zeros [R, B, …]; the operator's own are taken at position 0."""
        count = sum(layout.count for layout in self.mixer.layouts)
        state = self._initial(weights[STATE_TYPE].new_zeros(batch, count), weights)
        return state.new_zeros(self.rows, batch, state.numel() // batch)

    def step(self, ring: Tensor, position: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The newest output [B, Cout] from x [B, C]; writes the new state into the ring."""
        size, batch = ring.shape[0], ring.shape[1]
        initial = self._initial(x, weights)
        before = ring.index_select(0, (position - 1) % size)[0].reshape(initial.shape)
        state = torch.where(position == 0, initial, before)
        args, kwargs = self._arguments(x, weights)
        row, state = self.mixer.registration.step(state, *args, **kwargs)
        ring.index_copy_(0, position % size, state.reshape(1, batch, -1).to(ring.dtype))
        return self.mixer.layout_out.flatten(row.unsqueeze(self.mixer.registration.axis))[..., 0]

    def fill(self, ring: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take over the states after x [B, C, P], step by step."""
        ring.zero_()
        for t in range(x.shape[-1]):
            self.step(ring, torch.tensor([t], device=ring.device), x[:, :, t], weights)

    def cost(self, weights: Mapping[str, Tensor]) -> str:
        """Work of one step."""
        return "one registered step"

    def _initial(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = self._arguments(x, weights)
        return self.mixer.registration.initial(*args, **kwargs)

    def _arguments(self, x: Tensor, weights: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = self.mixer.rows(x, double=weights[STATE_TYPE].dtype == torch.float64)
        return self.mixer.arguments(rows, weights)
