"""flashinf's own mixing: the stack of channels, its schedule and tiles, and the sum inside the base block."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.compiled import bound
from fi_compile.costs import choose_tiling
from fi_compile.kernels.block import block_step
from fi_compile.mixers.stack import ConvState, FilterBank
from fi_compile.mixers.tiles import choose_kernels
from fi_compile.rates import rates_of_machine

from .base import Peer


def _step(pending: Tensor, inputs: Tensor, table: Tensor, skip: Tensor, local: Tensor, y: Tensor) -> Tensor:
    z = block_step(pending, inputs, table, local) + skip * y
    inputs.index_copy_(0, local, y.unsqueeze(0))
    local.add_(1)
    return z


class Flashinf(Peer):
    """The real state machine: what a decoder's lane does around its step, for every position."""

    name = "flashinf"

    def __init__(self, filters: Tensor) -> None:
        """The history is the state's own."""
        channels, length = filters.shape
        kernels = choose_kernels("auto", filters.device)  # what a decoder would choose, as all here
        self.tiling = choose_tiling(rates_of_machine(kernels == "native"), length, channels)
        self.bank = FilterBank(
            filters, channels_in=channels, block=self.tiling.block, radix=self.tiling.radix, kernels=kernels
        )
        self.state = ConvState(self.bank, 1)
        self.filters = self.bank.filters
        self.local = torch.zeros(1, dtype=torch.int64)
        self.y = filters.new_zeros(1, channels)
        state, bank, y = self.state, self.bank, self.y
        self._run = bound(
            _step, state.block_pending, state.block_inputs, bank.block_table, bank.skip, self.local, y
        )

    def push(self, y: Tensor) -> Tensor:
        return self.step(y.unsqueeze(0))[0]

    def step(self, y: Tensor) -> Tensor:
        """Inputs and outputs of a position as a step has them, [1, C]."""
        self.y.copy_(y)
        z = self._run()
        self.state.advance()
        if not self.state.local:
            self.local.zero_()
        return z

    def restart(self) -> None:
        """Back to position 0."""
        self.state.restart(0)
        self.local.zero_()

    def run_tiles(self) -> None:
        """All positions without the sums inside blocks: tiles, and moving blocks between them."""
        for _ in range(self.length):
            self.state.advance()
