"""Recognise a causal convolution with an input-independent filter, and extract the filter.

A unit that needs the whole of one value x is read as a function f(x), other inputs fixed. If f is affine,
channelwise and shift-invariant its response h to an impulse at position 0 is its filter:
``f(x)[t] = f(0)[t] + Σ_{i≤t} x[i]·h[t-i]``. What kind of increment serves it depends on the support of h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fi_compile.errors import Refusal, Unsupported
from fi_compile.kernels.modes import Modes
from fi_compile.passes.propose_consistency import Consistency
from fi_compile.program import Program, is_tensor, source_of
from fi_compile.units import Unit

from .layout import Layout
from .pairs import Pairs, close, close_by_channel, find_pairs
from .reference import REFERENCES, convolve, convolve_at
from .unit_function import UnitFunction

_TOLERANCE = 1e-9
_NOISE = 1e-14  # lags below this share of the filter's norm are the transform's rounding
_CLEAR = 1e-10
LONGEST_WINDOW = 256
_FAR = 8  # a long filter ends where its support is at most this part of the capacity
_FEW = 8  # positions at which a proved convolution is compared with its filter
_MOST_VALUES = 1 << 25  # of the filters of a convolution that mixes channels


@dataclass(frozen=True)
class Filter:
    """A filter derived from one version of the weights.

    ``kernel``: float64 [Cout, n], lag 0 first, or the lags ``at`` alone. ``offset``: what the unit adds regardless
    of its input, by position, float64 [Cout, n]; [Cout, 1] where it is the same at every position; None where it is
    zero. ``modes``: the kernel as a sum of exponentials, where it runs as a recurrence.
    """

    kernel: Tensor
    offset: Tensor | None
    modes: Modes | None = None
    at: tuple[int, ...] | None = None

    @property
    def lags(self) -> Tensor:
        """The kernel with all of its lags."""
        if self.at is None:
            return self.kernel
        out = self.kernel.new_zeros(len(self.kernel), self.at[-1] + 1)
        out[:, self.at] = self.kernel
        return out

    def rounded(self, dtype: torch.dtype) -> Filter:
        """The same in the dtype of a state; modes stay as they are."""
        offset = None if self.offset is None else self.offset.to(dtype)
        return replace(self, kernel=self.kernel.to(dtype), offset=offset)


@dataclass(frozen=True)
class Convolution:
    """A unit that is a channelwise causal convolution of one value.

    ``kind`` is ``long_conv``, ``short_conv`` or ``scan``; ``lowering`` is ``tiles`` or ``recurrence``, ``window``, and
    ``running_sum`` in turn. ``pairs``: which input channels each output channel reads. ``support``: number of lags from
    the first to the last that is not zero (``scan``: unbounded). ``lags``: no more of them are extracted, and that they
    are all is seen by comparing with the unit; None: as many as there are positions. ``ends``: whether a long filter is
    zero from ``support`` on, far below the capacity. ``at``: lag 0 and those of a short filter that are not zero, where
    these are few of its support, as of a dilated convolution; None: all of it.

    What is proved of it: ``bound``: its filter has no more lags than this, at any length; None where that is not known.
    ``invariant``: it commutes with shifts. ``homogeneous``: nothing is added to what comes of its input.
    """

    program: Program = field(repr=False)
    unit: Unit = field(repr=False)
    x: fx.Node
    kind: str
    layout_in: Layout
    layout_out: Layout
    pairs: Pairs = field(repr=False)
    support: int
    depends_on: tuple[str, ...]
    lowering: str = "tiles"
    lags: int | None = None
    ends: bool = False
    bound: int | None = None
    invariant: bool = False
    homogeneous: bool = False
    at: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The name of the node whose value the convolution makes."""
        return self.unit.exit.name

    @property
    def source(self) -> Tensor:
        """The input channel of each pair, int64 [P]."""
        return self.pairs.source

    @property
    def fan_in(self) -> int:
        """Pairs for each output channel: P / Cout."""
        return self.pairs.fan_in

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The values it reads."""
        return (self.x,)

    def flatten(self, values: Sequence[Tensor]) -> Tensor:
        """Whole values of the inputs as [B, Cin, n]."""
        return self.layout_in.flatten(values[0])

    @cached_property
    def gather(self) -> Tensor | None:
        """``source``, or None where every output channel reads the input channel of its own number."""
        identity = torch.arange(self.layout_in.count, device=self.source.device)
        return None if torch.equal(self.source, identity) else self.source

    @property
    def room(self) -> int:
        """Lags that are kept of a filter that ends: some more than its support, for other weights."""
        return 1 << self.support.bit_length()

    @property
    def reference(self) -> Callable[..., Tensor]:
        """The full-sequence form of the increment, as a plain torch function."""
        return REFERENCES[self.kind]

    @property
    def reference_options(self) -> dict[str, Any]:
        """What the reference takes beside tensors."""
        options: dict[str, Any] = {"layout_in": self.layout_in, "layout_out": self.layout_out}
        options |= {} if self.fan_in == 1 else {"fan_in": self.fan_in}
        given, made = (n.meta["val"].dtype for n in (self.x, self.unit.exit))
        options |= {} if given.to_real() == made.to_real() else {"dtype": made}
        return options if self.at is None else {**options, "at": self.at}

    def derive(self, values: Mapping[str, Tensor], length: int) -> Filter:
        """Extract the filter up to ``length`` lags from double-precision weights.

        Raises :class:`Unsupported` where a filter is not finite, :class:`FilterGrew` where this kind of increment does
        not cover it.
        """
        short = self.evaluated(length)
        function = self.function(values, short)
        zero = self._zero(function)
        known = self.bound is not None and zero is not None and bool((zero == zero[:, :1]).all())
        whole = zero if short == length or known else self._zero(self.function(values, length))
        kernel = self._kernel(function, zero)
        if not bool(torch.isfinite(kernel).all()):
            raise Unsupported(
                Refusal(
                    "filter",
                    f"the filter of {self.name!r} is not finite up to {length} positions",
                    (self.name,),
                    source_of(self.unit.exit),
                    "check the weights for NaN and the filter for growing exponentials",
                )
            )
        found = self.cut(Filter(kernel, _offset(whole)))
        if short < length and self.bound is None and not verify(self, values, length, found):
            raise FilterGrew(self.name)
        return found

    def function(self, values: Mapping[str, Tensor], length: int) -> UnitFunction:
        """The unit as a function of x at a length."""
        return UnitFunction(self.program, self.unit, self.x, self.layout_in, values, length)

    def evaluated(self, length: int) -> int:
        """The length at which a filter of ``length`` lags is evaluated: all, unless fewer are known to do."""
        fewer = [n for n in (self.lags, None if self.bound is None else 2 * self.bound) if n is not None]
        if not fewer or min(fewer) >= length:
            return length
        return min(length, self.program.lengths.at_least(min(fewer)) or length)

    def _zero(self, function: UnitFunction) -> Tensor | None:
        """What the unit adds to what comes of its input, [Cout, n]; None where that is nothing."""
        return None if self.homogeneous else self.layout_out.flatten(function(function.zeros(1)))[0]

    def _kernel(self, function: UnitFunction, zero: Tensor | None) -> Tensor:
        """The filters [P, n] of the unit at the function's length, or of its first lags."""

        def response(flat: Tensor) -> Tensor:
            value = self.layout_out.flatten(function(self.layout_in.unflatten(flat)))
            return value if zero is None else value - zero

        return self.pairs.kernel(response, self.layout_in.count, function.length)

    def cut(self, derived: Filter) -> Filter:
        """The filter cut to what this kind of increment keeps; raises :class:`FilterGrew` where it needs more."""
        if self.at is not None:
            if not set(_live(derived.kernel)) <= set(self.at):
                raise FilterGrew(self.name)
            missing = max(0, self.support - derived.kernel.shape[1])
            kept = torch.nn.functional.pad(derived.kernel, (0, missing))[:, self.at]
            return replace(derived, kernel=kept, at=self.at)
        if self.kind == "short_conv":
            if _support(derived.kernel) > self.support:
                raise FilterGrew(self.name)
            kept = derived.kernel[:, : self.support]
            missing = self.support - kept.shape[1]  # a filter asked for fewer lags than a window has
            return replace(derived, kernel=torch.nn.functional.pad(kept, (0, missing)))
        if self.ends and _support(derived.kernel) > self.room:
            raise FilterGrew(self.name)
        if self.kind == "scan" and not _is_constant(derived.kernel):
            raise FilterGrew(self.name)
        return derived


class FilterGrew(Exception):
    """New weights gave a filter outside the class found before; the model must be analysed again."""


def recognise(analysis: Consistency, unit: Unit, x: fx.Node, length: int) -> Convolution | None:
    """The convolution a unit is, or None: probed on random input at a sampled length, of kind ``long_conv``.

    ``length``: how many lags its filter is taken to have.
    """
    if not _only_x_is_data(analysis, unit, x):
        return None
    layout_in, layout_out = layout_of(analysis, x), layout_of(analysis, unit.exit)
    if layout_in is None or layout_out is None:
        return None
    n = analysis.longest
    function = UnitFunction(analysis.program, unit, x, layout_in, analysis.parameters, n)
    try:
        pairs = _probe(function, layout_in, layout_out)
    except (RuntimeError, ValueError, IndexError):
        return None
    if pairs is None:
        return None
    lags = None if pairs.fan_in == 1 else _MOST_VALUES // len(pairs.source)
    behind = parameters_behind(analysis.program, [n for n in unit.reads if n is not x])
    return Convolution(
        analysis.program, unit, x, "long_conv", layout_in, layout_out, pairs, length, behind, lags=lags
    )


def classify(found: Convolution, kernel: Tensor, dtype: torch.dtype) -> Convolution:
    """Choose the kind of increment by a filter's response [Cout, capacity], for state of ``dtype``.

    ``scan`` where the filter is constant, ``short_conv`` up to 256 lags, wherever they are if all others are zero
    (a dilated convolution), else ``long_conv``. In float64 a filter that fades below the extraction's rounding is not
    short: only one that ends is.
    """
    capacity = kernel.shape[1]
    support = _support(kernel)
    if dtype == torch.float64 and found.bound is None and not _ends(kernel, support):
        support = capacity
    if capacity > 2 and _is_constant(kernel):
        return replace(found, kind="scan", lowering="running_sum")
    at = _live(kernel[:, :support])
    if len(at) <= min(LONGEST_WINDOW, support // 2):
        return replace(found, kind="short_conv", lowering="window", support=support, at=at)
    if support <= min(LONGEST_WINDOW, max(capacity // 2, 1)):
        return replace(found, kind="short_conv", lowering="window", support=support)
    ending = replace(found, support=support, ends=True)
    return ending if ending.room <= capacity // _FAR else found


def _only_x_is_data(analysis: Consistency, unit: Unit, x: fx.Node) -> bool:
    program = analysis.program
    return all(n is x or n not in program.input_dependent for n in unit.reads)


def layout_of(analysis: Consistency, node: fx.Node, whole_numbers: bool = False) -> Layout | None:
    """Where a value keeps its one sequence axis; None where it has none, or two, or sizes that move.

    None for integers and flags too, unless ``whole_numbers``.
    """
    axes = analysis.axes[node]
    val = node.meta["val"]
    numbers = whole_numbers or val.is_floating_point() or val.is_complex()
    if len(axes.rows) != 1 or len(axes.batch) > 1 or not numbers:
        return None
    shape = val.shape
    special = {*axes.rows, *axes.batch}
    channels = tuple(size for dim, size in enumerate(shape) if dim not in special)
    if not all(isinstance(size, int) for size in channels):
        return None
    return Layout(axes.rows[0], axes.batch[0] if axes.batch else None, channels, val.is_complex())


def _probe(function: UnitFunction, layout_in: Layout, layout_out: Layout) -> Pairs | None:
    """The channels that each output channel reads, if the function is a causal convolution."""
    n, count = function.length, layout_in.count
    generator = torch.Generator().manual_seed(7)
    rows = 2 if layout_in.batch is not None else 1

    def random() -> Tensor:
        flat = torch.randn(rows, count, n, dtype=torch.float64, generator=generator)
        return layout_in.unflatten(flat.to(function.device))

    zero = layout_out.flatten(function(function.zeros(rows)))

    def response(value: Tensor) -> Tensor:
        return layout_out.flatten(function(value)) - zero

    def respond(flat: Tensor) -> Tensor:
        value = layout_in.unflatten(flat.to(function.device))
        if flat.shape[0] == rows:
            return response(value)
        return layout_out.flatten(function(value)) - zero[:1]

    a, b = random(), random()
    fa, fb = response(a), response(b)
    if fa.shape[0] != rows or not close(response(0.5 * a - 2.0 * b), 0.5 * fa - 2.0 * fb):
        return None
    if rows == 2:
        mixed = layout_in.flatten(a).clone()
        mixed[1] = layout_in.flatten(b)[1]
        if not close(response(layout_in.unflatten(mixed))[0], fa[0]):
            return None

    return find_pairs(respond, rows, count, n)


def verify(
    found: Convolution, values: Mapping[str, Tensor], length: int, derived: Filter | None = None
) -> bool:
    """Whether the unit equals its filter on random input over a whole length (Freivalds' check).

    Both sides are linear in the input, so a random input that agrees settles the identity of the two matrices up
    to rounding, with probability one.
    """
    derived = derived or found.derive(values, length)
    if found.bound is not None:
        length = found.evaluated(length)
    function = found.function(values, length)
    generator = torch.Generator().manual_seed(11)
    flat = torch.randn(1, found.layout_in.count, length, dtype=torch.float64, generator=generator)
    flat = flat.to(function.device)
    value = found.layout_out.flatten(function(found.layout_in.unflatten(flat)))
    scale = value.abs().amax((0, 2), keepdim=True)
    if found.invariant and length > _FEW:
        # Every lag there is meets the last position.
        positions = torch.linspace(length // 2, length - 1, _FEW, device=flat.device).long()
        expected = convolve_at(positions, flat, derived.lags, found.source, found.fan_in)
        value = value[..., positions]
    else:
        positions = slice(None)
        expected = convolve(flat, derived.lags, found.source, found.fan_in)
    if derived.offset is not None:
        offset = derived.offset
        expected = expected + (offset if offset.shape[1] == 1 else offset[:, :length][:, positions])
    return close_by_channel(value, expected, scale=scale)


def _offset(zero: Tensor | None) -> Tensor | None:
    if zero is None or not bool(zero.any()):
        return None
    return zero[:, :1] if bool((zero == zero[:, :1]).all()) else zero


def _support(kernel: Tensor) -> int:
    """Number of lags up to the last that is more than rounding."""
    floor = _NOISE * kernel.square().sum(-1, keepdim=True).sqrt()
    live = (kernel.abs() > floor).any(0).nonzero()
    return int(live[-1]) + 1 if live.numel() else 1


def _live(kernel: Tensor) -> tuple[int, ...]:
    """Lag 0, and those at which a filter is not exactly zero."""
    live = (kernel != 0).any(0)
    live[:1] = True
    return tuple(live.nonzero()[:, 0].tolist())


def _ends(kernel: Tensor, support: int) -> bool:
    """Whether the last lag of the support stands far above the rounding that follows it."""
    norm = kernel.square().sum(-1).sqrt()
    return bool((kernel[:, support - 1].abs() > _CLEAR * norm).any())


def _is_constant(kernel: Tensor) -> bool:
    first = kernel[:, :1]
    return bool(((kernel - first).abs() <= _NOISE * 100 * first.abs()).all()) and bool(first.any())


def parameters_behind(program: Program, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The attribute paths of the parameters that values, such as a filter's, are computed from."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(a for a in node.all_input_nodes if is_tensor(a))
    paths = {program.nodes[i.name]: i.path or i.name for i in program.inputs}
    return tuple(sorted(paths[n] for n in seen if n in paths and n is not program.sequence))
