"""Ways to read the inputs of a unit: cheapest first, without those that cannot suffice."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fi_compile.units import ALL, Demand

Price = tuple[int, ...]
_MOST_TRIED = 256  # more inputs that may all be read either way: all rows will do


def order_reads(
    choices: Sequence[Sequence[Demand]], prices: Sequence[Sequence[Price]]
) -> Iterator[tuple[Demand, ...]]:
    """One demand of each input, by the sum of their prices; equal sums in the order of the choices.

    ``prices[i][j]`` belongs to ``choices[i][j]``. Lazy: there are as many assignments as the product of the numbers
    of choices. After so many the dearest one of all is the last.
    """
    if not all(choices):
        return
    ranks = [sorted(range(len(p)), key=lambda j, p=p: (p[j], j)) for p in prices]

    def entry(places: tuple[int, ...]) -> tuple[Price, tuple[int, ...], tuple[int, ...]]:
        picked = tuple(rank[place] for rank, place in zip(ranks, places, strict=True))
        total = tuple(map(sum, zip(*(p[j] for p, j in zip(prices, picked, strict=True)), strict=True)))
        return total, picked, places

    first, last = (0,) * len(choices), tuple(len(c) - 1 for c in choices)
    queue, seen = [entry(first)], {first}
    for _ in range(_MOST_TRIED):
        if not queue:
            return
        _, picked, places = heapq.heappop(queue)
        yield tuple(c[j] for c, j in zip(choices, picked, strict=True))
        for i, place in enumerate(places):
            after = (*places[:i], place + 1, *places[i + 1 :])
            if place + 1 < len(choices[i]) and after not in seen:
                seen.add(after)
                heapq.heappush(queue, entry(after))
    if queue:
        yield tuple(c[rank[place]] for c, rank, place in zip(choices, ranks, last, strict=True))


def other_rows_count(
    run: Callable[[Mapping[fx.Node, Any]], Tensor | None],
    values: Mapping[fx.Node, Any],
    axes: Mapping[fx.Node, Sequence[int]],
    changed: Callable[[Tensor], bool],
    row: int,
) -> dict[fx.Node, tuple[bool, ...]]:
    """For each value and each of its sequence axes: whether rows before ``row`` move what ``run`` returns.

    ``run(values)`` is None where it fails. They are replaced by one another, a little smaller, so that what may be
    divided by stays so. No is no proof; yes means that the newest row alone cannot do.
    """
    found: dict[fx.Node, tuple[bool, ...]] = {}
    for node, value in values.items():
        moved = []
        for axis in axes.get(node, ()):
            result = run({**values, node: _rotated(value, axis, row)})
            moved.append(result is not None and bool(torch.isfinite(result).all()) and changed(result))
        found[node] = tuple(moved)
    return found


def _rotated(value: Tensor, axis: int, row: int) -> Tensor:
    before = value.narrow(axis, 0, row).roll(1, axis)
    if value.is_floating_point() or value.is_complex():
        before = before * 0.9
    return torch.cat([before, value.narrow(axis, row, value.shape[axis] - row)], axis)


def sufficient(choices: Sequence[Demand], counts: Sequence[bool]) -> list[Demand]:
    """The demands that read all rows along every axis on which other rows count."""
    return [d for d in choices if all(kind == ALL for kind, c in zip(d, counts, strict=True) if c)]
