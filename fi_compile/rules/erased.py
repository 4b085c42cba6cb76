"""Rows that an operator does not show: a rotated sequence whose wrapped rows a mask erases is a shifted one.

A mask that is certified row by row is the same at every length, so its value at the longest says which rows those are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from torch import Tensor, fx

from fi_compile.facts import Axis, Fact, by_batch, clip, most, unwrapped

from .call import Call

Hides = Callable[[Tensor], Tensor]


def as_shown(c: Call, node: fx.Node, masks: Iterable[tuple[fx.Node, Hides]]) -> Fact:
    """What is known of an operand, where rows need not be shown which a mask hides: ``hides(its value)``.

    Cyclic axes become plain ones if all that wraps around lies in the leading rows that are hidden.
    """
    fact = c.fact(node)
    if not any(_wraps(a) for dim in fact.dims for a in dim):
        return fact
    dims = list(fact.dims)
    for mask, hides in masks:
        for d, dim in enumerate(dims):
            if len(dim) == 1 and _wraps(dim[0]):
                first = _first_shown(c, mask, hides, len(dims) - d)
                free = unwrapped(dim[0], first, dim[0].size) if first else None
                if free is not None:
                    dims[d] = (clip(replace(free, lo=most(free.lo, first))),)
    return replace(fact, dims=tuple(dims))


def _wraps(axis: Axis) -> bool:
    return axis.period is not None and not axis.freq


def _first_shown(c: Call, mask: fx.Node, hides: Hides, place: int) -> int:
    """How many leading rows along a dimension, counted from the last, a mask hides at every length."""
    fact = c.fact(mask)
    d = len(fact.dims) - place
    if (
        d < 0
        or c.context.is_data(mask)
        or fact.scaled
        or fact.junk
        or not all(len(dim) == 1 and (dim[0].fixed or dim[0].prefix) for dim in fact.dims)
        or any(by_batch(dim[0].size) for dim in fact.dims)
        or np.max(fact.dims[d][0].size) == 1
    ):
        return 0
    value = c.context.table(mask)
    if value is None:
        return 0
    shown = (~hides(value)).movedim(d, 0).reshape(value.shape[d], -1).any(1)
    return int(shown.nonzero()[0]) if bool(shown.any()) else len(shown)
