import pytest
import torch

from fi_compile.kernels.block import block_step as block_step_by_torch
from fi_compile.kernels.block import block_sum_reference, block_table
from fi_compile.kernels.block_step import block_step_gpu
from fi_compile.kernels.channels import Fan, gathered
from guarded import assert_close, rand

MAPS = {
    "identity": (None, None, None),
    "both": ([2, 0, 1, 1], [3, 0, 0, 2], None),
    "pairs": ([2, 0, 1, 1], [3, 0, 0, 2], [0, 0, 0, 1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("block", "batch", "maps", "whole"),
    [
        (1, 1, "identity", False),
        (8, 3, "both", True),
        (24, 1, "both", False),
        (40, 2, "identity", True),
        (9, 3, "pairs", True),
    ],
)
def test_block_step(block, batch, maps, whole, dtype):
    source, index, target = (None if m is None else torch.tensor(m) for m in MAPS[maps])
    channels_in, filters = 3, 3 if index is None else 4
    rho = rand(filters, block + 3, dtype=dtype, seed=1)
    inputs = rand(block, batch, channels_in, dtype=dtype)
    table = block_table(rho, block, index)
    pairs = table.shape[1]
    channels = pairs if target is None else 2
    pending = rand(block, batch, channels, dtype=dtype, seed=2)
    x, gate = rand(batch, 2 * channels_in, dtype=dtype, seed=3), rand(batch, channels, dtype=dtype, seed=4)
    skip = rho[:, 0] if index is None else rho[index, 0]
    extra = {"x": x[:, channels_in:], "skip": skip.contiguous(), "gate": gate} if whole else {}
    for j in sorted({0, 1, block // 2, block - 1} & set(range(block))):
        terms = block_sum_reference(inputs.double(), rho.double(), j, source, index)
        if whole:
            now = x[:, channels_in:] if source is None else x[:, channels_in:][:, source]
            terms = terms + now.double() * skip.double()
        expected = pending[j] + gathered(terms, target, 0, pairs)[0]
        expected = expected * gate if whole else expected
        # Rows from j on are not read.
        poisoned = inputs.clone()
        poisoned[j:] = torch.nan
        found = block_step_gpu(
            pending, poisoned, table, torch.tensor([j]), source, **extra, fan=Fan.of(target)
        )
        assert found.dtype == dtype
        scale = inputs.double().flatten(1).norm(dim=0).max() * rho.double().norm(dim=-1).max()
        assert_close(found, expected, 4 * float(scale + pending.abs().max()), units=3)


def test_operator_is_the_kernel():
    pending, inputs, rho = rand(4, 2, 3), rand(4, 2, 3, seed=1), rand(3, 6, seed=2)
    table, local = block_table(rho, 4), torch.tensor([3])
    fan = Fan(torch.tensor([0, 1, 3]), 2, 1.5)
    for rows, of, args in ((pending, None, (None, 1)), (pending[..., :2].contiguous(), fan, (fan.first, 2))):
        operands = (rows, inputs, table, local, None, *args)
        found = torch.ops.flashinf.block_step(*operands)
        assert torch.equal(found, block_step_gpu(rows, inputs, table, local, fan=of))
        assert_close(found, block_step_by_torch(rows, inputs, table, local, None, args[0]), 10, units=3)
        torch.library.opcheck(torch.ops.flashinf.block_step.default, operands)


def test_what_is_refused():
    pending, inputs, table = rand(4, 2, 3), rand(4, 2, 3), rand(8, 3)
    with pytest.raises(ValueError, match="inputs must be contiguous"):
        block_step_gpu(pending, inputs.permute(1, 0, 2), table, torch.tensor([0]))
    with pytest.raises(ValueError, match="come together"):
        block_step_gpu(pending, inputs, table, torch.tensor([0]), x=inputs[0])
