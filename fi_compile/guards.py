"""The lengths a trace is good for: its guards, evaluated at every length up to a horizon."""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy

from .errors import Refusal, Unsupported
from .program import Lengths
from .symbolic import evaluate_at

# Guards are evaluated up to here to learn which lengths they admit; far beyond any capacity in use.
_HORIZON = 1 << 21
_FIRST_HORIZON = 1 << 12
_MOST_HOLES = 64
_LONGEST_PERIOD = 1024
_IRREGULAR = 512  # short lengths that need not follow the period


def admitted_lengths(
    guards: list[sympy.Basic],
    length: sympy.Symbol,
    batch: sympy.Symbol | int,
    ranges: Any,
) -> Lengths:
    """Evaluate the guards at every length up to a horizon and read off range, holes and period.

    Raises :class:`Unsupported` when the admitted lengths are too sparse to decode through.
    """
    _admitted_upto(_FIRST_HORIZON, guards, length, batch, ranges)  # sparse ones show here already
    found = _admitted_upto(_HORIZON, guards, length, batch, ranges)
    if found is None:
        raise Unsupported(Refusal("lengths", "the model's guards admit no length at all"))
    return found


def _admitted_upto(
    horizon: int, guards: list[sympy.Basic], length: sympy.Symbol, batch: sympy.Symbol | int, ranges: Any
) -> Lengths | None:
    every = np.arange(2, horizon + 1, dtype=np.int64)
    ok = np.ones(every.shape, dtype=bool)
    if ranges.upper < horizon:
        ok &= every <= int(ranges.upper)
    layout = np.ones(every.shape, dtype=bool)  # inequalities exclude single lengths: holes
    for guard in guards:
        if length in guard.free_symbols:
            holds = evaluate_at(guard, {length: every, batch: 3}, every.shape).astype(bool)
            if isinstance(guard, sympy.Ne):
                layout &= holds
            else:
                ok &= holds
    admitted = every[ok]
    if admitted.size == 0:
        return None
    first, last = int(admitted[0]), int(admitted[-1])
    inside = (every >= first) & (every <= last)
    lengths, missing = every[inside], ~(ok & layout)[inside]
    maximum = None if last == horizon else last
    period, left_out = 1, np.zeros(0, dtype=np.int64)
    if missing.sum() > _MOST_HOLES:
        period = _period(missing)
        left_out = np.unique(lengths[missing][-_LONGEST_PERIOD:] % max(period, 1))
    holes = lengths[missing & ~np.isin(lengths % max(period, 1), left_out)]
    if period == 0 or left_out.size == period > 1 or holes.size > _MOST_HOLES:
        text = next((str(g) for g in guards if length in g.free_symbols), "")
        raise Unsupported(
            Refusal(
                "lengths",
                f"the model's control flow admits only some lengths ({admitted.size} of {last}; {text})",
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


def _period(missing: np.ndarray) -> int:
    """The least period of the pattern of missing lengths, or 0 where there is none."""
    tail = missing[min(_IRREGULAR, missing.size // 4) :]
    for period in range(2, min(_LONGEST_PERIOD, tail.size // 2) + 1):
        if bool((tail[period:] == tail[:-period]).all()):
            return period
    return 0
