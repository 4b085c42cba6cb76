"""Channel maps and channel chunks, shared by the convolution kernels.

A stack of channels has output channel o read input channel `source[o]` through filter row
`filter_index[o]`; None stands for the identity and costs nothing.
"""

from collections.abc import Iterator

from torch import Tensor

# Elements a transform works on at a time: its input, spectrum and output together stay in cache.
QUANTUM = 1 << 19


def take(rows: Tensor, index: Tensor | None, dim: int, start: int, stop: int) -> Tensor:
    """The rows of `rows` along `dim` that positions start ... stop of `index` name; None: a view."""
    if index is None:
        return rows.narrow(dim, start, stop - start)
    return rows.index_select(dim, index[start:stop])


def chunks(channels: int, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges of channels, each worth about QUANTUM elements where a channel has `elements`."""
    width = max(1, QUANTUM // max(1, elements))
    for start in range(0, channels, width):
        yield start, min(start + width, channels)
