"""Increments that keep a few rows: short convolutions and scans, in rings of the newest positions.

Row ``p mod R`` of a ring belongs to position p. R exceeds what a step reads by a slack, so that going back a few
positions (speculative decoding) costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fi_compile.kernels.short_conv import short_conv_step

from .convolution import Filter
from .reference import dense, is_dense, sum_pairs

SLACK = 64
_WIDEST = 1 << 16  # numbers a sequence that the slack of a running sum may take


def _short_conv_steps(kernels: str) -> Callable[..., Tensor]:
    if kernels != "triton":
        return short_conv_step
    from fi_compile.kernels import short_conv_step as triton_form

    return triton_form.short_conv_step


@dataclass(frozen=True)
class ShortConv:
    """Increment of filters of ``taps`` lags, ``fan_in`` for an output channel: the inputs of the newest positions.

    ``kernels``: what runs a step, ``torch`` or ``triton``. ``at``: the lags that count, 0 among them, where the others
    are zero: these alone are read. ``moves``: no weight makes the filters, as of a shift: what a zero leaves out does
    not count then, infinite or not.
    """

    channels_in: int
    taps: int
    fan_in: int = 1
    kernels: str = "torch"
    at: tuple[int, ...] | None = None
    moves: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The filters, and where they are sparse their lags."""
        return ("kernel",) if self.at is None else ("kernel", "lags")

    @property
    def reads(self) -> int:
        """How many earlier positions a step reads, or reads among."""
        return self.taps - 1 if self.at is None else self.at[-1]

    @property
    def rows(self) -> int:
        """Rows of the ring."""
        return max(self.reads, 1) + SLACK

    def weights(self, found: Filter, source: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """The filters, [taps, P] of pairs, lag 0 first; where a matrix is no more work, [taps, Cin, Cout].

        Where ``at`` is given, also the lags but the first: int64 [taps - 1].
        """
        kernel = found.kernel.to(dtype)
        if is_dense(self.fan_in, self.channels_in):
            kernel = dense(kernel, source, self.fan_in, self.channels_in).permute(2, 1, 0)
        else:
            kernel = kernel.t()
        weights = {"kernel": kernel.contiguous()}
        if self.at is not None:
            weights["lags"] = torch.tensor(self.at[1:], device=kernel.device)
        return weights

    def ring(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Inputs of no positions: zeros [R, B, Cin]."""
        return weights["kernel"].new_zeros(self.rows, batch, self.channels_in)

    def step(self, ring: Tensor, position: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The newest output [B, Cout] from x [B, Cin]; writes x into the ring."""
        kernel, source, lags = weights["kernel"], weights.get("source"), weights.get("lags")
        size, x = ring.shape[0], x.to(ring.dtype)
        if not is_dense(self.fan_in, self.channels_in):
            if self.moves or lags is not None:
                return short_conv_step(ring, position, x, kernel, source, self.fan_in, lags, self.moves)
            return _short_conv_steps(self.kernels)(ring, position, x, kernel, source, self.fan_in)
        if lags is None:
            lags = torch.arange(1, self.taps, device=ring.device)
        past = ring.index_select(0, (position - lags) % size)
        rows = torch.cat([x.unsqueeze(0), past]).transpose(0, 1).flatten(1)
        ring.index_copy_(0, position % size, x.unsqueeze(0))
        return rows @ kernel.flatten(0, 1)

    def fill(self, ring: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take over the newest of the inputs x [B, Cin, P] of positions 0 … P-1."""
        write_newest(ring, x)

    def cost(self, weights: Mapping[str, Tensor]) -> str:
        """Work of one step."""
        taps = "M" if self.at is None else str(len(self.at))
        return f"{taps}·C multiply-adds" if self.fan_in == 1 else f"{self.fan_in}·{taps}·C multiply-adds"


@dataclass(frozen=True)
class Scan:
    """Increment of constant filters: the running sums at the newest positions, in float64.

    A sum in float32 rounds at every position, always the same way where the input stays as it is.
    """

    channels_in: int
    fan_in: int = 1

    needs = ("kernel",)
    reads = 1

    @property
    def rows(self) -> int:
        """Rows of the ring: fewer where a row is wide, such as an outer product."""
        return 1 + min(SLACK, max(7, _WIDEST // self.channels_in))

    def weights(self, found: Filter, source: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """The constants [P, 1], float64, whatever ``dtype``."""
        return {"kernel": found.kernel[:, :1].double().contiguous()}

    def ring(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Sums over no positions: zeros [R, B, Cin], float64."""
        return weights["kernel"].new_zeros(self.rows, batch, self.channels_in)

    def step(self, ring: Tensor, position: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The newest output [B, Cout], float64, from x [B, Cin]; writes the new sum into the ring."""
        kernel, source = weights["kernel"], weights.get("source")
        size, x = ring.shape[0], x.to(ring.dtype)
        total = ring.index_select(0, (position - 1) % size)[0] + x
        ring.index_copy_(0, position % size, total.unsqueeze(0))
        pairs = (total if source is None else total.index_select(1, source)) * kernel[:, 0]
        return sum_pairs(pairs, self.fan_in)

    def fill(self, ring: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take over the sums of the inputs x [B, Cin, P] of positions 0 … P-1."""
        write_newest(ring, x.to(ring.dtype).cumsum(-1))

    def cost(self, weights: Mapping[str, Tensor]) -> str:
        """Work of one step."""
        return "C additions"


def drop_rows(ring: Tensor, position: int, kept: int) -> None:
    """Go back from ``position`` to ``kept`` positions: rows of positions that do not exist yet are zero."""
    size = ring.shape[0]
    for dropped in range(kept, min(position, kept + size)):
        ring[dropped % size].zero_()
    if kept == 0:
        ring.zero_()


def write_newest(ring: Tensor, rows: Tensor) -> None:
    """Fill a ring [R, B, C] with the newest of the rows [B, C, P] of positions 0 … P-1."""
    size, length = ring.shape[0], rows.shape[-1]
    ring.zero_()
    first = max(0, length - size)
    index = torch.arange(first, length, device=ring.device) % size
    ring.index_copy_(0, index, rows[:, :, first:].permute(2, 0, 1).to(ring.dtype).contiguous())
