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
from fi_compile.twin import widen, widen_call
from fi_compile.units import Unit, run_unit

from .layout import Layout
from .pairs import Pairs, close, close_by_channel, find_pairs
from .reference import REFERENCES, convolve

_TOLERANCE = 1e-9
_NOISE = 1e-14  # lags below this share of the filter's norm are the transform's rounding
_CLEAR = 1e-10
_LONGEST_WINDOW = 256
_FAR = 8  # a long filter ends where its support is at most this part of the capacity
_MOST_VALUES = 1 << 25  # of the filters of a convolution that mixes channels


@dataclass(frozen=True)
class Filter:
    """A filter derived from one version of the weights.

    ``kernel``: float64 [Cout, n], lag 0 first. ``offset``: what the unit adds regardless of its input, by
    position, float64 [Cout, n]; [Cout, 1] where it is the same at every position; None where it is zero. ``modes``:
    the kernel as a sum of exponentials, where it runs as a recurrence.
    """

    kernel: Tensor
    offset: Tensor | None
    modes: Modes | None = None


@dataclass(frozen=True)
class Convolution:
    """A unit that is a channelwise causal convolution of one value.

    ``kind`` is ``long_conv``, ``short_conv`` or ``scan``; ``lowering`` is ``tiles`` or ``recurrence``, ``window``, and
    ``running_sum`` in turn. ``pairs``: which input channels each output channel reads. ``support``: number of lags from
    the first to the last that is not zero (``scan``: unbounded). ``lags``: no more of them are extracted, and that they
    are all is seen by comparing with the unit; None: as many as there are positions. ``ends``: whether a long filter is
    zero from ``support`` on, far below the capacity.
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
        layouts = {"layout_in": self.layout_in, "layout_out": self.layout_out}
        return layouts if self.fan_in == 1 else {**layouts, "fan_in": self.fan_in}

    def derive(self, values: Mapping[str, Tensor], length: int) -> Filter:
        """Extract the filter up to ``length`` lags from double-precision weights.

        Raises :class:`Unsupported` where a filter is not finite, :class:`FilterGrew` where this kind of increment does
        not cover it.
        """
        function = UnitFunction(self.program, self.unit, self.x, self.layout_in, values, length)
        offset = _offset(self.layout_out.flatten(function(function.zeros(1)))[0])
        short = self._extracted(length)
        kernel = self._kernel(
            function
            if short == length
            else UnitFunction(self.program, self.unit, self.x, self.layout_in, values, short)
        )
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
        found = self.cut(Filter(kernel, offset))
        if short < length and not verify(self, values, length, found):
            raise FilterGrew(self.name)
        return found

    def _extracted(self, length: int) -> int:
        """How many lags are extracted for a filter of ``length``: all, unless there are too many pairs."""
        if self.lags is None or self.lags >= length:
            return length
        return min(length, self.program.lengths.at_least(self.lags) or length)

    def _kernel(self, function: UnitFunction) -> Tensor:
        """The filters [P, n] of the unit at the function's length, or of its first lags."""
        zero = self.layout_out.flatten(function(function.zeros(1)))

        def response(flat: Tensor) -> Tensor:
            return self.layout_out.flatten(function(self.layout_in.unflatten(flat))) - zero

        return self.pairs.kernel(response, self.layout_in.count, function.length)

    def cut(self, derived: Filter) -> Filter:
        """The filter cut to what this kind of increment keeps; raises :class:`FilterGrew` where it needs more."""
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


class UnitFunction:
    """A unit as a function of one of its inputs, at one length, in double precision."""

    def __init__(
        self,
        program: Program,
        unit: Unit,
        x: fx.Node,
        layout: Layout,
        values: Mapping[str, Tensor],
        length: int,
    ) -> None:
        self.program, self.unit, self.x, self.layout, self.length = program, unit, x, layout, length
        self.values = values
        self.device = program.example.device
        self._fixed: dict[int, dict[fx.Node, Tensor]] = {}

    def fixed(self, batch: int) -> dict[fx.Node, Tensor]:
        """The values of the other inputs, none of which depends on the sequence."""
        if batch not in self._fixed:
            example = self.program.example
            shape = (batch, self.length, *example.shape[2:])
            sequence = example.new_zeros((1,) * len(shape), dtype=widen(example.dtype)).expand(shape)
            others = [n for n in self.unit.reads if n is not self.x]
            self._fixed[batch] = self.program.evaluate(sequence, self.values, keep=others, rewrite=widen_call)
        return self._fixed[batch]

    def zeros(self, batch: int) -> Tensor:
        """A zero input of ``batch`` rows."""
        return self.layout.zeros(batch, self.length, torch.float64, self.device)

    def __call__(self, value: Tensor) -> Tensor:
        """The unit's value for an input."""
        batch = value.shape[self.layout.batch] if self.layout.batch is not None else 1
        env = {**self.fixed(batch), self.x: value}
        with torch.no_grad():
            return run_unit(
                self.program, self.unit.nodes, env, length=self.length, batch=batch, rewrite=widen_call
            )


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

    ``scan`` where the filter is constant, ``short_conv`` up to 256 lags, else ``long_conv``. In float64 a filter that
    fades below the extraction's rounding is not short: only one that ends is.
    """
    capacity = kernel.shape[1]
    support = _support(kernel)
    if dtype == torch.float64 and not _ends(kernel, support):
        support = capacity
    if capacity > 2 and _is_constant(kernel):
        return replace(found, kind="scan", lowering="running_sum")
    if support <= min(_LONGEST_WINDOW, max(capacity // 2, 1)):
        return replace(found, kind="short_conv", lowering="window", support=support)
    ending = replace(found, support=support, ends=True)
    return ending if ending.room <= capacity // _FAR else found


def _only_x_is_data(analysis: Consistency, unit: Unit, x: fx.Node) -> bool:
    program = analysis.program
    return all(n is x or n not in program.input_dependent for n in unit.reads)


def layout_of(analysis: Consistency, node: fx.Node) -> Layout | None:
    """Where a floating value keeps its one sequence axis; None where it has none, or two, or sizes that move."""
    axes = analysis.axes[node]
    val = node.meta["val"]
    if len(axes.rows) != 1 or len(axes.batch) > 1 or not (val.is_floating_point() or val.is_complex()):
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
    function = UnitFunction(found.program, found.unit, found.x, found.layout_in, values, length)
    derived = derived or found.derive(values, length)
    generator = torch.Generator().manual_seed(11)
    flat = torch.randn(1, found.layout_in.count, length, dtype=torch.float64, generator=generator)
    flat = flat.to(function.device)
    expected = convolve(flat, derived.kernel, found.source, found.fan_in)
    if derived.offset is not None:
        expected = expected + derived.offset
    return close_by_channel(found.layout_out.flatten(function(found.layout_in.unflatten(flat))), expected)


def _offset(zero: Tensor) -> Tensor | None:
    if not bool(zero.any()):
        return None
    return zero[:, :1] if bool((zero == zero[:, :1]).all()) else zero


def _support(kernel: Tensor) -> int:
    """Number of lags up to the last that is more than rounding."""
    floor = _NOISE * kernel.square().sum(-1, keepdim=True).sqrt()
    live = (kernel.abs() > floor).any(0).nonzero()
    return int(live[-1]) + 1 if live.numel() else 1


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
