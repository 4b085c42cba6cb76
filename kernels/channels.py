"""Channel maps and channel chunks, shared by the convolution kernels.

A stack of channels has output channel o read input channel `source[o]` through filter row
`filter_index[o]`; None stands for the identity and costs nothing. Where an output channel reads several
input channels, `o` counts pairs of an output and an input channel, and `target[o]`, ascending, is the output
channel that a pair belongs to: its sum is over pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Elements a transform works on at a time: its input, spectrum and output together stay in cache.
QUANTUM = 1 << 19


def take(rows: Tensor, index: Tensor | None, dim: int, start: int, stop: int) -> Tensor:
    """The rows of `rows` along `dim` that positions start ... stop of `index` name; None: a view."""
    if index is None:
        return rows.narrow(dim, start, stop - start)
    return rows.index_select(dim, index[start:stop])


def chunk_width(elements: int, quantum: int | None = None) -> int:
    """How many channels of `elements` are worth about `quantum` elements, QUANTUM where it is None."""
    return max(1, (QUANTUM if quantum is None else quantum) // max(1, elements))


def chunks(channels: int, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges of channels, each worth about QUANTUM elements where a channel has `elements`."""
    width = chunk_width(elements)
    for start in range(0, channels, width):
        yield start, min(start + width, channels)


def transform(rows: Tensor, source: Tensor | None, n: int, start: int, stop: int) -> Tensor:
    """The spectra of the rows of [B, Cin, m] that `source` names at start ... stop, on the CPU each computed once."""
    if source is None:
        return torch.fft.rfft(rows[:, start:stop], n=n)
    if source.device.type != "cpu":  # the host would wait to learn how many there are
        return torch.fft.rfft(rows.index_select(1, source[start:stop]), n=n)
    names, place = source[start:stop].unique(return_inverse=True)
    spectra = torch.fft.rfft(rows.index_select(1, names), n=n)
    return spectra if len(names) == stop - start and names.equal(source[start:stop]) else spectra[:, place]


@dataclass(frozen=True)
class Fan:
    """Output channels that read several pairs each: those of o are first[o] ... first[o + 1] - 1, `most` at most.

    first: int64 [Cout + 1]; mean: pairs an output channel. The program of an output channel sums them in order.
    """

    first: Tensor
    most: int
    mean: float

    @staticmethod
    def of(target: Tensor | None) -> Fan | None:
        """That of an ascending `target`, int64 [pairs]; None for None. Reads values on the host."""
        if target is None:
            return None
        counts = target.bincount()
        first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return Fan(first, int(counts.max()), len(target) / len(counts))

    def channels(self, start: int, stop: int) -> Fan:
        """Only output channels start ... stop."""
        return replace(self, first=self.first[start : stop + 1])


# Copies of what is on a device, so that no tile has to wait for it; they go with the tensors.
_hosts = WeakTensorKeyDictionary()


def on_host(target: Tensor) -> numpy.ndarray:
    """The values of a map that nobody changes; the first time the host waits for them."""
    if target not in _hosts:
        _hosts[target] = target.detach().cpu().numpy()
    return _hosts[target]


def gathered(value: Tensor, target: Tensor | None, start: int, stop: int) -> tuple[Tensor, slice]:
    """Pairs start ... stop of a value [B, pairs, ...] summed by their output channels, and which those are.

    Reads no value of a device once `on_host` was asked for this target.
    """
    if target is None:
        return value, slice(start, stop)
    places = on_host(target)
    first, last = int(places[start]), int(places[stop - 1])
    out = value.new_zeros(value.shape[0], last - first + 1, *value.shape[2:])
    return out.index_add_(1, target[start:stop] - first, value), slice(first, last + 1)
