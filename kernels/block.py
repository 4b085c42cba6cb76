"""The sum inside a base block: what earlier positions of the block contribute to this one.

The step runs it inside its compiled graph, so it is one gather, one product and one sum of static
shapes. Source: docs/algorithms.md, "Base block".
"""

import torch
from torch import Tensor


def block_table(filters: Tensor, block: int, filter_index: Tensor | None = None) -> Tensor:
    """Lags K - 1 ... 1, then zeros, such that row K - j + i weighs row i of a block at position j.

    filters: [F, T]; lags beyond T count as zero. Returns [2K, Cout]: row r holds lag K - r for
    0 < r < K and is exactly zero elsewhere, so that rows i >= j weigh nothing.
    """
    lags = filters[:, 1:block]
    if filter_index is not None:
        lags = lags.index_select(0, filter_index)
    table = filters.new_zeros(2 * block, lags.shape[0])
    table[block - lags.shape[1] : block] = lags.flip(-1).T
    return table


def block_sum_reference(
    inputs: Tensor, filters: Tensor, j: int, source: Tensor | None, filter_index: Tensor | None
) -> Tensor:
    """The definition: `sum over i < j of inputs[i] · rho[j - i]`. Returns [B, Cout]."""
    if source is not None:
        inputs = inputs[:, :, source]
    if filter_index is not None:
        filters = filters[filter_index]
    out = torch.zeros_like(inputs[0])
    for i in range(j):
        if j - i < filters.shape[1]:
            out += inputs[i] * filters[:, j - i]
    return out


# Steps are traced: there the sum is one operator, which a step that is compiled for a CPU has code of its own for.
_library = torch.library.Library("flashinf", "FRAGMENT")
_library.define("block_sum(Tensor inputs, Tensor table, Tensor j, Tensor? source) -> Tensor")


def block_sum_by_torch(inputs: Tensor, table: Tensor, j: Tensor, source: Tensor | None = None) -> Tensor:
    """What `block_sum` computes, as one gather, one product and one sum of static shapes."""
    block = inputs.shape[0]
    rows = torch.arange(block, device=inputs.device) + (block - j)
    weights = table.index_select(0, rows)
    if source is not None:
        inputs = inputs.index_select(2, source)
    return (inputs * weights.unsqueeze(1)).sum(0)


_library.impl("block_sum", block_sum_by_torch, "CompositeExplicitAutograd")


@torch.library.register_fake("flashinf::block_sum", lib=_library)
def _shape(inputs: Tensor, table: Tensor, j: Tensor, source: Tensor | None) -> Tensor:
    return inputs.new_empty(inputs.shape[1], table.shape[1])


OPERATOR = torch.ops.flashinf.block_sum.default


def block_sum(inputs: Tensor, table: Tensor, j: Tensor, source: Tensor | None = None) -> Tensor:
    """The same through `block_table`.

    inputs: [K, B, Cin], finite in every row; table: [2K, Cout]; j: int64 tensor of one element, the
    position inside the block, 0 <= j < K; source: int64 [Cout] or None. Returns [B, Cout].
    """
    return OPERATOR(inputs, table, j, source)


def block_step(
    pending: Tensor,
    inputs: Tensor,
    table: Tensor,
    j: Tensor,
    source: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Row j of `pending` [K, B, Cout] and the block's sum, or its sums over pairs (`channels.Fan`): [B, Cout]."""
    row, sums = torch.index_select(pending, 0, j)[0], block_sum(inputs, table, j, source)
    if first is None:
        return row + sums
    outputs = torch.arange(row.shape[1], device=row.device)
    target = outputs.repeat_interleave(first.diff(), output_size=sums.shape[1])
    return row.index_add(1, target, sums)
