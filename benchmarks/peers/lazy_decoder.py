"""The lazy decoder end to end: flashinf's own step, with every long convolution summed over its whole history.

It differs from flashinf's decoder in the mixing alone. At each position the history of all layers is read in one
launch, with the kernel of `lazy`, before the step asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fi_compile
from benchmarks.decoding import lane_of, state_of
from fi_compile.mixers.stack import ConvState

from .native import sums

BLOCK = 4


class LazyState:
    """Stands in for a stack's state: at every position the sums pending there are read off the history.

    The step itself sums what the newest inputs contribute, those of its base block: a few, see BLOCK.
    """

    def __init__(self, state: ConvState, filters: Tensor) -> None:
        """filters [C, L]: those of the model, possibly of more lags than the decoder's capacity."""
        self.state, self.position = state, state.position
        self.reversed = filters.flip(-1)
        self.history = filters.new_zeros(filters.shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    @property
    def local(self) -> int:
        """The position's row in the block's buffers."""
        return self.position % BLOCK

    def advance(self) -> None:
        """Store the newest inputs, and sum what all of them contribute to the next position."""
        t, self.position = self.position, self.position + 1
        self.history[:, t] = self.state.block_inputs[t % BLOCK, 0]
        self.state.block_pending[self.local, 0] = self.sum(self.position)

    def sum(self, t: int) -> Tensor:
        """What inputs before the block of position t contribute to it: [C]."""
        past = t - t % BLOCK
        return sums(self.history[:, :past], self.reversed[:, self.reversed.shape[1] - 1 - t :])[:, 0]


def make_lazy(decoder: fi_compile.Decoder, filters: Tensor | None = None) -> LazyState:
    """Make a decoder with `block=BLOCK`, one sequence at position 0, lazy; `filters` [C, L] to go beyond its own."""
    lane: Any = lane_of(decoder)
    assert lane.position == 0
    state = LazyState(lane.conv, filters_of(decoder) if filters is None else filters)
    assert (lane.conv.bank.block, lane.batch) == (BLOCK, 1)
    lane.conv = state
    return state


def filters_of(decoder: fi_compile.Decoder) -> Tensor:
    """The long filters of all layers, [C, capacity]."""
    return state_of(decoder).bank.filters


def random_past(state: LazyState) -> None:
    """Fill the history, to time positions far on."""
    state.history.copy_(torch.randn(state.history.shape))
