"""What all ways to compute a long convolution position by position have in common.

`z[t] = sum over i <= t of y[i] · rho[t - i]` for C channels, where `z[t]` is wanted before `y[t + 1]` exists.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A part of the work of a whole sequence that is done ``count`` times, timed at one place.

    It computes what ``inputs`` contribute to ``outputs``, for pairs with input <= output: ``run()`` returns these sums,
    [C, len(outputs)], or adds them to ``adds_to``. Without pairs it moves data.
    """

    what: str
    count: float
    inputs: range
    outputs: range
    run: Callable[[], object]
    adds_to: Tensor | None = None

    @property
    def pairs(self) -> int:
        """How many pairs of an input and an output one run meets."""
        first, stop = self.inputs.start, self.inputs.stop
        return sum(max(0, min(stop, j + 1) - first) for j in self.outputs)


class Peer:
    """One way to do it, on filters [C, L] and a history [C, L] which it fills as inputs come.

    ``push`` is the algorithm itself, from position 0 to L - 1. ``pieces`` are the same kernels at chosen places of a
    long sequence, on a history that is full, and how often each is run: their pairs add up to all L (L + 1) / 2.
    """

    name: str
    sampled = "pieces timed at sampled positions, times their counts"

    def __init__(self, filters: Tensor, history: Tensor) -> None:
        self.filters, self.history, self.position = filters, history, 0

    @property
    def length(self) -> int:
        """The number of positions, L."""
        return self.filters.shape[1]

    def push(self, y: Tensor) -> Tensor:
        """The next input [C]; returns the output there, [C]."""
        raise NotImplementedError

    def pieces(self) -> list[Piece]:
        """All the work of L positions."""
        raise NotImplementedError


def quadrature(points: Iterable[int]) -> list[tuple[int, float]]:
    """Weights with which values at some positions give their sum over all, the first to the last one.

    Linear in between: exact for what is linear in the position.
    """
    places = sorted(set(points))
    weights = dict.fromkeys(places, 0.0)
    for a, b in itertools.pairwise(places):
        weights[a] += (b - a + 1) / 2
        weights[b] += (b - a - 1) / 2
    weights[places[-1]] += 1
    return list(weights.items())


def spread(length: int) -> list[int]:
    """Positions of a sequence at which costs are sampled: closer where the caches still matter."""
    return [0, *(length // d for d in (256, 64, 16, 8, 4, 2)), 3 * length // 4, length - 1]
