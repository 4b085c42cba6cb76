"""How far something holds: tables that end, a certificate that holds up to some length only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .errors import CapacityError, Refusal
from .program import Program


def furthest(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The greatest length from ``low`` on, below ``high``, at which what holds at a length and all before it holds.

    Requires: it does not hold at ``high``. None where it does not hold at ``low`` either.
    """
    if low >= high or not holds(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def certified_reach(program: Program, capacity: int, certified: Callable[[int], bool]) -> int | None:
    """The most positions, fewer than ``capacity``, a certificate covers; None where not even the example's are."""
    start = program.lengths.at_least(program.example.shape[1])
    reach = None if start is None else furthest(certified, start, capacity)
    return None if reach is None else int(program.lengths.upto(reach)[-1])


def check_limit(wanted: int | None, *ends: int | None) -> None:
    """Raise :class:`CapacityError` for a model that can be decoded, but not as far as was asked for."""
    most = min((n for n in ends if n is not None), default=None)
    if wanted is not None and most is not None and wanted > most:
        raise CapacityError(
            f"max_length={wanted} exceeds {most}, the longest sequence the model's tables and guards admit"
        )


def exact_up_to(refusal: Refusal, reach: int | None) -> Refusal:
    """The refusal, with the length up to which it does not stand in its hint."""
    if reach is None:
        return refusal
    hint = f"or ask for no more than it is exact for: max_length={reach}"
    return replace(refusal, hint="; ".join(filter(None, (refusal.hint, hint))))
