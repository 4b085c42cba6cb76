"""Parts of a step as one function of pointers: what it computes, and what it is not offered for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from decoding import gap
from fi_compile import extension, native, pointers
from fi_compile.kernels.block import block_sum
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
    """The function as a part; ``example`` is put in the order of the part's inputs, in which they are used."""
    layers = whole(make_fx(function, tracing_mode="fake")(*example).graph)
    example[:] = [example[i] for i in layers.calls[0].inputs]
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


# rows, outputs, terms of products: about the rows taken at once, a vector, rows of a tile; one of each for two threads
SKINNY = (
    (1, 40, 87),
    (1, 7, 33),
    (1, 150, 130),
    (4, 9, 16),
    (2, 1, 15),
    (3, 8, 2),
    (5, 17, 33),
    (8, 7, 64),
    (11, 5, 40),
    (32, 260, 130),
)  # the last by threads


@pytest.mark.parametrize(
    ("dtype", "threads"), [(torch.float32, 2), pytest.param(torch.float64, 1, marks=pytest.mark.slow)]
)
def test_products_of_few_rows(dtype, threads):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def products(*tensors: Tensor) -> list[Tensor]:
        triples = zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)
        sums = [torch.addmm(b, x, w.t()) for b, x, w in triples]
        x, weight = tensors[-2:]
        # rows further apart than they are long
        of_parts = [torch.mm(some[:, 3:90], weight[5:, 7:94].t()) for some in (x, x[:1])]
        return [*sums, *of_parts, torch.mm(x, weight.t())]

    example = [t for m, n, k in SKINNY for t in (random(n), random(m, k), random(n, k))]
    example[-2][0, 0] = torch.inf
    part, before = part_of(products, example), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with native.generating(native.INDUCTOR):
            source = pointers.generate_source(part, example)
        run = compile_native(part, example)
    finally:
        torch.set_num_threads(before)
    *_, called = source.split(f" {native.ENTRY}(")
    of_one_row = 1 + sum(m == 1 for m, _, _ in SKINNY)
    assert called.count("gemv<") == of_one_row
    assert called.count("skinny_gemm<") == len(SKINNY) + 3 - of_one_row
    for found, expected in zip(run(example), part(*(t.double() for t in example)), strict=True):
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: torch.mm(x, w.t()),  # of many rows
        lambda x, w: torch.mm(x[:8, :24], w),  # along the other axis of the weight
        lambda x, w: torch.mm(x[:, :8].t(), w.t()),  # whose terms lie apart
        lambda x, w: torch.addmm(x[:8, :24], x[:8], w.t()),  # and something else for each row
        lambda x, w: torch.addmm(x[0, :24], x[:8], w.t(), alpha=2.0),
        lambda x, w: torch.mm(x[:8].bfloat16(), w.bfloat16().t()),
    ],
)
def test_other_products_are_torchs(product):
    example = [torch.randn(40, 40), torch.randn(24, 40)]
    with native.generating(native.INDUCTOR):
        part = part_of(lambda x, w: [product(x, w)], example)
        source = pointers.generate_source(part, example)
    *_, called = source.split(f" {native.ENTRY}(")
    assert "skinny_gemm<" not in called
    assert "aoti_torch_cpu_" in called


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


@pytest.mark.parametrize(
    ("dtype", "batch", "channels", "gathered"),
    [(torch.float32, 1, 1, False), (torch.float32, 3, 16 * 17 + 5, True), (torch.float64, 2, 150, False)],
)
def test_the_sum_inside_a_block_is_a_kernel_of_our_own(dtype, batch, channels, gathered):
    block, before = 6, 3  # rows, and channels of others beside ours
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = random(block, batch, channels + before)[:, :, before:]
    table = random(2 * block, channels + before)[:, before:]
    source = [torch.randint(channels, (channels,), generator=generator)] if gathered else []
    example = [rows, table, torch.tensor([block - 1]), *source]
    part = part_of(lambda *given: [block_sum(*given)], example)
    run = compile_native(part, example)
    assert run.address is not None
    for j in range(block):
        rows[j] = torch.nan  # what is not there yet is not read
        example[2].fill_(j)
        found = run(example)[0]
        rows[j] = random(batch, channels)
        table_row = table[block - j : block, None]
        read = rows[:j] if not source else rows[:j, :, source[0]]
        expected = (read.double() * table_row.double()).sum(0)
        assert gap(found.double(), expected) < 20 * torch.finfo(dtype).eps


def test_where_no_code_is_ours_a_part_is_torch_alone():
    example = [torch.randn(4, 1, 3).half(), torch.randn(8, 3).half(), torch.tensor([2])]
    part = part_of(lambda *given: [block_sum(*given)], example)
    run = compile_native(part, example)
    assert run.address is None
    assert gap(run(example)[0].float(), part(*example)[0].float()) < 1e-2
