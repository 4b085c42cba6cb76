"""Index arithmetic: tensors whose value is affine in their indices, and what their comparisons decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fi_compile.facts import Affine, Fact, Quantity, Triangle, constant, is_number, same, tidy

Bounds = tuple[Any, Any]


def moved(affine: Affine, dim: int, start: Quantity) -> Affine | None:
    """The same values after ``[start:]`` along ``dim``."""
    return Affine(affine.coefficients, add(affine.offset, np.multiply(start, affine.coefficients[dim])))


def add(a: Any, b: Any) -> Any:
    """Sum of offsets."""
    total = np.add(a, b)
    if np.asarray(total).ndim == 0:
        return total.item() if hasattr(total, "item") else total
    return tidy(total) if total.dtype != np.float64 else total


def aligned(fact: Fact, rank: int) -> Affine | None:
    """A fact's affine form over ``rank`` dimensions, aligned at the right; a number is affine too."""
    if fact.affine is not None:
        missing = rank - len(fact.affine.coefficients)
        return Affine((0,) * missing + fact.affine.coefficients, fact.affine.offset)
    if is_number(fact.fill):
        return Affine((0,) * rank, fact.fill)
    return None


def combine(a: Affine, b: Affine, factor: float = 1) -> Affine:
    """``a + factor * b``."""
    coefficients = tuple(x + factor * y for x, y in zip(a.coefficients, b.coefficients, strict=True))
    return Affine(coefficients, add(a.offset, np.multiply(factor, b.offset)))


def scaled(a: Affine, factor: float) -> Affine:
    """``factor * a``."""
    return Affine(tuple(factor * x for x in a.coefficients), add(np.multiply(factor, a.offset), 0))


def bounds(affine: Affine, sizes: Sequence[Quantity], region: tuple[int, int, str] | None = None) -> Bounds:
    """Least and greatest value at every length; ``region`` (query, key, "above" | "below" | "diagonal")."""
    low: Any = affine.offset
    high: Any = affine.offset
    terms = []
    coefficients = list(affine.coefficients)
    if region is not None:
        q, k, where = region
        a, b = coefficients[q], coefficients[k]
        coefficients[q] = coefficients[k] = 0
        # above: key = query + 1 + m; below (and on): query = key + m; diagonal: query = key
        top = np.minimum(sizes[q], sizes[k]) - 1
        if where == "above":
            span = np.subtract(sizes[k], 2)
            low, high = add(low, b), add(high, b)
            terms += [
                (a + b, np.maximum(np.minimum(np.subtract(sizes[q], 1), span), 0)),
                (b, np.maximum(span, 0)),
            ]
        elif where == "below":
            terms += [(a + b, np.maximum(top, 0)), (a, np.maximum(np.subtract(sizes[q], 1), 0))]
        else:
            terms += [(a + b, np.maximum(top, 0))]
    terms += [(c, np.subtract(size, 1)) for c, size in zip(coefficients, sizes, strict=True) if c]
    for c, span in terms:
        reach = np.multiply(c, span)
        low, high = add(low, np.minimum(0, reach)), add(high, np.maximum(0, reach))
    return low, high


def holds(low: Any, high: Any, dtype: torch.dtype) -> bool:
    """Whether a type holds every whole number between two bounds."""
    if dtype == torch.bool or dtype.is_complex:
        return False
    if dtype.is_floating_point:
        least, most = -2.0 / torch.finfo(dtype).eps, 2.0 / torch.finfo(dtype).eps
    else:
        least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    # A 64-bit sum that wrapped around here would hide itself: numbers are compared as floats.
    return bool(np.all(np.asarray(low, dtype=np.float64) >= least)) and bool(
        np.all(np.asarray(high, dtype=np.float64) < most)
    )


def exact(affine: Affine, sizes: Sequence[Quantity], dtype: torch.dtype) -> bool:
    """Whether every value is held without rounding: whole numbers of a small enough unit."""
    values = [np.asarray(v, dtype=np.float64) for v in (*affine.coefficients, affine.offset)]
    for unit in (0, 1, 2, 4, 8, 16, 32) if dtype.is_floating_point else (0,):
        if all(bool((np.ldexp(v, unit) == np.rint(np.ldexp(v, unit))).all()) for v in values):
            scale = 2.0**unit
            form = Affine(tuple(scale * x for x in affine.coefficients), np.multiply(scale, affine.offset))
            return holds(*bounds(form, sizes), dtype)
    return False


# A comparison of d = a - b with 0, decided by the bounds of d: True, False or None (undecided).
DECIDE: dict[str, Callable[[Any, Any], bool | None]] = {
    "lt": lambda lo, hi: True if np.all(hi < 0) else False if np.all(lo >= 0) else None,
    "le": lambda lo, hi: True if np.all(hi <= 0) else False if np.all(lo > 0) else None,
    "gt": lambda lo, hi: True if np.all(lo > 0) else False if np.all(hi <= 0) else None,
    "ge": lambda lo, hi: True if np.all(lo >= 0) else False if np.all(hi < 0) else None,
    "eq": lambda lo, hi: (
        True if np.all((lo == 0) & (hi == 0)) else False if np.all((hi < 0) | (lo > 0)) else None
    ),
    "ne": lambda lo, hi: (
        False if np.all((lo == 0) & (hi == 0)) else True if np.all((hi < 0) | (lo > 0)) else None
    ),
}


def compared(name: str, difference: Affine, sizes: Sequence[Quantity]) -> tuple[Triangle, ...]:
    """What ``difference <name> 0`` is above the diagonal of pairs of dimensions.

    Of such of one size, of such that follow s, and of positions beside places in a table or buffer.
    """
    found = []
    for q in range(len(sizes)):
        for k in range(len(sizes)):
            alike = not same(sizes[k], 1) if not constant(sizes[q]) else same(sizes[q], sizes[k])
            if q == k or not alike or same(sizes[q], 1):
                continue
            above = DECIDE[name](*bounds(difference, sizes, (q, k, "above")))
            if above is not None:
                diagonal = DECIDE[name](*bounds(difference, sizes, (q, k, "diagonal")))
                found.append(Triangle(q, k, above, diagonal))
    return tuple(found)
