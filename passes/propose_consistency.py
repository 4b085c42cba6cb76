"""analyse, first half: mark the values that are prefix-consistent on random input (numeric proposal).

A value is prefix-consistent on its axes of size s if ``V_s(x)[:r] == V_r(x[:r])`` for all r ≤ s. Here that is
checked on the float64 twin at a few awkward lengths; the static certificate is another pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fi_compile.errors import Refusal, Unsupported
from fi_compile.facts import LARGE
from fi_compile.program import Program, as_expr, is_integer, is_tensor, source_of
from fi_compile.twin import MovedValues, random_sequence, widen_call

_BATCH = 3
_TOLERANCE = 1e-11  # of a value's scale; true noise of the twin stays under 4e-14
# Of the loudest channel: what is quieter still may be its rounding, and is judged at this scale.
QUIETEST = 1e-6
# Masks are filled with numbers this large at least, this far from all others; what is smaller still is rounding.
_LEAST_FILL, _FAR, _ROUNDING = 1e3, 1e-2, 1e-12
_CHECKED = 4096  # a size is s if it equals s at every admitted length up to here


@dataclass(frozen=True)
class Axes:
    """Which dimensions of a tensor node run along the sequence (``rows``) and the batch.

    ``fixed`` says that every other dimension has a size free of s.
    """

    rows: tuple[int, ...]
    batch: tuple[int, ...]
    fixed: bool


@dataclass(frozen=True)
class Consistency:
    """What the proposal found: per node its axes, the consistent nodes, and the twin's values."""

    program: Program
    axes: Mapping[fx.Node, Axes]
    consistent: frozenset[fx.Node]
    lengths: tuple[int, ...]
    values: Samples
    parameters: MovedValues

    def restricted(self, keep: Callable[[fx.Node], bool]) -> Consistency:
        """The same with only the consistent nodes that ``keep`` admits too (those with a certificate)."""
        return replace(self, consistent=frozenset(n for n in self.consistent if keep(n)))

    @cached_property
    def longest(self) -> int:
        """The longest sampled length."""
        return max(self.lengths)

    def agrees_on(self, node: fx.Node) -> bool:
        """Whether a value is consistent, or has no sequence axis to be so on."""
        return node in self.consistent or not self.axes[node].rows

    @property
    def outputs_agree(self) -> bool:
        """The same of all outputs."""
        return all(self.agrees_on(o) for o in self.program.outputs if is_tensor(o))

    def forget(self) -> None:
        """Let go of values in double precision; they are made again where they are asked for."""
        self.values.made.clear()
        self.parameters.forget()


class Samples(Mapping[int, Mapping[fx.Node, Any]]):
    """What every node of the twin is on a random sequence, by its length; ``made`` where it was asked for."""

    def __init__(self, program: Program, parameters: MovedValues, lengths: tuple[int, ...]) -> None:
        self.program, self.parameters, self.lengths = program, parameters, lengths
        self.made: dict[int, Mapping[fx.Node, Any]] = {}

    def __getitem__(self, length: int) -> Mapping[fx.Node, Any]:
        if length not in self.lengths:
            raise KeyError(length)
        values = self.made.get(length)  # another thread may forget them meanwhile
        if values is None:
            values = self.made[length] = self._evaluated(length)
        return values

    def _evaluated(self, length: int) -> Mapping[fx.Node, Any]:
        program = self.program
        sequence = random_sequence(program, _batch_of(program), length, seed=self.parameters.seed)
        try:
            with torch.no_grad():
                return program.evaluate(sequence, self.parameters, rewrite=widen_call)
        except Exception as error:
            refusal = Refusal("runtime", f"the traced graph fails at length {length}: {error}")
            raise Unsupported(refusal) from error

    def __iter__(self) -> Iterator[int]:
        return iter(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)


def propose_consistency(program: Program, *, seed: int = 0) -> Consistency:
    """Interpret the twin at several lengths and compare every node with itself on the common prefix.

    Requires: a program. Ensures: nothing is edited. Raises :class:`Unsupported` if the twin does not run.
    """
    found = _interpreted(program, seed, 0.3)
    if found.outputs_agree:
        return found
    # Weights moved that far may make the twin itself ill-conditioned (poles beyond 1); a flaw shows at less.
    closer = _interpreted(program, seed, 0.02)
    return closer if closer.outputs_agree else found


def _interpreted(program: Program, seed: int, share: float) -> Consistency:
    lengths = sample_lengths(program)
    parameters = MovedValues(program, seed=seed, share=share)
    values = Samples(program, parameters, lengths)
    axes = {node: axes_of(program, node) for node in program.graph.nodes if is_tensor(node)}
    consistent = frozenset(
        node for node, where in axes.items() if where.fixed and _is_consistent(node, where, lengths, values)
    )
    return Consistency(program, axes, consistent, lengths, values, parameters)


def _batch_of(program: Program) -> int:
    return program.batch if isinstance(program.batch, int) else _BATCH


def sample_lengths(program: Program) -> tuple[int, ...]:
    """A few awkward admitted lengths that equal no dimension of the model, nor one more or less."""
    taken = {
        size + d
        for value in (*program.values.values(), program.example)
        for size in value.shape
        for d in (-1, 0, 1)
    } - {program.example.shape[1] + d for d in (-1, 0, 1)}
    low = max(program.lengths.minimum, 2)
    admitted = [n for n in range(low, low + 400) if program.lengths.admits(n)]
    free = [n for n in admitted if n not in taken and n >= 7] or admitted
    if len(free) < 2:
        free = admitted
    if not free:
        raise Unsupported(Refusal("lengths", "the model's guards admit no length to analyse"))
    picks = [free[min(i, len(free) - 1)] for i in (0, 5, 11, 16)]
    return tuple(dict.fromkeys(picks))


def axes_of(program: Program, node: fx.Node) -> Axes:
    """Which dimensions of a tensor node have the sequence's length, and which the batch's size."""
    lengths = program.lengths.upto(_CHECKED)
    rows, batch, fixed = [], [], True
    for dim, size in enumerate(node.meta["val"].shape):
        expr = as_expr(size)
        if isinstance(expr, int) or not getattr(expr, "free_symbols", None):
            continue
        if expr == program.batch:
            batch.append(dim)
            continue
        small = program.size_values(expr, lengths, 3)
        large = program.size_values(expr, lengths, 5)
        if np.array_equal(small, lengths) and np.array_equal(large, lengths):
            rows.append(dim)
        elif np.ptp(small) or np.ptp(large):
            fixed = False
    return Axes(tuple(rows), tuple(batch), fixed)


def _is_consistent(
    node: fx.Node, axes: Axes, lengths: tuple[int, ...], values: Mapping[int, Mapping]
) -> bool:
    full = values[max(lengths)][node]
    return all(agrees(values[n][node], narrowed(full, axes.rows, n)) for n in lengths[:-1]) and (
        len(lengths) > 1
    )


def narrowed(value: Tensor, axes: tuple[int, ...], length: int) -> Tensor:
    """The first ``length`` rows of a value along each of its sequence axes."""
    for axis in axes:
        value = value.narrow(axis, 0, length)
    return value


def agrees(
    found: Any,
    expected: Tensor,
    tolerance: float = _TOLERANCE,
    whole: Tensor | None = None,
    apart: Sequence[int] = (),
) -> bool:
    """Equal shapes and dtypes, equal infinities and NaNs, finite parts within tolerance of the scale.

    The scale is that of ``expected``, or of ``whole`` where that is a part of it: a single row may be zero. Along the
    dimensions ``apart``, channels, each index has a scale of its own: a loud one hides no quiet one. Nor do the
    numbers a mask is filled with, which are held to their own size each.
    """
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not (found.is_floating_point() or found.is_complex()):
        return bool(torch.equal(found, expected))
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return False
    if not bool(finite.all()):
        special = ~finite
        if not torch.allclose(found[special], expected[special], equal_nan=True):
            return False
        found, expected = (torch.where(finite, v, 0.0) for v in (found, expected))
    if expected.numel() == 0:
        return True
    most = _most_ordinary(expected if whole is None else whole)
    scale = _scale(expected, apart, most)
    if whole is not None:
        scale = torch.maximum(scale, _scale(whole, apart, most))
    scale = scale.clamp_min(QUIETEST * float(scale.max()))
    size = expected.abs()
    return bool(((found - expected).abs() <= tolerance * torch.where(size <= most, scale, size)).all())


def _scale(value: Tensor, apart: Sequence[int], most: float) -> Tensor:
    """The largest magnitude up to ``most`` of each channel, the other dimensions kept with size 1."""
    together = [d for d in range(value.dim()) if d not in apart]
    size = value.abs()
    size = torch.where(size <= most, size, 0.0)
    return size.amax(together, keepdim=True) if together else size


def _most_ordinary(value: Tensor) -> float:
    """The magnitude beyond which entries are what a mask is filled with, be it scores plus that: LARGE, or less.

    Less where all entries that are not far smaller lie about one large number, and the others are no mere rounding
    of it.
    """
    size = value.abs()
    top = float(size.max()) if size.numel() else 0.0
    if not top <= LARGE:
        size = torch.where(size <= LARGE, size, 0.0)
        top = float(size.max())
    if top < _LEAST_FILL:
        return LARGE
    filled, ordinary = size >= (1 - _FAR) * top, size < _FAR * top
    if not bool((filled | ordinary).all()) or int(filled.sum()) < 2:
        return LARGE
    loudest = float(torch.where(ordinary, size, 0.0).max())
    return _FAR * top if loudest > _ROUNDING * top else LARGE


def explain_inconsistency(analysis: Consistency) -> Refusal:
    """The first inconsistent node on the way to an output, and whether the future or the length moves it."""
    program = analysis.program
    inside: set[fx.Node] = set()
    for node in analysis.consistent:
        inside |= _closure(node, analysis.consistent)
    culprits = [
        node
        for node in program.graph.nodes
        if is_tensor(node)
        and node in program.input_dependent
        and node not in analysis.consistent
        and node not in inside
        and len(analysis.axes[node].rows) <= 1
    ]
    culprit = next((n for n in culprits if analysis.axes[n].rows), culprits[0] if culprits else None)
    if culprit is None:
        return Refusal("length_dependent", "an output changes with the length of the sequence")
    if _sees_future(analysis, culprit):
        if not _sees_future(analysis, culprit, own_only=True):
            return Refusal(
                "mixes_rows",
                f"{culprit.name!r} mixes rows of the batch: a row's values change with later positions of other rows",
                (culprit.name,),
                source_of(culprit),
                "decode one row, or route, count and normalise within each row",
            )
        return Refusal(
            "non_causal",
            f"{culprit.name!r} sees the future: changing later positions changes earlier values",
            (culprit.name,),
            source_of(culprit),
            "check for wraparound (transform length ≥ filter + sequence − 1), masks, flips and padding side",
        )
    return Refusal(
        "length_dependent",
        f"{culprit.name!r} depends on the length of the sequence, not only on the positions so far",
        (culprit.name,),
        source_of(culprit),
        "compute filters, positions and scales for a fixed maximum length and cut them, not from x.shape[1]",
    )


def _closure(node: fx.Node, consistent: frozenset[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current in consistent or current in found or is_integer(current):
            continue
        found.add(current)
        stack.extend(current.all_input_nodes)
    return found


def _sees_future(analysis: Consistency, node: fx.Node, own_only: bool = False) -> bool:
    """Whether another future, at the same length, changes a value's earlier rows.

    ``own_only``: another future of the first row of the batch alone, as seen by that row.
    """
    program, n = analysis.program, analysis.longest
    rows, batch = analysis.axes[node].rows, analysis.axes[node].batch
    sequence = random_sequence(program, _batch_of(program), n, seed=0)
    other = random_sequence(program, _batch_of(program), n, seed=1)
    cut = n // 2
    mixed = torch.cat([sequence[:, :cut], other[:, cut:]], dim=1)
    if own_only:
        mixed[1:] = sequence[1:]
    with torch.no_grad():
        changed = program.evaluate(mixed, analysis.parameters, keep=[node], rewrite=widen_call)[node]
    before = narrowed(analysis.values[n][node], rows, cut)
    changed = narrowed(changed, rows, cut)
    if own_only and len(batch) == 1:
        before, changed = before.narrow(batch[0], 0, 1), changed.narrow(batch[0], 0, 1)
    return not agrees(changed, before, 1e-9)
