"""What mixing takes on a GPU by its datasheet: the prediction that tilings are chosen by where Triton runs them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from .costs import piece_elements
from .kernels.block_step import block_step_traffic
from .kernels.gpu import H100, Rates
from .kernels.tile_forms import LAUNCH, fastest, launches, traffic
from .schedule import Schedule


@dataclass(frozen=True)
class GpuCosts:
    """Tiles by the forms of `kernels.tile_forms` on a device, in the time that `rates` and launches promise.

    fan: how many inputs a channel reads on average.
    """

    dtype: torch.dtype
    device: torch.device
    rates: Rates = H100
    fan: float = 1

    def seconds_per_token(self, schedule: Schedule, channels: int, rows: int) -> float:
        """All mixing of `channels` (pairs) of one row, a step summing `rows` rows, over a whole schedule."""
        tokens = max(1, schedule.capacity - schedule.origin)
        inputs, total = schedule.count_inputs(), 0.0
        for side, count in schedule.count_tiles().items():
            total += count * self._tile_seconds(schedule, side, inputs[side] / side / count, channels)
        # Of the rows of the buffers a step sums those before its own: half of a block, and all of the one before.
        step = block_step_traffic((rows - 1) / 2 + schedule.overlap / 2)
        # An input goes to the history, and what is pending comes from there.
        moved = step["reads"] + step["writes"] + 4 * 4.0
        return total / tokens + channels * moved / self.rates.bandwidth + LAUNCH

    def _tile_seconds(self, schedule: Schedule, side: int, blocks: float, channels: int) -> float:
        kept = schedule.radix > 2 or schedule.deferred or self.fan > 1
        form = fastest(self.rates, side, side, self.dtype, self.device, kept, self.fan)
        channels = ceil(channels / self.fan)
        seconds = channels * self.rates.seconds(**traffic(form, side, side, blocks * self.fan, kept))
        pieces = 1
        if schedule.deferred:
            pieces = ceil(channels * 2 * side / piece_elements(schedule, channels))
        return seconds + LAUNCH * max(pieces, launches(form, side, channels, kept))
