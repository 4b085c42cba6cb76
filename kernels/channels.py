"""Channel maps and channel chunks, shared by the convolution kernels.

A stack of channels has output channel o read input channel `source[o]` through filter row
`filter_index[o]`; None stands for the identity and costs nothing. Where an output channel reads several
input channels, `o` counts pairs of an output and an input channel, and `target[o]`, ascending, is the output
channel that a pair belongs to: its sum is over pairs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

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


def gathered(value: Tensor, target: Tensor | None, start: int, stop: int) -> tuple[Tensor, slice]:
    """Pairs start ... stop of a value [B, pairs, ...] summed by their output channels, and which those are."""
    if target is None:
        return value, slice(start, stop)
    first, last = int(target[start]), int(target[stop - 1])
    out = value.new_zeros(value.shape[0], last - first + 1, *value.shape[2:])
    return out.index_add_(1, target[start:stop] - first, value), slice(first, last + 1)
