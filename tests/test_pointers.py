"""Parts of a step as one function of pointers: what it computes, and what it is not offered for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from decoding import gap
from fi_compile import extension, native
from fi_compile.layers import whole
from fi_compile.lower import only_own_warnings
from fi_compile.native import compile_native

pytestmark = pytest.mark.skipif(extension.between() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _quiet(without_gradients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLASHINF_CACHE_DIR", str(tmp_path))
    with only_own_warnings():
        yield


def part_of(function: Callable[..., list[Tensor]], example: list[Tensor]) -> fx.GraphModule:
    """The part with its inputs in the order of ``example``, as they are used."""
    layers = whole(make_fx(function, tracing_mode="fake")(*example).graph)
    assert layers.calls[0].inputs == tuple(range(len(example)))
    return layers.parts[0]


def of_everything(weight: Tensor, bias: Tensor, x: Tensor, state: Tensor, place: Tensor) -> list[Tensor]:
    """Products with and without a bias, of a view that begins inside, buffers too large for the stack, a write."""
    y = torch.addmm(bias, x, weight.t())  # reads its inputs in their order
    large = (y.unsqueeze(-1) + torch.arange(20_000)).sin()
    mixed = torch.mm(large[:, :, 7:15].sum(1), state[1:, 0, 2:].new_ones(8, 2))
    inner = torch.mm(x[1:], weight[:, 2:].t()[:, 1:].mm(weight[1:, 2:]).repeat(2, 2)[:8])
    stacked = torch.bmm(state[1:], state[1:].mT)
    state.index_copy_(0, place, y.sum() * torch.ones_like(state[:1]))
    return [y, large.sum(-1), mixed, inner, stacked.transpose(0, 1), y.argmax(-1), y > 0]


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return [random(5, 8), random(5), random(3, 8), random(4, 3, 6), torch.tensor([2])]


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_it_computes_what_the_graph_does(dtype):
    ours, theirs = inputs(dtype), inputs(dtype)
    part = part_of(of_everything, inputs(dtype))
    run = compile_native(part, ours)
    assert run.address is not None
    again = compile_native(part, ours)  # from the cache
    for _ in range(2):
        for found, other, expected in zip(run(ours), again(inputs(dtype)), part(*theirs), strict=True):
            assert found.dtype == expected.dtype
            assert found.stride() == expected.stride()
            bound = 1e-12 if dtype == torch.float64 else 1e-4
            assert gap(found.double(), expected.double()) < bound
            assert other.shape == found.shape
        assert gap(ours[3], theirs[3]) < 1e-4
        ours[3].normal_(generator=torch.Generator().manual_seed(1))
        theirs[3].copy_(ours[3])


@pytest.mark.parametrize(
    "change",
    [lambda t: t.float(), lambda t: t.t().contiguous().t(), lambda t: t[:4]],
    ids=["dtype", "strides", "shape"],
)
def test_tensors_that_lie_otherwise_are_refused(change):
    example = [torch.randn(5, 8, dtype=torch.float64)]
    part = part_of(lambda x: [x * 2], example)
    run = native.Native(part, lambda args: [args[0] * 2], address=1)
    assert torch.equal(run(example)[0], 2 * example[0])
    with pytest.raises(RuntimeError, match="another shape, layout or dtype"):
        run([change(example[0])])


@pytest.mark.slow
def test_operators_of_other_libraries_take_tensors():
    example = [torch.randn(5, 8)]
    part = part_of(lambda x: [torch.sort(x, stable=True)[0]], example)
    run = compile_native(part, example)
    assert run.address is None
    assert torch.equal(run(example)[0], example[0].sort().values)
