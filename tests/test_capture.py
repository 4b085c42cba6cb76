"""From modules to programs: one graph for all lengths, what its guards admit, and what is refused."""

import math
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._refs import fft as reference_transforms

from corpus import SPELLINGS, UNTRACEABLE
from decoding import by_speed, features, gap, ids, language_model, module
from fi_compile.capture import trace_module
from fi_compile.compare import disagreements
from fi_compile.errors import Unsupported
from fi_compile.program import Kind, operator_name, source_of

WIDTH, L_MAX = 4, 64


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Function(nn.Module):
    """A function of x [B, L, D]."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def traced(function: Callable[[Tensor], Tensor], length: int | None = None, own: int = 9):
    return trace_module(Function(function), features(2, own, WIDTH), length=length)


@pytest.mark.parametrize("name", ["hyena_3", "attention_free", "filter_in_place", "fft_padded_by_cat"])
def test_a_program_computes_the_model_at_other_lengths_and_batches(name):
    factory = SPELLINGS.get(name, SPELLINGS["outer_product_heads"])
    model = module(factory, WIDTH, L_MAX).double()
    program = trace_module(model, features(2, 9, WIDTH), length=60)
    for batch, length in ((1, 2), (5, 31), (2, 60)):
        x = features(batch, length, WIDTH)
        assert program.lengths.admits(length)
        assert gap(program.run(x), model(x)) < 1e-12


def test_inputs_are_the_models_own_tensors():
    model = language_model("gated", width=WIDTH, l_max=L_MAX)
    program = trace_module(model, ids(2, 9))
    kinds = [spec.kind for spec in program.inputs]
    assert kinds.count(Kind.SEQUENCE) == 1
    for spec in program.inputs:
        if spec.kind is Kind.PARAMETER:
            assert program.values[spec.name] is model.get_parameter(str(spec.path))
    assert program.nodes[program.sequence.name] is program.sequence


def test_a_sequence_named_like_a_builtin():
    class Input(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input.cumsum(1)

    program = trace_module(Input(), features(2, 9, WIDTH))
    assert program.nodes[program.sequence.name] is program.sequence
    assert gap(program.run(features(3, 20, WIDTH)), features(3, 20, WIDTH).cumsum(1)) < 1e-15


def test_operators_stay_whole_and_name_their_line():
    program = traced(lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=x.shape[1], dim=1))
    names = [operator_name(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert "fft_rfft" in names
    assert "fft_irfft" in names
    node = next(n for n in program.graph.nodes if operator_name(n.target) == "fft_rfft")
    source = source_of(node)
    assert source is not None
    assert "test_capture.py:" in source


def test_writes_are_made_functional():
    def write(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0] = 0
        return y.mul_(2)

    program = traced(write)
    assert not any(
        getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in program.graph.nodes
    )
    x = features(2, 20, WIDTH)
    before = x.clone()
    assert gap(program.run(x), write(x)) < 1e-15
    assert torch.equal(x, before)


# Lengths


def test_guards_give_the_longest_length():
    table = torch.randn(50, WIDTH, dtype=torch.float64)
    program = traced(lambda x: x + table[: x.shape[1]])
    assert program.lengths.maximum == 50
    assert not program.lengths.admits(51)


def test_a_trace_is_made_near_the_length_that_is_wanted():
    def branch(x: Tensor) -> Tensor:
        return x if x.shape[1] <= 40 else 2 * x

    x = features(2, 80, WIDTH)
    for length, fewest in ((30, 1), (80, 41)):
        program = traced(branch, length, own=length - 10)
        assert program.lengths.admits(length)
        assert program.lengths.fewest == fewest
        assert gap(program.run(x[:, :length]), branch(x[:, :length])) < 1e-15


def test_a_finite_filter_is_traced_beyond_its_end():
    model = module(SPELLINGS["short_fft_128"], WIDTH, 130).double()
    program = trace_module(model, features(2, 9, WIDTH), length=130)
    x = features(2, 130, WIDTH)
    assert program.lengths.admits(130)
    assert gap(program.run(x), model(x)) < 1e-12


def test_a_batch_written_into_the_model_is_kept():
    program = traced(lambda x: x + torch.ones(2, 1, 1, dtype=x.dtype))
    assert program.batch == 2
    assert not isinstance(traced(lambda x: x + 1).batch, int)


# What is refused


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.last.copy_(x[0, -1])
        return x + self.last


def test_a_forward_that_writes_to_its_buffers():
    with pytest.raises(Unsupported) as caught:
        trace_module(Remembers(), features(2, 9, WIDTH))
    (refusal,) = caught.value.refusals
    assert refusal.kind == "mutation"
    assert "'last'" in refusal.reason


@pytest.mark.parametrize("name", by_speed(UNTRACEABLE, lambda n: n != "n_fast_length"))
def test_python_that_no_tracer_follows(name):
    model = module(UNTRACEABLE[name][0], WIDTH, L_MAX).double()
    try:
        program = trace_module(model, features(2, 9, WIDTH), length=60)
    except Unsupported:
        return
    # Or the trace holds for some lengths, and there it is the model.
    admitted = [n for n in range(program.lengths.fewest, 61) if program.lengths.admits(n)]
    assert admitted
    for n in {admitted[0], admitted[-1]}:
        x = features(2, n, WIDTH)
        assert gap(program.run(x), model(x)) < 1e-12


def test_branches_on_data():
    with pytest.raises(Unsupported) as caught:
        traced(lambda x: x if x.sum() > 0 else -x)
    assert caught.value.refusals[0].kind == "data_dependent"


def test_a_length_that_is_pinned():
    with pytest.raises(Unsupported):
        traced(lambda x: x * math.log(x.shape[1]))


def test_helpers_that_models_import_by_name(monkeypatch):
    """``from library import helper``: the name lives in the model's own module."""
    fftpack, models = types.ModuleType("scipy.fftpack"), types.ModuleType("some_model")

    def next_fast_len(target):
        return 1 << math.ceil(math.log2(target))

    fftpack.next_fast_len = models.next_fast_len = next_fast_len
    monkeypatch.setitem(sys.modules, "scipy.fftpack", fftpack)
    monkeypatch.setitem(sys.modules, "some_model", models)

    class Model(nn.Module):
        def forward(self, x):
            n = models.next_fast_len(2 * x.shape[1])
            k = torch.exp(-torch.arange(x.shape[1]) / 9)
            return torch.fft.irfft(torch.fft.rfft(x.mT, n) * torch.fft.rfft(k, n), n)[..., : x.shape[1]].mT

    x = torch.randn(2, 24, 3)
    program = trace_module(Model().eval(), x)
    torch.testing.assert_close(program.run(x), Model()(x))
    assert models.next_fast_len is fftpack.next_fast_len is next_fast_len


def test_tracing_leaves_torch_as_it_was():
    before = reference_transforms.math
    traced(lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1, norm="ortho"), x.shape[1], 1, "ortho"))
    with pytest.raises(Unsupported):
        traced(lambda x: x if x.sum() > 0 else -x)
    assert reference_transforms.math is before


class Keeps(nn.Module):
    """Keeps the filter it computed, and computes it anew only where it is too short."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(-3, 0, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        n = x.shape[1]
        if not hasattr(self, "k") or self.k.shape[-1] < n:
            self.k = torch.exp(-self.rate.exp()[:, None] * torch.arange(max(n, 8)))
        k = self.k[:, :n]
        y = torch.fft.irfft(torch.fft.rfft(x.mT, n=2 * n) * torch.fft.rfft(k, n=2 * n), n=2 * n)
        return y[..., :n].mT, None


def test_tracing_leaves_the_model_as_it_was():
    model, x = Keeps(), features(2, 30, WIDTH)
    program = trace_module(model, x[:, :9], length=64)
    assert not hasattr(model, "k")
    expected, _ = model(x)
    assert gap(program.run(x)[0], expected) < 1e-12
    kept = model.k
    trace_module(model, x[:, :9], length=64)
    assert model.k is kept
    assert gap(model(x)[0], expected) == 0


def test_comparing_leaves_the_model_as_it_was():
    model, x = Keeps(), features(2, 30, WIDTH)
    program = trace_module(model, x[:, :9], length=64)
    disagreements(program, model)  # with weights moved, as whenever they are new
    assert not hasattr(model, "k")


class KeepsPositions(nn.Module):
    """Keeps positions, not weights; its poles grow where they are moved far."""

    def __init__(self):
        super().__init__()
        self.pole = nn.Parameter(torch.linspace(0.9, 0.999, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        n = x.shape[1]
        if not hasattr(self, "t") or self.t.shape[-1] < n:
            self.t = torch.arange(n)
        k = self.pole[:, None] ** self.t[:n]
        y = torch.fft.irfft(torch.fft.rfft(x.mT, n=2 * n) * torch.fft.rfft(k, n=2 * n), n=2 * n)
        return y[..., :n].mT, None


def test_a_model_that_ran_before_is_traced_for_longer():
    model, x = KeepsPositions(), features(2, 50, WIDTH).float()
    expected, _ = model(x)
    program = trace_module(model, x[:, :9], length=200)
    assert program.lengths.admits(200)
    assert program.lengths.fewest == 1
    assert gap(program.run(torch.cat([x, x], 1))[0][:, :50], expected) < 1e-5
