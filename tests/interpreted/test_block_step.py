import pytest
import torch

from fi_compile.kernels.block import block_sum_reference, block_table
from fi_compile.kernels.block_step import block_step_gpu
from guarded import assert_close, rand

MAPS = {"identity": (None, None), "both": ([2, 0, 1, 1], [3, 0, 0, 2])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("block", "batch", "maps", "whole"),
    [(1, 1, "identity", False), (8, 3, "both", True), (24, 1, "both", False), (40, 2, "identity", True)],
)
def test_block_step(block, batch, maps, whole, dtype):
    source, index = (None if m is None else torch.tensor(m) for m in MAPS[maps])
    channels_in, filters = 3, 3 if index is None else 4
    rho = rand(filters, block + 3, dtype=dtype, seed=1)
    inputs = rand(block, batch, channels_in, dtype=dtype)
    table = block_table(rho, block, index)
    channels = table.shape[1]
    pending = rand(block, batch, channels, dtype=dtype, seed=2)
    x, gate = rand(batch, 2 * channels_in, dtype=dtype, seed=3), rand(batch, channels, dtype=dtype, seed=4)
    skip = rho[:, 0] if index is None else rho[index, 0]
    extra = {"x": x[:, channels_in:], "skip": skip.contiguous(), "gate": gate} if whole else {}
    for j in sorted({0, 1, block // 2, block - 1} & set(range(block))):
        expected = block_sum_reference(inputs.double(), rho.double(), j, source, index) + pending[j]
        if whole:
            now = x[:, channels_in:] if source is None else x[:, channels_in:][:, source]
            expected = (expected + now.double() * skip.double()) * gate
        # Rows from j on are not read.
        poisoned = inputs.clone()
        poisoned[j:] = torch.nan
        found = block_step_gpu(pending, poisoned, table, torch.tensor([j]), source, **extra)
        assert found.dtype == dtype
        scale = inputs.double().flatten(1).norm(dim=0).max() * rho.double().norm(dim=-1).max()
        assert_close(found, expected, 4 * float(scale + pending.abs().max()), units=3)


def test_operator_is_the_kernel():
    pending, inputs, rho = rand(4, 2, 3), rand(4, 2, 3, seed=1), rand(3, 6, seed=2)
    table, local = block_table(rho, 4), torch.tensor([3])
    found = torch.ops.flashinf.block_step(pending, inputs, table, local, None)
    assert torch.equal(found, block_step_gpu(pending, inputs, table, local))
    torch.library.opcheck(torch.ops.flashinf.block_step.default, (pending, inputs, table, local, None))


def test_what_is_refused():
    pending, inputs, table = rand(4, 2, 3), rand(4, 2, 3), rand(8, 3)
    with pytest.raises(ValueError, match="inputs must be contiguous"):
        block_step_gpu(pending, inputs.permute(1, 0, 2), table, torch.tensor([0]))
    with pytest.raises(ValueError, match="come together"):
        block_step_gpu(pending, inputs, table, torch.tensor([0]), x=inputs[0])
