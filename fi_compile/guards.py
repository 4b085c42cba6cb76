"""The lengths a trace is good for: its guards, evaluated at every length up to a horizon; and the batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import sympy
from torch import fx

from .errors import Refusal, Unsupported
from .program import Lengths, is_tensor, sizes
from .symbolic import evaluate_at

# Guards are evaluated up to here to learn which lengths they admit; far beyond any capacity in use.
HORIZON = 1 << 21
_FIRST_HORIZON = 1 << 12
_PIECE = 1 << 15  # lengths a guard is evaluated at at once: they stay in the cache
_MOST_HOLES = 64
_LONGEST_PERIOD = 1024
_IRREGULAR = 512  # short lengths that need not follow the period
# Batches up to here are tried, those beside lengths at fewer of both.
_MOST_ROWS, _FEW_ROWS, _FEW_LENGTHS = 1 << 16, 64, 1024


def admitted_lengths(
    guards: Sequence[sympy.Basic],
    length: sympy.Symbol,
    batch: sympy.Symbol | int,
    ranges: Any,
) -> Lengths:
    """Evaluate the guards at every length up to a horizon and read off range, holes and period.

    Raises :class:`Unsupported` when the admitted lengths are too sparse to decode through.
    """
    # Sparse ones show here already.
    lengths_of(*_admitted_upto(_FIRST_HORIZON, guards, length, batch, ranges), guards)
    found = lengths_of(*_admitted_upto(HORIZON, guards, length, batch, ranges), guards)
    if found is None:
        raise Unsupported(Refusal("lengths", "the model's guards admit no length at all"))
    return found


def from_whole_sizes(lengths: Lengths, nodes: Iterable[fx.Node], length: sympy.Symbol, batch: Any) -> Lengths:
    """Between where no size is negative: ``x[:, :-4]`` of 3 positions is empty, whatever a trace without guards says.

    And ``zeros(64 - s)`` has no more than 64.
    """
    some = lengths.upto(lengths.minimum + _IRREGULAR)
    exprs = {s for n in nodes if is_tensor(n) for s in sizes(n) if length in getattr(s, "free_symbols", ())}
    whole = np.ones(some.shape, dtype=bool)
    for expr in exprs:
        whole &= evaluate_at(expr, {length: some, batch: 3}, some.shape) >= 0
    if whole.all():
        return lengths
    if not whole.any():
        return replace(lengths, minimum=int(some[-1]) + 1)
    last = int(some[whole][-1])
    maximum = lengths.maximum if whole[-1] else last
    before = some[~whole & (some < last)]
    minimum = int(before[-1]) + 1 if before.size else lengths.minimum
    return replace(lengths, minimum=minimum, maximum=maximum)


def _admitted_upto(
    horizon: int, guards: Sequence[sympy.Basic], length: sympy.Symbol, batch: sympy.Symbol | int, ranges: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Bool [horizon + 1], by length: what all guards admit, and what all but inequalities do."""
    every = np.arange(horizon + 1, dtype=np.int64)
    ok = every >= 2
    if ranges.upper < horizon:
        ok &= every <= int(ranges.upper)
    layout = np.ones(every.shape, dtype=bool)  # inequalities exclude single lengths: holes
    for guard in dict.fromkeys(guards):
        if batch in guard.free_symbols and isinstance(guard, sympy.Ne):
            continue  # one number of rows at one length: see `rows_left_out`
        if length in guard.free_symbols:
            admitted = layout if isinstance(guard, sympy.Ne) else ok
            for start in range(2, horizon + 1, _PIECE):
                part = slice(start, start + _PIECE)
                admitted[part] &= evaluate_at(
                    guard, {length: every[part], batch: 3}, every[part].shape
                ).astype(bool)
    return ok & layout, ok


def lengths_of(
    admitted: np.ndarray, spanned: np.ndarray, guards: Sequence[sympy.Basic] = ()
) -> Lengths | None:
    """Range, holes and period of admitted lengths, bool [n + 1]; None where there are none.

    ``spanned``: those between whose first and last the range lies; up to n admitted stands for without end. Raises
    :class:`Unsupported` when the admitted lengths are too sparse to decode through.
    """
    horizon = admitted.size - 1
    every = spanned.nonzero()[0]
    if not every.size:
        return None
    first, last = int(every[0]), int(every[-1])
    missing, lengths = ~admitted[first : last + 1], np.arange(first, last + 1)
    maximum = None if last == horizon else last
    period, left_out = 1, np.zeros(0, dtype=np.int64)
    if missing.sum() > _MOST_HOLES:
        period, regular = _period(missing[_irregular(missing) :]), lengths >= first + _irregular(missing)
        left_out = np.unique(lengths[missing & regular][-_LONGEST_PERIOD:] % max(period, 1))
    holes = lengths[missing & ~np.isin(lengths % max(period, 1), left_out)]
    if period == 0 or left_out.size == period > 1 or holes.size > _MOST_HOLES:
        text = "; ".join(map(str, guards[:3]))
        raise Unsupported(
            Refusal(
                "lengths",
                f"the model's control flow admits only some lengths ({every.size} of {last}; {text})",
                hint="avoid branches on the sequence length; pad transforms to 2 * length",
            )
        )
    return Lengths(
        first,
        maximum,
        frozenset(int(h) for h in holes),
        period=period,
        left_out=frozenset(map(int, left_out)),
    )


def _irregular(missing: np.ndarray) -> int:
    """How many of the shortest lengths need not follow the period."""
    return min(_IRREGULAR, missing.size // 4)


def _period(tail: np.ndarray) -> int:
    """The least period of the pattern of missing lengths, or 0 where there is none."""
    for period in range(2, min(_LONGEST_PERIOD, tail.size // 2) + 1):
        if bool((tail[period:] == tail[:-period]).all()):
            return period
    return 0


def rows_left_out(
    guards: Sequence[sympy.Basic], length: sympy.Symbol, batch: sympy.Symbol, ranges: Any, lengths: Lengths
) -> list[tuple[int, int]] | None:
    """Numbers of rows, from 2 on, that guards exclude at one length each: pairs of both; None where they exclude more.

    Torch compares sizes of both with each other where it chooses a layout, and notes that they differed.
    """
    if int(ranges.lower) > 2 or ranges.upper < _MOST_ROWS:
        return None
    rows = np.arange(2, _MOST_ROWS + 1, dtype=np.int64)
    few, some = rows[:_FEW_ROWS, None], lengths.upto(lengths.minimum + _FEW_LENGTHS)[None, :]
    met = np.zeros(np.broadcast_shapes(few.shape, some.shape), dtype=bool)
    for guard in guards:
        if batch not in guard.free_symbols:
            continue
        alone = length not in guard.free_symbols
        at = {batch: rows} if alone else {batch: few, length: some}
        holds = evaluate_at(guard, at, rows.shape if alone else met.shape).astype(bool)
        if not holds.all() and (alone or not isinstance(guard, sympy.Ne)):
            return None
        if not alone:
            met |= ~holds
    if (met.sum(1) > 1).any() or (met.sum(0) > 1).any():
        return None
    return [(int(few[i, 0]), int(some[0, j])) for i, j in np.argwhere(met)]
