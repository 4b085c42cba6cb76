"""Doors: a graph on one set of weights, analysed, with the sessions that are decoded through it.

A compiled callable is no model: Dynamo makes several graphs of one model, and one graph serves several
models of a class. So doors hang on the weights themselves, as an attribute: they serve every graph with the
same text, live as long as the weights, and are freed with them.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from .decoder import Decoder, build_engine
from .dynamo import Roles, broken_off, wrap_graph
from .engine import Engine
from .errors import CapacityError, FlashinfError, FlashinfWarning, InputError, Refusal, Unsupported
from .growing import Growing
from .inputs import Description, Fixed, same_bits
from .options import Options
from .report import Report, note_report, refused_text
from .sessions import Match, MemoryLimit, Session, clock, fork_rng, holds, quiet_mode, release, tracing
from .weights import checksum

_MOST_SESSIONS = 8
_MOST_DOORS = 8  # per first weight: graphs, options and swapped weights seen together
_CHEAP_LOSS = 8  # positions a session may lose without being forked first
_PATIENCE = 0.05  # seconds to wait for another thread that is matching
_MISSES = 4

_creating = threading.RLock()


class Door:
    """A graph on one set of weights: the analysis, or the reason there is none, and the sessions.

    The door is held by the weights (:func:`find_door`), and holds them; nothing else does.
    """

    def __init__(
        self,
        doors: Doors,
        key: DoorKey,
        gm: fx.GraphModule,
        roles: Roles,
        arguments: Sequence[Any],
        beside: Sequence[Description],
        options: Options,
    ) -> None:
        self.doors, self.key, self.roles, self.options = doors, key, roles.bound(arguments), options
        self.module = nn.Module()
        self.refusals: tuple[Refusal, ...] = ()
        self._broken = broken_off(gm)
        self.sessions: list[Session] = []
        self.lock = threading.RLock()  # knows its owner, so that an interrupt cannot leave it held
        self._last_length, self._misses = -1, 0
        self._versions: list[int] = []
        self.generation = 0  # of the weights: sessions of an earlier one are stale
        try:
            self.module = module = wrap_graph(gm, self.roles, arguments, beside)
            self._versions = self._weight_versions()
            self._unversioned = [w for w in (*module.parameters(), *module.buffers()) if w.is_inference()]
            with quiet_mode(), tracing(), fork_rng(arguments[roles.sequence].device):
                example = arguments[roles.sequence].nan_to_num(0, 0, 0)  # its values must not matter
                written = module.written(example)
                if written is not None:  # which an answer from a session would leave out
                    raise Unsupported(
                        Refusal(
                            "mutation",
                            f"the forward writes to its argument {written}",
                            hint="write to a copy: argument.clone()",
                        )
                    )
                self.engine: Engine = build_engine(self.module, example, options)
                self.report: Report = self.engine.report
                self._watch = self.engine.watch(self.module)
                self._read_outputs()
        except Exception as error:
            self.refuse(error)

    def holds(self, arguments: Sequence[Any], beside: Sequence[Description]) -> bool:
        """Whether the tensors that were taken as they are, beside the sequence, are those of a call."""
        return all(
            same_bits(getattr(self.module, f"_beside_{i}"), arguments[extra.place])
            for i, (extra, found) in enumerate(zip(self.roles.extras, beside, strict=True))
            if isinstance(found, Fixed) and not self.refusals
        )

    def _read_outputs(self) -> None:
        plan = self.engine.plan
        nodes = self.engine.program.outputs
        self.axes = [next(iter(plan.axes.get(node, ())), None) for node in nodes]
        self.batch_axes = [next(iter(plan.batch_axes.get(node, ())), None) for node in nodes]
        self.needs_newest = None in self.axes

    def refuse(self, error: Exception) -> None:
        """From now on run the graph as given."""
        if isinstance(error, Unsupported):
            self.refusals = error.refusals
        else:
            kind = "inputs" if isinstance(error, FlashinfError) else "internal"
            self.refusals = (Refusal(kind, f"{type(error).__name__}: {error}"[:500]),)
        self.refusals = (*self._broken, *self.refusals)
        self.report = Report("refused", refusals=self.refusals)
        self.sessions.clear()

    @property
    def may_retry(self) -> bool:
        """Whether it was refused for weights that have changed since."""
        return any(r.kind == "weights" for r in self.refusals) and self._versions != self._weight_versions()

    def _weight_versions(self) -> list[int]:
        return [0 if p.is_inference() else p._version for p in self.module.parameters()]

    def unversioned(self) -> list[int]:
        """Checksums of the weights that keep no version: those made under ``torch.inference_mode()``."""
        return [checksum(w) for w in self._unversioned]

    # -- what sessions ask ---------------------------------------------------------------------------------

    def new_decoder(self, batch: int) -> Decoder:
        """An empty decoder for ``batch`` rows with the weights as they are now."""
        changed = self._watch.changed()
        if changed:
            self._watch.remember()
            self.engine = self.engine.renewed(self._watch.current(), changed)
            self.generation += 1
        return Decoder(self.engine, self.module, batch)

    def layouts(self, batch: int) -> list[Any]:
        """Per tensor a function of the length giving its shape and strides."""
        return [partial(form.at, batch) for form in self.roles.tensors]

    def fresh_outputs(self, batch: int, private: bool) -> list[Growing | None]:
        """Empty rows for each output with a sequence axis."""
        return [
            None if axis is None else Growing(axis, layout, private)
            for axis, layout in zip(self.axes, self.layouts(batch), strict=True)
        ]

    def estimate(self, batch: int, length: int) -> int:
        """Bytes a session of this size will hold, about."""
        engine = self.engine
        capacity = engine.capacity_for(length + 1)
        state = self.report.state_bytes * batch * capacity // max(self.report.capacity, 1)
        forms = [f for f, axis in zip(self.roles.tensors, self.axes, strict=True) if axis is not None]
        sequence = engine.program.example[:1, :1].nbytes * batch * capacity
        return state + sequence + sum(f.bytes_at(batch, length) for f in forms)

    # -- calls ---------------------------------------------------------------------------------------------

    def call(self, sequence: Tensor, plain: Callable[[], Any]) -> Any:
        """The graph's outputs for ``sequence``: from a session it continues, else ``plain()``."""
        if self.refusals:
            return plain()
        try:
            return self._call(sequence, plain)
        finally:  # an interrupt may strike between taking a lock and what would release it
            for session in list(self.sessions):
                release(session.lock)
            release(self.lock)

    def _call(self, sequence: Tensor, plain: Callable[[], Any]) -> Any:
        trouble: Exception | None = None
        with quiet_mode():
            claimed = self._claim(sequence)
            if claimed is not None:
                try:
                    outputs = self._answer(*claimed, sequence)
                    if outputs is not None:
                        return tuple(outputs)
                except (CapacityError, MemoryLimit) as error:
                    trouble = error
                except InputError:
                    pass  # the graph itself says what is wrong with its input
        if trouble is not None:
            text = f"this sequence is not decoded incrementally: {trouble}"
            self.doors.warn_once(text, type(trouble).__name__)
        elif self.refusals:
            note_report(self.report, self)
            self.doors.warn_once(refused_text(self.refusals))
        elif self._misses >= _MISSES:
            self.doors.warn_once(
                "sequences grow by one position a call, yet none continues an earlier one: nothing is "
                "reused. Append new positions at the end and leave the earlier ones as they were"
            )
        return plain()

    def _claim(self, sequence: Tensor) -> tuple[Session, Match] | None:
        """The session that agrees longest with ``sequence``, its lock held; without one, remember it."""
        if not self.lock.acquire(timeout=_PATIENCE):
            return None
        best: tuple[Session, Match] | None = None
        busy = False
        try:
            for session in sorted(self.sessions, key=lambda s: s.used, reverse=True):
                if not session.lock.acquire(blocking=False):
                    busy = True
                    continue
                former = best
                try:
                    match = session.match(sequence)
                    if match is not None and (best is None or match.common > best[1].common):
                        best = session, match
                finally:  # whatever interrupts us, a session that is not answered from is free again
                    if best is former:
                        session.lock.release()
                if best is former:
                    continue
                if former is not None:
                    former[0].lock.release()
                if best is not None and best[1].common >= sequence.shape[1] - 1:
                    break
            if best is not None:
                best[0].used = next(clock)
                self._misses = 0
            elif not busy:
                self._remember(sequence)
            return best
        except BaseException:
            if best is not None:
                best[0].lock.release()
            raise
        finally:
            self.lock.release()

    def _remember(self, sequence: Tensor) -> None:
        length = sequence.shape[1]
        self._misses = self._misses + 1 if length == self._last_length + 1 else 0
        self._last_length = length
        if not any(s.decoder is None and same_bits(s.inputs, sequence) for s in self.sessions):
            self._add(Session(self, sequence.clone()))

    def _add(self, session: Session) -> None:
        if len(self.sessions) >= _MOST_SESSIONS:
            self.drop(min(self.sessions, key=lambda s: (s.decoder is not None, s.used)))
        self.sessions.append(session)

    def drop(self, session: Session) -> None:
        """Forget a session."""
        with contextlib.suppress(ValueError):
            self.sessions.remove(session)

    def _answer(self, session: Session, match: Match, sequence: Tensor) -> list[Any] | None:
        """Continue a session whose lock is held; None where our own work failed, which is then a refusal."""
        try:
            decoder = session.decoder
            fresh = session.is_fresh(sequence)
            if decoder is not None and fresh:
                lost = decoder._longest - match.common
                if match.common < sequence.shape[1] and (
                    lost > _CHEAP_LOSS or decoder.batch != sequence.shape[0]
                ):
                    forked = session.fork()
                    session.lock.release()
                    session = forked
                    self._add(session)
            return session.advance(sequence, match, fresh=fresh)
        except (CapacityError, InputError, MemoryLimit):
            self.drop(session)
            raise
        except Exception as error:
            self.refuse(error)
            return None
        except BaseException:
            self.drop(session)
            raise
        finally:
            session.lock.release()


# -- where doors are kept ----------------------------------------------------------------------------------

_ATTRIBUTE = "_flashinf_doors"


class GraphKey:
    """A graph on certain weights, as a key: equal to another of equal ``parts``, its hash computed once."""

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts, self._hash = parts, hash(parts)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, GraphKey) and self.parts == other.parts)

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class DoorKey:
    """What a door answers: a graph on certain weights, and the values passed beside the sequence."""

    graph: GraphKey
    values: tuple[Any, ...] = ()


class Doors(OrderedDict[DoorKey, Door]):
    """The doors of one weight, an attribute of it: freed when it is, and not saved with it."""

    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()
        self._made = self._passed = 0
        self._awaited: Any = None
        self._static: set[int] = set()

    def warn_once(self, text: str, key: str | None = None) -> None:
        """Warn, the first time for this text (or ``key``) and these weights."""
        if (key or text) not in self._warned:
            self._warned.add(key or text)
            warnings.warn(text, FlashinfWarning, stacklevel=3)

    def note_static(self, length: int) -> None:
        """A graph for this length alone was run; warn where each length of a growing sequence has its own."""
        self._static.add(length)
        if all(length - i in self._static for i in range(_MISSES)):
            self.warn_once(
                "each length of a growing sequence is compiled by itself, and runs as given: "
                "use torch.compile(..., dynamic=True)"
            )

    def is_passing(self, key: DoorKey) -> bool:
        """Whether a new key may never come back; then only one that comes twice running is analysed.

        So it is with other values beside the sequence than those of a door there is, and after many keys.
        """
        again, self._awaited = self._awaited == key, key
        other_values = any(k.graph == key.graph and k.values != key.values for k in self)
        if not again and (other_values or self._made >= _MOST_DOORS):
            self._passed += other_values
            if self._passed >= _MISSES:
                self.warn_once(
                    "what is passed beside the sequence changes from call to call: nothing is reused. "
                    "Pass values that stay as they are while a sequence grows",
                    "values",
                )
            return True
        self._made, self._passed = self._made + 1, 0
        return False

    def keep(self, door: Door) -> bool:
        """Whether a door is still the one for its key; it counts as used."""
        if known := self.get(door.key) is door:
            self.move_to_end(door.key)
        return known

    def __reduce__(self) -> Any:
        return OrderedDict, ()

    def __deepcopy__(self, memo: Any) -> Any:
        return OrderedDict()


def doors_of(weights: Sequence[Tensor]) -> Doors:
    """The doors kept by the first parameter among ``weights``, else by the first of them, else new ones."""
    if not weights:
        return Doors()
    holder = next((w for w in weights if isinstance(w, nn.Parameter)), weights[0])
    doors = getattr(holder, _ATTRIBUTE, None)
    if not isinstance(doors, Doors):
        doors = Doors()
        setattr(holder, _ATTRIBUTE, doors)
    return doors


def find_door(doors: Doors, key: DoorKey, make: Callable[[], Door]) -> Door | None:
    """The door for ``key``, made where it is new; None while another thread makes one, or for a passing key."""
    door = doors.get(key)
    if door is None or door.may_retry:
        if doors.is_passing(key) or holds(_creating):
            return None
        try:
            if not _creating.acquire(blocking=False):
                return None
            door = doors[key] = make()
            while len(doors) > _MOST_DOORS:
                doors.popitem(last=False)
        finally:
            release(_creating)
        note_report(door.report, door)
        if door.refusals:
            doors.warn_once(refused_text(door.refusals))
    doors.move_to_end(key)
    return door
