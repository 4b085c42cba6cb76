"""The pipeline for one model: trace → analyse → raise → split → schedule → lower, and what it leaves behind."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .compare import disagreements
from .costs import Tiling
from .derive import Derived, derive, tile_step
from .describe import describe
from .dynamo import SequenceModule
from .errors import CapacityError, InputError, Refusal, Unsupported
from .falsify import check_finite, check_step, rows_apart
from .lane import Lane
from .lower import CompiledStep
from .mixers.convolution import LONGEST_WINDOW, Convolution, FilterGrew, verify
from .mixers.increments import Mixer
from .mixers.recurrence import with_modes
from .mixers.stack import state_dtype
from .mixers.tiles import check_precision, choose_kernels
from .options import Options
from .passes.bound_lags import bound_lags
from .passes.bound_tables import bound_tables
from .passes.certify_reads import certify_reads
from .passes.plan_demands import plan_demands
from .passes.propose_consistency import Consistency, explain_inconsistency, propose_consistency
from .passes.prove_prefix import prove_prefix
from .passes.raise_mixers import raise_mixers
from .program import Kind, Lengths, Program, is_tensor, source_of
from .proof import Proof, Step
from .reach import certified_reach, check_limit, exact_up_to, furthest
from .report import Report, Snapshot
from .rewritten import rewritten
from .settle import Settled, is_affine
from .step import StepProgram
from .text import program_text
from .twin import TwinValues
from .units import Plan, Unit
from .weights import WeightWatch

log = logging.getLogger(__name__)

_FIRST_REACH, _REACH_FACTOR = 1024, 4


class Engine:
    """A program analysed and split, with its derived values and compiled steps.

    Shared by every decoder, fork and session that began on one version of the weights; new weights, or a capacity
    the analysis does not cover, give another engine. Raises :class:`Unsupported` where the model cannot be decoded
    exactly, :class:`CapacityError` where ``max_length`` exceeds what its tables hold.
    """

    def __init__(
        self,
        program: Program,
        options: Options,
        model: nn.Module | None = None,
        *,
        capacity: int | None = None,
    ) -> None:
        self.traced, self.options, self.model = program, options, model
        self.program, self._dropped = rewritten(program)
        self.kernels = choose_kernels(options.kernels, program.example.device)
        check_precision(options.precision, self.kernels, self.dtype)
        if not options.keep_history and options.latency == "bounded":
            raise InputError("option keep_history=False needs latency='throughput'")
        self._block: int | None = None  # the base block, once it is chosen
        self._reach: int | None = None  # positions at which the tables end, once that was met
        self._end = "the model's tables end there"
        self._reached = 0
        self.capacity = self._admitted(self._within_tables(capacity or self._first_capacity()))
        self._derived: dict[tuple[int, int], Derived] = {}
        self._raised: dict[int, Program] = {}
        self._steps: dict[Any, CompiledStep] = {}
        self.snapshots: list[Snapshot] = []
        check_finite(program)
        self._analyse()
        check_limit(self.options.max_length, self.program.lengths.maximum, self._reach)

    def _analyse(self) -> None:
        self._timed("trace", lambda: None, program=self.program, rewrites=0)
        self.analysis: Consistency = propose_consistency(self.program)
        self.double_values: TwinValues = self.analysis.parameters.wide
        self.proof: Proof = self._prove(self.capacity)
        self.verdict = "numerically bounded" if self._dropped else "proved"
        if not self._all_certified():
            bounded = bound_tables(self.analysis, self.proof.proved, self.capacity)
            if bounded:
                self.proof = self._prove(self.capacity, bounded)
                self.verdict = "numerically bounded"
            if not self._all_certified():
                self._end_with_certificate(lambda n: self._prove(n, bounded))
        self._check_outputs()
        self.analysis = self.analysis.restricted(self.proof.proved)
        self.settled = Settled(self.proof, self.double_values, self.capacity, self.dtype)
        self._filters = self.settled.filters
        self.plan: Plan = self._timed("analyse", self._plan, program=self.program, rewrites=0)
        tiling = Tiling(4, 2, True) if self.options.latency == "bounded" else Tiling(5)
        check_step(self.analysis, self.plan, tiling)
        derived = self._timed("derive", lambda: self.derived(self.rows), rewrites=0)
        self._timed(
            "raise",
            lambda: self.raised(derived),
            rewrites=sum(m.reference is not None for m in derived.step.mixers),
        )

    def _forget(self) -> None:
        """Let go of what only the analysis needs: as much again as the weights, twice, and tables of positions."""
        self.analysis.forget()
        self.double_values.forget()

    def _end_with_certificate(self, prove: Callable[[int], Proof]) -> None:
        """Stop where the certificate does, if nobody asked for more; else say how far it reaches."""
        reach = certified_reach(self.program, self.capacity, lambda n: self._covers(prove(n)))
        if reach is None or self.options.max_length is not None:
            self.proof.refusals = [exact_up_to(r, reach) for r in self.proof.refusals]
            return
        self._end = f"the certificate ends there: {self.proof.refusals[0].reason}"
        self.proof, self._reach, self.capacity = prove(reach), reach, reach

    def _prove(self, capacity: int, bounded: Mapping[fx.Node, float] | None = None) -> Proof:
        proof = prove_prefix(self.program, capacity, bounded)
        for name, share in self._dropped.items():
            condition = f"read as the spectrum of taps that end, but for {share:.1e} of their norm"
            proof.steps.append(Step("numerically bounded", name, condition))
        return proof

    def _plan(self) -> Plan:
        proof = self.proof
        return plan_demands(
            self.analysis,
            self.settled.convolution,
            lambda node: proof.row_local(node) or proof.newest(node),
            lambda unit: self._certify(unit, self.capacity, self.analysis.parameters),
            self.settled.group,
            self.settled.operator,
            proof.by_entry,
        )

    def _certify(self, unit: Unit, capacity: int, values: Mapping[str, Tensor]) -> bool:
        return certify_reads(self.analysis, unit, capacity, values, partial(is_affine, self.proof))

    def _still_holds(self, capacity: int) -> bool:
        """Whether what was settled by asking the units holds for the present weights up to a capacity."""
        values = self.double_values
        mixers = [unit.mixer for unit in self.plan.units if unit.mixer is not None]
        return all(self._certify(unit, capacity, values) for unit in self.plan.tested) and all(
            self._mixer_holds(mixer, self.proof, capacity) for mixer in mixers
        )

    def _mixer_holds(self, mixer: Mixer, proof: Proof, capacity: int) -> bool:
        """Whether a mixer equals its unit for the present weights up to a capacity."""
        if not isinstance(mixer, Convolution):
            return mixer.holds(proof, self.double_values, capacity)
        if mixer.bound is not None and bound_lags(proof, mixer.unit, mixer.x, LONGEST_WINDOW) != mixer.bound:
            return False
        self._filter(mixer, capacity)  # which raises where it does not
        return True

    def _is_certified(self, node: fx.Node, proof: Proof | None = None) -> bool:
        """Whether a certificate covers an output: as a sequence, as the newest row, or as a constant."""
        moving, proof = bool(self.analysis.axes[node].rows), proof or self.proof
        return proof.newest(node) or (
            proof.proved(node) and (moving or node not in self.program.input_dependent)
        )

    def _covers(self, proof: Proof) -> bool:
        return all(self._is_certified(o, proof) for o in self.program.outputs if is_tensor(o))

    def _all_certified(self) -> bool:
        return self._covers(self.proof)

    def _check_outputs(self) -> None:
        """Accept outputs that are consistent *and* proved; raise :class:`Unsupported` on any other."""
        for node in self.program.outputs:
            if not is_tensor(node):
                continue
            if not self.analysis.agrees_on(node):
                raise Unsupported(*self.proof.beside(explain_inconsistency(self.analysis)))
            if self._is_certified(node):
                continue
            unproved = Refusal(
                "unproved",
                f"{node.name!r} looks causal on random input, but nothing certifies it at every length",
                (node.name,),
                source_of(node),
                "see the certificate's own refusal; if the model is causal, please report it",
            )
            raise Unsupported(*(self.proof.refusals or [unproved]))

    def _timed(
        self, name: str, run: Callable[[], Any], *, rewrites: int, program: Program | None = None
    ) -> Any:
        """Run a pass, time it and keep a snapshot of what it left."""
        start = time.perf_counter()
        result = run()
        spent = 1e3 * (time.perf_counter() - start)
        program = result if isinstance(result, Program) else program
        log.info("%s: %d rewrites, %.1f ms", name, rewrites, spent)
        if program is not None:
            text = program_text(program)
            self.snapshots.append(Snapshot(name, spent, rewrites, text, program.run, program.graph))
        return result

    # -- facts ---------------------------------------------------------------------------------------------

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of state: float64 where the model computes anything of its sequence in it, else float32."""
        dtypes = {v.dtype for v in (*self.program.values.values(), self.program.example)}
        dtypes |= {n.meta["val"].dtype for n in self.program.input_dependent if is_tensor(n)}
        double = not dtypes.isdisjoint({torch.float64, torch.complex128})
        return state_dtype(torch.float64 if double else torch.float32)

    @property
    def rows(self) -> int:
        """How many rows are decoded where nobody says: one, or the batch that the trace pins."""
        return self.program.batch if isinstance(self.program.batch, int) else 1

    @property
    def reads_ids(self) -> bool:
        """Whether the sequence is of integers that index a table."""
        return not self.program.example.dtype.is_floating_point

    @property
    def most(self) -> int | None:
        """The most positions a sequence may have, or None."""
        limits = (self.options.max_length, self.program.lengths.maximum, self._reach)
        return min((n for n in limits if n is not None), default=None)

    def _within_tables(self, capacity: int) -> int:
        """The capacity, or the end of the model's tables before it: what follows the length alone is evaluated."""
        if capacity <= self._reached or self._reach is not None:
            return capacity if self._reach is None else min(capacity, self._reach)
        if not self.program.has_tables_for(capacity):
            end = furthest(self.program.has_tables_for, self.program.lengths.minimum, capacity)
            if end is not None:  # else it is not the tables' length that is at fault
                self._reach = capacity = end
        self._reached = capacity
        return capacity

    @cached_property
    def rows_independent(self) -> bool:
        """Whether each row of every output depends on the same row of the sequence only."""
        apart = self.proof.rows_independent and rows_apart(self.analysis, self.plan)
        self._forget()
        return apart

    @property
    def is_native(self) -> bool:
        """Whether what is compiled, and the extension, may be used."""
        return self.options.step != "eager"

    def watch(self, model: nn.Module | None) -> WeightWatch:
        """A watch over the weights of a model that this engine was made for, as they are now."""
        # Dynamo passes other weights as other arguments: what stands for the graph then is another module.
        return WeightWatch(
            self.program, model, native=self.is_native, sealed=isinstance(model, SequenceModule)
        )

    @cached_property
    def bare_output(self) -> bool:
        """Whether the model returns one tensor, in no structure."""
        return self.program.out_spec.is_leaf()

    def runs_at(self, length: int) -> bool:
        """Whether the graph itself may run at this length."""
        return self.program.lengths.admits(length)

    # -- capacity ------------------------------------------------------------------------------------------

    def _first_capacity(self) -> int:
        wanted, most = self.options.max_length, self.program.lengths.maximum
        limits = [n for n in (wanted or self.options.capacity, most) if n is not None]
        return min(limits)

    def capacity_for(self, needed: int, *, grow: bool = False) -> int:
        """The capacity, doubled from the first one, that holds ``needed`` positions.

        Raises :class:`CapacityError` beyond the most positions there may be, or where growth is switched off.
        """
        capacity = self.capacity
        if self.most is not None and needed > self.most:
            if grow or needed > self.most + 1:
                hint = "; give max_length to trace the model for longer ones"
                if self.options.max_length or self._reach is not None:
                    hint = "" if self.most != self._reach else f": {self._end}"
                raise CapacityError(f"{needed} positions exceed {self.most}, the most there may be{hint}")
            needed = self.most
        if grow and needed > capacity and not self.options.growth:
            raise CapacityError(f"the capacity of {capacity} positions is used up and growth is off")
        while capacity < needed:
            capacity *= 2
        capacity = self._within_tables(capacity)
        if capacity < needed:
            return self.capacity_for(needed, grow=grow)  # refused, now that the end of the tables is known
        return self._admitted(capacity if self.most is None else min(capacity, self.most))

    def _admitted(self, capacity: int) -> int:
        """The least length ≥ ``capacity`` the graph may run at, which filters and tables are evaluated at."""
        found = self.program.lengths.at_least(capacity)
        if found is None:
            raise CapacityError(f"the model's guards admit no length of {capacity} or more")
        return found

    # -- what depends on the weights -----------------------------------------------------------------------

    def derived(self, batch: int, capacity: int | None = None) -> Derived:
        """Filters and tables for a capacity, derived once per weight version."""
        capacity = capacity or self.capacity
        key = (batch if self.tables_have_batch else 0, capacity)
        if key not in self._derived:
            self._prove_up_to(capacity)
            step = StepProgram(self.program, self.plan, capacity, kernels=self.kernels)
            tiling = tile_step(
                step, self.options, device=self.program.example.device, dtype=self.dtype, block=self._block
            )
            self._block = tiling.block  # compiled steps know it
            self._derived[key] = derive(
                step,
                dict(self.program.values),
                {mixer.name: self._filter(mixer, capacity) for mixer in step.mixers},
                dtype=self.dtype,
                tiling=tiling,
                batch=batch,
                kernels=self.kernels,
                precision=self.options.precision,
                keep_history=self.options.keep_history,
            )
            self._keep_one_copy(self._derived[key])
            self._forget()
        return self._derived[key]

    def _keep_one_copy(self, derived: Derived) -> None:
        """Long filters are many bytes: let go of those that the bank has."""
        for mixer in derived.step.stacked:
            key, kernel = (mixer.name, derived.capacity), derived.references[mixer.name]["kernel"]
            if kernel.shape == self._filters[key].kernel.shape:
                self._filters[key] = replace(self._filters[key], kernel=kernel)

    def _filter(self, mixer: Mixer, capacity: int) -> Any:
        key = (mixer.name, capacity)
        if key not in self._filters:
            derived: Any = mixer.derive(self.double_values, capacity)
            if isinstance(mixer, Convolution):
                if not verify(mixer, self.double_values, capacity, derived):
                    raise FilterGrew(mixer.name)
                if mixer.lowering == "recurrence":
                    base = self._filters.get((mixer.name, self.capacity))
                    derived = with_modes(mixer, derived, None if base is None else base.modes)
                derived = derived.rounded(self.dtype)
            self._filters[key] = derived
        return self._filters[key]

    def _prove_up_to(self, capacity: int) -> None:
        """See that the certificate, and what was read off filters, hold at a larger capacity too."""
        if capacity <= self.proof.capacity:
            return
        bounded = None
        if self.verdict != "proved":
            bounded = bound_tables(self.analysis, prove_prefix(self.program, capacity).proved, capacity)
        proof = self._prove(capacity, bounded)
        if not all(self._certify(unit, capacity, self.double_values) for unit in self.plan.tested):
            raise FilterGrew(self.plan.tested[0].exit.name)
        for node in self.analysis.consistent:
            if not proof.proved(node):
                raise CapacityError(
                    f"{node.name!r} is certified up to {self.proof.capacity} positions but not up to {capacity}"
                )
        for unit in self.plan.units:
            if unit.mixer is not None and not self._mixer_holds(unit.mixer, proof, capacity):
                raise FilterGrew(unit.mixer.name)
        self.proof = proof

    @cached_property
    def tables_have_batch(self) -> bool:
        """Whether some table has one row per batch row."""
        return any(self.plan.batch_axes[node] for node in self.plan.tables)

    def renewed(self, values: Mapping[str, Tensor], changed: Collection[str]) -> Engine:
        """The engine for changed weights: derived again, analysed again where what was proved may have changed.

        ``changed`` names the program inputs whose contents are new.
        """
        kinds = {i.name: i.kind for i in self.program.inputs}
        traced = self._below_range(self.traced.with_values(values))
        program = replace(self.program.with_values(values), lengths=self._narrowed(traced.lengths))
        check_finite(program)
        if not any(kinds[n] is not Kind.PARAMETER or n in self.proof.values_read for n in changed):
            twin = copy.copy(self)
            twin.traced, twin.program = traced, program
            twin._derived, twin._raised, twin._filters = {}, {}, {}
            twin.double_values = TwinValues(program)
            twin.__dict__.pop("report", None)
            try:
                raised = twin.raised(twin.derived(twin.rows))
                holds = twin._still_holds(self.capacity)
                twin._forget()
                if holds:
                    now = {s.name: raised if s.name == "raise" else program for s in self.snapshots}
                    twin.snapshots = [replace(s, run=now[s.name].run) for s in self.snapshots]
                    return twin
            except FilterGrew:
                pass
        return Engine(traced, self.options, self.model, capacity=self.capacity)

    def _below_range(self, program: Program) -> Program:
        """The program for new weights, with the positions below which the model differs from it."""
        lengths = program.lengths
        if self.model is None or lengths.are_all:
            return program
        odd = disagreements(program, self.model)
        return replace(program, lengths=replace(lengths, fewest=max([*odd, lengths.fewest - 1]) + 1))

    def _narrowed(self, lengths: Lengths) -> Lengths:
        """The lengths of a trace, without those that rewriting it left out."""
        own, fewest = self.program.lengths, lengths.fewest
        if own.fewest > self.traced.lengths.fewest:
            fewest = max(fewest, own.fewest)
        return replace(lengths, maximum=own.maximum, fewest=fewest)

    def enlarged(self, capacity: int) -> Engine:
        """The engine for a capacity at which a filter leaves the class it was found in."""
        return Engine(self.traced, self.options, self.model, capacity=capacity)

    def raised(self, derived: Derived) -> Program:
        """The program with semantic nodes, its filters cut from the derived ones."""
        if id(derived) not in self._raised:
            self._raised[id(derived)] = raise_mixers(self.program, self.plan, derived.references)
        return self._raised[id(derived)]

    # -- running -------------------------------------------------------------------------------------------

    def step(self, lane: Lane) -> Callable[[], Sequence[Any]]:
        """The compiled step on a lane's tensors, its outputs without their sequence axis.

        Lanes of equal shapes and strides share the compilation.
        """
        if lane.run is None or lane.position >= lane.reach:
            lane.reach = self._rows_read(lane)
            key = (lane.signature, lane.reach)
            if key not in self._steps:
                step = lane.derived.step
                if lane.reach < step.capacity:
                    step = replace(step, reach=lane.reach)
                self._steps[key] = CompiledStep(step, lane.tensors, self.options.step, lane.derived.block)
            lane.run = self._steps[key].on(lane.tensors)
        return lane.run

    def _rows_read(self, lane: Lane) -> int:
        """How many rows of histories the next steps read: a few sizes, so that few steps are compiled."""
        capacity = lane.derived.step.capacity
        if not self.plan.histories:
            return capacity
        reach = _FIRST_REACH
        while reach <= lane.position:
            reach *= _REACH_FACTOR
        found = self.program.lengths.at_least(reach)
        return capacity if found is None else min(found, capacity)

    def forward(self, sequence: Tensor, derived: Derived) -> tuple[list[Any], dict[str, Tensor]]:
        """One pass over a whole sequence: the flat outputs, and the values a lane is filled with."""
        program = self.raised(derived)
        wanted = {x.name for m in derived.step.mixers for x in m.inputs} | {
            n.name for n in self.plan.histories
        }
        taps = {name: program.nodes[name] for name in wanted}
        outputs = [o for o in program.outputs if isinstance(o, fx.Node)]
        with torch.no_grad():
            found = program.evaluate(sequence, keep=[*taps.values(), *outputs])
        flat = [found[o] if isinstance(o, fx.Node) else o for o in program.outputs]
        return flat, {name: found[node] for name, node in taps.items()}

    # -- report --------------------------------------------------------------------------------------------

    @cached_property
    def report(self) -> Report:
        """What was found and how it runs."""
        return describe(self)

    def step_graph(self) -> CompiledStep:
        """The step graph of one sequence, traced but not compiled."""
        lane = Lane(self.derived(self.rows), self.rows)
        return CompiledStep(lane.derived.step, lane.tensors, "eager")

    def decode(self, sequence: Tensor) -> Any:
        """The outputs on a whole sequence, computed position by position by the step program."""
        lane = Lane(self.derived(sequence.shape[0]), sequence.shape[0])
        run = CompiledStep(lane.derived.step, lane.tensors, "eager").on(lane.tensors)
        steps = [lane.step(sequence[:, t : t + 1], run) for t in range(sequence.shape[1])]
        flat = []
        for place, node in enumerate(self.program.outputs):
            axes = self.plan.axes.get(node, ())
            values = [step[place] for step in steps]
            flat.append(torch.stack(values, axes[0]) if axes else values[-1])
        return pytree.tree_unflatten(flat, self.program.out_spec)
