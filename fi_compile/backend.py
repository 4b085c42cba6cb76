"""The transparent mode's entrance: ``torch.compile(model, backend="flashinf")``.

Dynamo calls :func:`flashinf` once per graph. The artifact it gets finds, at each call, the door of this
graph on these weights (:mod:`fi_compile.doors`) and answers from it, or runs the graph as given. It keeps
no weights and no state itself.
"""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend

from . import training
from .doors import (
    Door,
    DoorKey,
    Doors,
    FlashinfWarning,
    GraphKey,
    doors_of,
    find_door,
)
from .dynamo import Roles, Static, broken_off, graph_refusal, graph_text, read_roles
from .errors import InputError, Refusal
from .extension import places
from .inputs import Description, describe, exact, undescribed
from .mixers.tiles import check_precision, choose_kernels
from .options import Options, read_options
from .report import Report, last_report, note_report, refused_text
from .sessions import common_prefix

_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# A graph is interpreted this many times before Inductor is worth its compile time.
_EAGER_CALLS = 2
_EAGER_PROMPTS = 8


def flashinf(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs; found by ``torch.compile`` under the name ``"flashinf"``.

    ``options``: see :class:`fi_compile.Options`. ``mode``: handed to Inductor where that runs the graph.
    Never raises for a model: one that cannot be decoded incrementally runs as given, with a
    :class:`FlashinfWarning` that says why. Misuse (an unknown option) raises :class:`InputError` when the
    compiled model is called.
    """
    learns = torch.is_grad_enabled() and any(
        isinstance(v, Tensor) and v.requires_grad for v in example_inputs
    )
    try:
        chosen = read_options(options)
        if mode not in _MODES:
            raise InputError(f"mode={mode!r}: expected one of {', '.join(str(m) for m in _MODES[1:])}")
        if learns:
            _check_precision(chosen, example_inputs)
    except InputError as error:
        return _raiser(error)
    roles = _roles(gm, example_inputs)
    if learns:
        training.use_long_conv(gm, chosen.precision)
        return _Training(lookup_backend(chosen.fallback)(gm, list(example_inputs)), roles)
    plain = _Plain(gm, chosen, mode, dynamic=isinstance(roles, (Roles, Refusal)))
    if isinstance(roles, Refusal):
        return _refused((*broken_off(gm), roles), plain)
    if isinstance(roles, Static):
        return _static(roles, plain)
    return _Artifact(gm, roles, chosen, plain) if isinstance(roles, Roles) else plain


def _check_precision(options: Options, inputs: Sequence[Any]) -> None:
    if options.precision != "float32":  # else the kernels that are asked for do not matter in training
        for weight in inputs:
            if isinstance(weight, nn.Parameter):
                check_precision(
                    options.precision, choose_kernels(options.kernels, weight.device), weight.dtype
                )


def _raiser(error: InputError) -> Callable[..., Any]:
    """Dynamo would wrap an error of a backend in its own; one raised at the call arrives as it is."""

    def fail(*_: Any) -> Any:
        raise error

    return fail


def _refused(refusals: tuple[Refusal, ...], plain: _Plain) -> Callable[..., Any]:
    """The graph as given, its first call with a warning."""
    note_report(Report("refused", refusals=refusals))
    own_doors = Doors()  # of a graph that reads no parameters

    def run(*args: Any) -> Any:
        weights = [a for a in args if isinstance(a, nn.Parameter)]
        doors = doors_of(weights) if weights else own_doors
        doors.warn_once(refused_text(refusals))
        return plain(*args)

    return run


def _static(static: Static, plain: _Plain) -> Callable[..., Any]:
    """A graph for one length; many of them in a row are a loop that compiles at every step."""

    def run(*args: Any) -> Any:
        weights = [args[place] for place in static.weights]
        if weights:
            doors_of(weights).note_static(args[static.sequence].shape[1])
        return plain(*args)

    return run


def _roles(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Roles | Static | Refusal | None:
    try:
        roles = read_roles(gm, example_inputs)
        if not isinstance(roles, Roles):
            return roles
        device = example_inputs[roles.sequence].device.type
        if torch.is_autocast_enabled(device):
            return Refusal(
                "autocast",
                "it runs under torch.autocast",
                hint="convert the model once: model.to(torch.bfloat16)",
            )
        return graph_refusal(gm) or roles
    except Exception as error:  # never a crash under torch.compile
        return Refusal("internal", f"{type(error).__name__}: {error}"[:500])


class _Plain:
    """The graph as given: interpreted at first, by Inductor (if that is the fallback) when called often."""

    def __init__(self, gm: fx.GraphModule, options: Options, mode: str | None, dynamic: bool) -> None:
        self._gm, self._mode, self._dynamic = gm, mode, dynamic
        self._calls = 0
        self._compile = options.fallback == "inductor"
        self._compiled: Callable[..., Any] | None = None
        self.patience = _EAGER_CALLS

    def __call__(self, *args: Any) -> Any:
        self._calls += 1
        if not self._compile or self._calls <= self.patience:
            return self._gm.forward(*args)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self._gm.forward, mode=self._mode, dynamic=self._dynamic)
            return self._compiled(*args)
        except Exception:
            result = self._gm.forward(*args)  # raises again where the input was at fault
            self._compile = False
            return result


@dataclass(frozen=True)
class _Call:
    """What a call was made with, where that can be told quickly: its weights, numbers, integers, kind of sequence."""

    seen: bytes
    integers: tuple[Any, ...]
    kind: tuple[Any, ...]


class _Artifact:
    """One graph with a symbolic length, called with any weights of its form."""

    def __init__(self, gm: fx.GraphModule, roles: Roles, options: Options, plain: _Plain) -> None:
        self._gm, self._roles, self._options, self._plain = gm, roles, options, plain
        self._plain.patience = _EAGER_PROMPTS
        self._text = hashlib.sha256(graph_text(gm, roles).encode()).digest()
        self._weights = tuple(place for place, _ in roles.weights)
        self._own_doors = Doors()  # of a graph that reads no weights
        # The last call and its door: nearly always the next one's too.
        self._last: tuple[_Call, weakref.ref[Door]] | None = None

    def __call__(self, *args: Any) -> Any:
        sequence = args[self._roles.sequence]
        call = self._recognise(args, sequence)
        door = self._known_door(call)
        if door is None or self._roles.extras:
            door = self._find_door(args, sequence, call, door)
        if door is None:
            return self._plain(*args)
        if door.refusals:
            self._plain.patience = _EAGER_CALLS
        return door.call(sequence, lambda: self._plain(*args))

    def _recognise(self, args: tuple[Any, ...], sequence: Tensor) -> _Call | None:
        seen = places(args, self._weights, self._roles.numbers)
        if seen is None:
            return None
        integers = tuple(args[place] for place in self._roles.integers)
        return _Call(seen, integers, _kind(sequence))

    def _known_door(self, call: _Call | None) -> Door | None:
        """The last call's door where this one differs in its sequence, and what is beside it, alone."""
        door = self._last[1]() if self._last is not None and self._last[0] == call else None
        # Alive, it holds its weights: no others lie at their places.
        return door if door is not None and not door.refusals and door.doors.keep(door) else None

    def _find_door(
        self, args: tuple[Any, ...], sequence: Tensor, call: _Call | None, last: Door | None
    ) -> Door | None:
        roles, weights = self._roles, [args[place] for place in self._weights]
        doors = doors_of(weights) if weights else self._own_doors
        beside = []
        for extra in roles.extras:
            found = describe(args[extra.place], sequence, extra)
            if found is None:
                text = undescribed(extra, args[extra.place], sequence)
                doors.warn_once(f"a call runs as given, every position of it, because {text}", extra.name)
                return None
            beside.append(found)
        graph = self._graph_key(weights, sequence) if last is None else last.key.graph
        key = DoorKey(graph, self._values(args, beside))
        door = find_door(doors, key, lambda: Door(doors, key, self._gm, roles, args, beside, self._options))
        if door is None:
            return None
        if call is not None:
            self._last = call, weakref.ref(door)
        return door if door.holds(args, beside) else None

    def _graph_key(self, weights: list[Tensor], sequence: Tensor) -> GraphKey:
        """The key of this graph on these weights and sequences of this kind."""
        weighed = tuple((id(w), w.data_ptr(), w.dtype, w.shape, w.stride()) for w in weights)
        return GraphKey((self._text, self._roles.outputs, self._options, weighed, _kind(sequence)))

    def _values(self, args: Sequence[Any], beside: Sequence[Description]) -> tuple[Any, ...]:
        numbers = (exact(args[place].item()) for place in self._roles.numbers)
        integers = (exact(args[place]) for place in self._roles.integers)
        return *numbers, *integers, *beside


def _kind(sequence: Tensor) -> tuple[Any, ...]:
    return sequence.dtype, sequence.device, sequence.shape[2:], torch.get_default_dtype()


class _Training:
    """A graph run with gradients: the fallback, and one warning where it looks like a decoding loop."""

    def __init__(self, run: Callable[..., Any], roles: Roles | Static | Refusal | None) -> None:
        self._run = run
        self._sequence = roles.sequence if isinstance(roles, Roles) else None
        self._seen: Tensor | None = None

    def __call__(self, *args: Any) -> Any:
        if self._sequence is not None:
            self._watch(args[self._sequence].detach())
        return self._run(*args)

    def _watch(self, sequence: Tensor) -> None:
        seen, self._seen = self._seen, sequence.clone()
        if seen is None or seen.shape[0] != sequence.shape[0] or seen.shape[1] >= sequence.shape[1]:
            return
        if common_prefix(seen, sequence, lambda: False).common == seen.shape[1]:
            self._sequence = self._seen = None
            warnings.warn(
                "a growing prefix is run with gradients enabled, every position each time: decode under "
                "torch.inference_mode() (or torch.no_grad())",
                FlashinfWarning,
                stacklevel=2,
            )


__all__ = ["FlashinfWarning", "flashinf", "last_report"]
