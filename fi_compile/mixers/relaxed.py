"""Increment of a convolution of two sequences that both still grow: relaxed multiplication.

Outputs ``z[t] = Σ_{i≤t} a[i]·b[t-i]`` are wanted while a and b are made from earlier outputs. In blocks of K positions
the step itself meets the pairs of which one is in its own block and the other in the first. All other pairs are met by
two tiles after every block (Flash Inference, arXiv 2410.12982, on data-dependent filters; van der Hoeven, Relax, but
don't be too lazy, 2002): with n positions done, U the largest K·2^q that divides n and A = n - U, the outputs
n … n+U-1 take

    a[A:n] ∗ b[0:2U]  +  b[A:n] ∗ a[0:2U]        (A = 0:  a[0:U] ∗ b[0:U])

so O(L log² L) for a sequence of L. Later outputs depend on no other tile, which makes going back or starting in the
middle a matter of the few tiles whose outputs reach beyond the position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 32


@dataclass(frozen=True)
class RelaxedProduct:
    """State and step of ``channels`` products over ``capacity`` positions, in blocks of ``block``.

    The ring [capacity, B, 3·C] holds a, b, and what finished tiles have added to the output, of every position.
    """

    channels: int
    capacity: int
    block: int = BLOCK

    needs = ("scale",)

    @property
    def reads(self) -> int:
        """How many earlier positions a step and its tiles read."""
        return self.capacity

    @property
    def rows(self) -> int:
        """Rows of the ring."""
        return self.capacity

    def weights(self, found: Any, source: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """The factor of each channel, [C], and the channels of the inputs that make a and b, int64 [2·C]."""
        assert source is not None
        return {"scale": found.to(dtype), "source": source}

    def ring(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """The state of no positions: zeros."""
        return weights["scale"].new_zeros(self.capacity, batch, 3 * self.channels)

    def step(self, ring: Tensor, position: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The newest output [B, C] from the inputs x [B, Cin] at ``position``; writes a and b into the ring."""
        x = x.index_select(1, weights["source"])
        within = torch.arange(self.block, device=ring.device)
        local = position % self.block
        pending = ring.index_select(0, position)[..., 2 * self.channels :]
        new = torch.cat([x.to(ring.dtype).unsqueeze(0), pending], -1)
        ring.index_copy_(0, position, new)
        last = self.capacity - 1
        block = ring.index_select(0, (position - local + within).clamp(max=last))
        first = ring.index_select(0, (local - within).clamp(min=0, max=last))
        met = (within <= local).view(-1, 1, 1)
        (a, b), (first_a, first_b) = (self._both(rows) for rows in (block, first))
        zero = a.new_zeros(())
        sums = torch.where(met, a * first_b, zero).sum(0)
        mirrored = torch.where(met & (position >= self.block), b * first_a, zero).sum(0)
        return (pending[0] + sums + mirrored) * weights["scale"]

    def _both(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[..., : self.channels], rows[..., self.channels : 2 * self.channels]

    def advance(self, ring: Tensor, position: int) -> None:
        """Run the tiles due when ``position`` positions are done."""
        if position % self.block == 0 and 0 < position < self.capacity:
            self._add_tiles(ring, position, position)

    def fill(self, ring: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take over the inputs x [B, Cin, P] of positions 0 … P-1."""
        ring.zero_()
        length = x.shape[-1]
        ring[:length, :, : 2 * self.channels] = x.index_select(1, weights["source"]).permute(2, 0, 1)
        self.restart(ring, length)

    def restart(self, ring: Tensor, position: int) -> None:
        """Make the ring that of ``position`` positions, whose a and b it holds."""
        start = position - position % self.block
        ring[position:] = 0
        ring[start:, :, 2 * self.channels :] = 0
        for done in _ends(start, self.block):
            self._add_tiles(ring, done, start)

    def _add_tiles(self, ring: Tensor, done: int, start: int) -> None:
        """Add what the tiles due at ``done`` positions contribute to outputs from ``start`` on."""
        side = _side(done, self.block)
        stop = min(done + side, self.capacity)
        if start >= stop:
            return
        newest = self._spectra(ring[done - side : done], side)
        if done == side:
            product = newest[0] * newest[1]
        else:
            early = self._spectra(ring[: 2 * side], side)
            product = newest[0] * early[1] + newest[1] * early[0]
        found = torch.fft.irfft(product, n=2 * side)[..., side + start - done : side + stop - done]
        ring[start:stop, :, 2 * self.channels :] += found.permute(2, 0, 1)

    def _spectra(self, rows: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Spectra of a and b [n, B, ...] over 2·side points, [B, C, side + 1]."""
        flat = rows[..., : 2 * self.channels].permute(1, 2, 0).contiguous()
        spectra = torch.fft.rfft(flat, n=2 * side)
        return spectra[:, : self.channels], spectra[:, self.channels :]

    def cost(self, weights: Mapping[str, Tensor]) -> str:
        """Work of one step."""
        return "C·(2K + O(log² L)) multiply-adds, two tiles a block"


def _side(done: int, block: int) -> int:
    """The largest K·2^q that divides ``done``."""
    blocks = done // block
    return block * (blocks & -blocks)


def _ends(position: int, block: int) -> Iterator[int]:
    """The ends of blocks, latest first, whose tiles have outputs from ``position`` on."""
    while position > 0:
        yield position
        position -= _side(position, block)
