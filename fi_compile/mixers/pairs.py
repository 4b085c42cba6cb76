"""Which input channels each output channel of a linear map reads, found by probing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fi_compile.passes.propose_consistency import QUIETEST

from .reference import convolve

_CLEAR = 1e-12  # a response below this share of its output's largest is another channel's rounding
_MOST_CHANNELS = 2048
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Pairs:
    """Pairs of an output and an input channel: ``fan_in`` of them for each output channel in turn.

    ``source``: int64 [P], the input channel of each pair. ``live``: bool [P], False for pairs that only fill up the
    fan-in of outputs which read fewer channels; None where there are none.
    """

    source: Tensor
    fan_in: int = 1
    live: Tensor | None = None

    @cached_property
    def colours(self) -> Tensor:
        """A colour for each input channel, int64 [max source + 1], such that no output reads two of one colour."""
        count = int(self.source.max()) + 1 if self.source.numel() else 0
        colours = torch.zeros(count, dtype=torch.int64)
        if self.fan_in == 1:
            return colours
        reads = torch.zeros(len(self.source) // self.fan_in, count, dtype=torch.bool)
        outputs = torch.arange(len(self.source)) // self.fan_in
        live = slice(None) if self.live is None else self.live.cpu()
        reads[outputs[live], self.source.cpu()[live]] = True
        taken = torch.zeros(len(reads), count, dtype=torch.bool)
        for channel in range(count):
            mine = reads[:, channel]
            free = int((~taken[mine].any(0)).nonzero()[0])
            colours[channel] = free
            taken[mine, free] = True
        return colours

    def kernel(self, response: Callable[[Tensor], Tensor], channels_in: int, length: int) -> Tensor:
        """The filters [P, length] of a map from [1, Cin, length] to [1, Cout, length], by one impulse a colour."""
        colours = self.colours.to(self.source.device)
        out = torch.zeros(len(self.source), length, dtype=torch.float64, device=self.source.device)
        for colour in range(int(colours.max()) + 1 if colours.numel() else 0):
            impulse = torch.zeros(1, channels_in, length, dtype=torch.float64, device=self.source.device)
            impulse[0, : len(colours), 0] = (colours == colour).double()
            mine = colours[self.source] == colour
            if self.live is not None:
                mine &= self.live
            places = mine.nonzero()[:, 0]
            out[places] = response(impulse)[0][places // self.fan_in]
        return out


def find_pairs(
    response: Callable[[Tensor], Tensor], rows: int, channels_in: int, length: int
) -> Pairs | None:
    """The pairs of a linear, shift-invariant map of [rows, Cin, length], or None where it is not one.

    What is zero over ``length`` lags is not seen: compare with the map over a whole capacity before it is relied on.
    """
    one = _one_each(response, rows, channels_in, length)
    if one is not None or channels_in > _MOST_CHANNELS:
        return one
    lags = _responses(response, rows, channels_in, length)  # [Cin, Cout, length]
    size = lags.abs().amax(-1)
    reads = (size > _CLEAR * size.amax(0)).T  # [Cout, Cin]
    fan_in = int(reads.sum(-1).max())
    if not fan_in:
        return None
    order = torch.argsort(reads.int(), dim=-1, descending=True, stable=True)[:, :fan_in]
    live = reads.gather(1, order)
    pairs = Pairs(order.flatten(), fan_in, None if bool(live.all()) else live.flatten())
    kernel = (
        lags.transpose(0, 1)[torch.arange(len(order))[:, None], order].flatten(0, 1) * live.flatten()[:, None]
    )
    return pairs if _holds(response, rows, channels_in, pairs, kernel) else None


def _one_each(response: Callable[[Tensor], Tensor], rows: int, count: int, length: int) -> Pairs | None:
    """Pairs where every output reads one input: two impulses of different codes tell which."""
    generator = torch.Generator().manual_seed(7)

    def impulse(weights: Tensor) -> Tensor:
        flat = torch.zeros(rows, count, length, dtype=torch.float64)
        flat[:, :, 0] = weights
        return response(flat)[0]

    kernel = impulse(torch.ones(count, dtype=torch.float64))
    code = (1 + torch.randperm(count, generator=generator).double() / max(count, 2)).to(kernel)
    coded = impulse(code)
    energy = kernel.square().sum(-1)
    ratio = (coded * kernel).sum(-1) / energy.clamp_min(torch.finfo(torch.float64).tiny)
    source = (ratio[:, None] - code[None, :]).abs().argmin(-1)
    own = (
        torch.arange(len(source), device=source.device) if len(source) == count else torch.zeros_like(source)
    )
    source = torch.where(energy > 0, source, own)
    again = (1 + torch.rand(count, dtype=torch.float64, generator=generator)).to(kernel)
    if not close(impulse(again), again[source, None] * kernel):
        return None
    pairs = Pairs(source)
    return pairs if _holds(response, rows, count, pairs, kernel) else None


def _responses(response: Callable[[Tensor], Tensor], rows: int, count: int, length: int) -> Tensor:
    """The response to an impulse on each input channel by itself: [Cin, Cout, length]."""
    many = count if rows > 1 else 1
    many = max(1, min(many, _AT_ONCE // (count * length)))
    parts = []
    for start in range(0, count, many):
        flat = torch.zeros(max(rows, many), count, length, dtype=torch.float64)
        stop = min(start + many, count)
        flat[torch.arange(stop - start), torch.arange(start, stop), 0] = 1
        parts.append(response(flat)[: stop - start])
    return torch.cat(parts)


def _holds(response: Callable[[Tensor], Tensor], rows: int, count: int, pairs: Pairs, kernel: Tensor) -> bool:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(rows, count, kernel.shape[1], dtype=torch.float64, generator=generator)
    return close(response(x), convolve(x.to(kernel.device), kernel, pairs.source, pairs.fan_in))


def close_by_channel(
    found: Tensor, expected: Tensor, tolerance: float = 1e-9, scale: Tensor | None = None
) -> bool:
    """Whether two values [B, C, n] agree up to a share of the largest of each channel, or of ``scale`` [1, C, 1]."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return False
    if not expected.numel():
        return True
    if scale is None:
        scale = expected.abs().amax((0, 2), keepdim=True)
    scale = scale.clamp_min(max(QUIETEST * float(scale.max()), 1e-300))
    return bool(((found - expected).abs() <= tolerance * scale).all())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    """Whether two values agree up to a share of the largest."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return False
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-300)
    return float((found - expected).abs().max() if expected.numel() else 0.0) <= tolerance * scale


def count_pairs(source: Tensor | None, filter_index: Tensor | None, channels_in: int, filters: int) -> int:
    """The number of pairs that int64 channel maps describe; raises ValueError where they do not fit together."""
    counts = set()
    for name, index, bound in (
        ("source", source, channels_in),
        ("filter_index", filter_index, filters),
    ):
        if index is None:
            counts.add(bound)
            continue
        if index.dtype != torch.int64 or index.ndim != 1:
            raise ValueError(f"{name} is int64 [Cout], found {index.dtype} {list(index.shape)}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < bound:
            raise ValueError(f"{name} has values outside 0 ... {bound - 1}")
        counts.add(index.numel())
    if len(counts) > 1:
        raise ValueError(
            f"source, filter_index, {channels_in} input channels and {filters} filters give"
            f" different numbers of output channels: {sorted(counts)}"
        )
    return counts.pop()
