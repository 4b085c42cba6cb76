"""Sessions of the transparent mode: known sequences that a call with a whole prefix may continue.

A call is matched row by row against what the sessions have seen: reordered beams, forks and alternating
prompts are found again. Nothing but a copy of the input is kept until a second call extends a first.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.convert_frame import compile_lock
from torch.fx import traceback as fx_traceback
from torch.utils import _pytree as pytree

from .decoder import Decoder
from .errors import FlashinfError
from .forms import Form
from .growing import Growing, laid_out
from .inputs import bits

if TYPE_CHECKING:
    from .doors import Door

_WEIGH_EVERY = 64  # positions between two looks at the bytes held

clock = itertools.count()
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_registering = threading.Lock()


@dataclass(frozen=True)
class Match:
    """How far a sequence agrees with a session: ``common`` positions, row i with its row ``index[i]``.

    ``index`` is None where the rows are the session's own, in order.
    """

    common: int
    index: tuple[int, ...] | None = None


class Session:
    """One batch of known sequences: at first a copy of the input, later a decoder and the outputs so far."""

    def __init__(self, door: Door, prompt: Tensor) -> None:
        self.door = door
        self.lock = threading.RLock()
        self.used = next(clock)
        self.decoder: Decoder | None = None
        self.outputs: list[Growing | None] = []
        self._prompt: Tensor | None = prompt
        self._private = False  # outputs are copied: a caller wrote to what was lent
        self._lost = False
        self._unversioned: list[int] = []
        self._generation = -1  # of the door's weights
        self._weighed = 0
        with _registering:
            _sessions.add(self)

    @property
    def inputs(self) -> Tensor:
        """What was seen, [B, n(, D)]: to be read only, with the lock held."""
        if self.decoder is not None:
            return self.decoder._kept_inputs
        assert self._prompt is not None
        return self._prompt

    def is_fresh(self, sequence: Tensor) -> bool:
        """Whether the decoder's state is of the weights as they are.

        A ``sequence`` that brings no new position begins again: then their contents are compared too, which writes
        that bump no version have changed, such as those of fused optimisers.
        """
        decoder = self.decoder
        if decoder is None or not decoder.weights_unchanged or self._generation != self.door.generation:
            return False
        if self._unversioned != self.door.unversioned():
            return False
        return sequence.shape[1] > decoder._longest or decoder._weights_same()

    @property
    def nbytes(self) -> int:
        """Bytes held, state and outputs."""
        held = self.inputs.nbytes if self.decoder is None else self.decoder.state_bytes
        return held + sum(g.nbytes for g in self.outputs if g is not None)

    def match(self, sequence: Tensor) -> Match | None:
        """Whether ``sequence`` continues this session well enough to be answered from it."""
        known, length = self.inputs, sequence.shape[1]
        if known.shape[2:] != sequence.shape[2:]:
            return None
        found = common_prefix(known, sequence, lambda: self.door.engine.rows_independent)
        if self.decoder is None:
            continues = found.common == known.shape[1] < length
        else:
            continues = found.common == known.shape[1] or 2 * found.common >= length
        return found if continues and found.common else None

    def advance(self, sequence: Tensor, match: Match, *, fresh: bool) -> list[Any]:
        """The outputs for ``sequence``, of which ``match.common`` positions are known.

        ``fresh``: whether the state is of the weights as they are, :meth:`is_fresh`.
        """
        decoder, length = self.decoder, sequence.shape[1]
        if decoder is None or self._lost or not fresh:
            return self._rebuild(sequence)
        if match.index is not None and not self._reorder(match.index):
            return self._rebuild(sequence)
        start = match.common
        if start == length and self.door.needs_newest:
            start -= 1
        newest: list[Any] = []
        if start < length:
            if start < decoder._longest:
                decoder.rewind(start)
                self._truncate(start)
            may_compile = match.index is not None or decoder.capacity < length
            with tracing() if may_compile else contextlib.nullcontext():
                newest = self._extend(sequence[:, start:])
        outputs = self._read(length, newest)
        if outputs is None:
            self._private = True
            return self._rebuild(sequence)
        return outputs

    def fork(self) -> Session:
        """An independent session at the same place, its lock held."""
        new = Session(self.door, self.inputs)
        new.lock.acquire()
        assert self.decoder is not None
        new.decoder, new._prompt = self.decoder.fork(), None
        new._private, new._unversioned, new._generation = True, self._unversioned, self._generation
        new.outputs = [None if g is None else g.copy() for g in self.outputs]
        new._lost = _some_lost(self.outputs, new.outputs)
        return new

    def _rebuild(self, sequence: Tensor) -> list[Any]:
        """Decode the whole sequence with the weights as they are."""
        door, batch, length = self.door, sequence.shape[0], sequence.shape[1]
        with tracing():
            make_room(self, door.estimate(batch, length))
            self._unversioned = door.unversioned()
            self.decoder, self._prompt = door.new_decoder(batch), None
            self._generation = door.generation
            self.outputs = door.fresh_outputs(batch, self._private)
            newest = self._extend(sequence)
        outputs = self._read(length, newest)
        assert outputs is not None
        self._weighed = length
        return outputs

    def _extend(self, tokens: Tensor) -> list[Any]:
        assert self.decoder is not None
        flat = pytree.tree_leaves(self.decoder._extend_unwatched(tokens))
        for growing, rows in zip(self.outputs, flat, strict=True):
            if growing is not None:
                growing.append(rows)
        length = self.decoder._longest
        if length - self._weighed >= _WEIGH_EVERY:
            make_room(self, self.nbytes)
            self._weighed = length
        return flat

    def _read(self, length: int, newest: list[Tensor]) -> list[Any] | None:
        """The outputs in the graph's own layout; None where a caller's writes have lost some."""
        outputs: list[Any] = []
        batch, tensors = self.inputs.shape[0], iter(range(len(self.outputs)))
        for form in self.door.roles.outputs:
            if not isinstance(form, Form):
                value = form
            elif form.dtype is None:
                value = form.at(batch, length)[0][0]
            elif (growing := self.outputs[place := next(tensors)]) is None:
                value = _with_strides(newest[place], form.at(batch, length)[1])
            elif (value := growing.read(length)) is None:
                return None
            outputs.append(value)
        return outputs

    def _truncate(self, length: int) -> None:
        for growing in self.outputs:
            if growing is not None:
                growing.truncate(length)

    def _reorder(self, index: tuple[int, ...]) -> bool:
        """Rows as ``index`` says; False where their outputs were lost."""
        assert self.decoder is not None
        self.decoder.reorder(index)
        rows = torch.tensor(index, device=self.inputs.device)
        places = zip(self.outputs, self.door.batch_axes, self.door.layouts(len(index)), strict=True)
        outputs = [
            old if old is None or axis is None else old.reorder(rows, axis, layout)
            for old, axis, layout in places
        ]
        self._lost = _some_lost(self.outputs, outputs)
        self._private, self.outputs = True, outputs
        return not self._lost


def _some_lost(old: Sequence[Growing | None], new: Sequence[Growing | None]) -> bool:
    return any(n is None and o is not None for o, n in zip(old, new, strict=True))


def common_prefix(known: Tensor, sequence: Tensor, rows_independent: Callable[[], bool]) -> Match:
    """The longest prefix of all rows of ``sequence`` [B, s, …] that ``known`` [B', n, …] has, and where.

    Compares bits, so that -0.0 is not 0.0 and a NaN equals itself.
    """
    length = min(known.shape[1], sequence.shape[1])
    known, sequence = bits(known[:, :length]), bits(sequence[:, :length])
    same_batch = known.shape[0] == sequence.shape[0]
    if same_batch and torch.equal(known, sequence):
        return Match(length)
    if same_batch:
        in_order = int(_agreement(known, sequence).min())
        if not rows_independent():
            return Match(in_order)
    elif not rows_independent():
        return Match(0)
    index, common = [], length
    for place, row in enumerate(sequence):
        agreed = _agreement(known, row.unsqueeze(0))
        best = int(agreed.argmax())
        if same_batch and agreed[place] == agreed[best]:
            best = place
        index.append(best)
        common = min(common, int(agreed[best]))
    return Match(common, None if same_batch and index == list(range(len(index))) else tuple(index))


def _agreement(known: Tensor, sequence: Tensor) -> Tensor:
    """Per row, how many leading positions agree: int64 [B]."""
    different = (known != sequence).flatten(2).any(2) if known.dim() > 2 else known != sequence
    return torch.where(different.any(1), different.to(torch.uint8).argmax(1), different.shape[1])


def _with_strides(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    return value if value.stride() == strides else laid_out(value, strides)


def holds(lock: Any) -> bool:
    """Whether this thread holds a re-entrant lock."""
    return lock._is_owned()


def release(lock: Any) -> None:
    """Give up a re-entrant lock as often as this thread holds it."""
    while holds(lock):
        lock.release()


class MemoryLimit(FlashinfError):
    """A session would hold more than the option ``memory_limit`` allows."""


def make_room(session: Session, needed: int) -> None:
    """Drop the sessions used longest ago until ``needed`` bytes for ``session`` fit.

    Raises :class:`MemoryLimit` where they never do.
    """
    limit = session.door.options.memory_limit
    if needed > limit:
        raise MemoryLimit(f"it needs {needed:,} bytes of state and outputs, memory_limit is {limit:,}")
    others = [s for s in _living() if s is not session]
    held = sum(s.nbytes for s in others)
    for other in sorted(others, key=lambda s: s.used):
        if held + needed <= limit:
            break
        if other.lock.acquire(blocking=False):
            other.door.drop(other)
            held -= other.nbytes
            other.lock.release()


def state_bytes() -> int:
    """Bytes all sessions hold together."""
    return sum(s.nbytes for s in _living())


def _living() -> list[Session]:
    with _registering:
        return list(_sessions)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Trace while no other thread compiles; one that calls a compiled model meanwhile runs it uncompiled."""
    setting = vars(dynamo_config)["_config"]["error_on_nested_fx_trace"]
    owner = threading.get_ident()
    with compile_lock:  # a patch of the setting holds for one thread, its default for all
        former, setting.default = setting.default, False
        annotate = fx_traceback.annotate

        def annotate_here(annotations: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
            return annotate(annotations) if threading.get_ident() == owner else contextlib.nullcontext()

        # while one thread exports, every thread that calls a compiled function annotates one global dictionary
        fx_traceback.annotate = annotate_here
        try:
            yield
        finally:
            setting.default, fx_traceback.annotate = former, annotate


class quiet_mode:  # as torch names them
    """No gradients, and tensors that keep versions, whatever mode the caller is in."""

    def __enter__(self) -> None:
        self._guard = torch._C._InferenceMode(False)
        self._guard.__enter__()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(*error)  # both modes as they were


@contextlib.contextmanager
def fork_rng(device: torch.device) -> Iterator[None]:
    """Leave the caller's random numbers alone, also where the graph that is analysed draws some."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield
