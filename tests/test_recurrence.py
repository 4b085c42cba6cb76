"""Filters that are sums of exponentials: found, checked over the capacity, decoded with a state that does not grow."""

import math

import pytest
import torch
from torch import Tensor, nn

from corpus import SPELLINGS
from decoding import decoded, decoder, features, gap, lanes, module, rounding, stacked
from fi_compile import Decoder
from fi_compile.kernels import modes as modes_kernel
from fi_compile.kernels.modes import (
    Modes,
    fit_modes,
    fourier_modes,
    modal_error,
    modal_filter,
    modal_filter_reference,
    modal_rounding,
)
from fi_compile.kernels.recurrence import final_state, recurrence_step, states_reference
from fi_compile.mixers.convolution import Filter
from fi_compile.mixers.recurrence import Recurrence

EPS = torch.finfo(torch.float32).eps
CHANNELS = 5


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def random_modes(pairs: int, reals: int = 0, slowest: float = 1e-3) -> Modes:
    """Poles at all angles, memories of 1 … 1/slowest positions."""
    size = 1 - slowest ** uniform(CHANNELS, pairs + reals)
    angle = math.pi * uniform(CHANNELS, pairs + reals)
    poles = torch.polar(size, angle)
    poles[:, pairs:] = size[:, pairs:].to(poles.dtype)
    residues = torch.complex(normal(*poles.shape), normal(*poles.shape))
    residues.imag[:, pairs:] = 0
    return Modes(poles, residues, normal(CHANNELS))


def s4d(length: int, states: int) -> Tensor:
    """The kernel of S4D-Lin (arXiv 2206.11893, section 4): steps of 0.001 … 0.1, frequencies πn."""
    step = 10 ** (-3 + 2 * uniform(CHANNELS, 1))
    a = torch.complex(torch.full((states // 2,), -0.5), math.pi * torch.arange(states // 2)).to(
        torch.complex128
    )
    c = (
        torch.complex(normal(CHANNELS, states // 2), normal(CHANNELS, states // 2))
        * (torch.exp(step * a) - 1)
        / a
    )
    t = torch.arange(length)
    return 2 * (c[..., None] * torch.exp(step[..., None] * a[:, None] * t)).sum(1).real


def averages(length: int) -> Tensor:
    rate = 10 ** (-3 + 2.5 * uniform(CHANNELS, 1))
    return rate * torch.exp(-rate * torch.arange(length, dtype=torch.float64))


def rational(length: int) -> Tensor:
    """RTF (arXiv 2405.06147) with a transform of `length` points: lag `length` falls on lag 0."""
    radius, angle = 1 - 0.001 * uniform(CHANNELS), math.pi * uniform(CHANNELS)
    a = torch.stack([torch.ones(CHANNELS), -2 * radius * angle.cos(), radius**2], -1)
    return torch.fft.irfft(torch.fft.rfft(normal(CHANNELS, 3), length) / torch.fft.rfft(a, length), length)


# kernels


@pytest.mark.parametrize("length", [1, 2, 63, 500])
def test_a_modal_filter_by_products_equals_the_definition(length):
    modes = random_modes(3, 2)
    modes.poles[0, 0] = modes.residues[0, 0] = 0
    found, expected = modal_filter(modes, length), modal_filter_reference(modes, length)
    assert found.shape == (CHANNELS, length)
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    assert modes.order == 8


@pytest.mark.parametrize("length", [1, 2, 23, 64])
def test_few_lags_are_their_fourier_series(length):
    kernel = normal(CHANNELS, length)
    modes = fourier_modes(kernel)
    assert float(modal_error(modes, kernel).max()) < 1e-13
    assert modes.order <= max(length - 1, 1)


@pytest.mark.parametrize("length", [1, 2, 63, 500])
def test_the_state_after_a_prompt_is_that_after_its_steps(length):
    modes = random_modes(2, 1)
    poles = torch.stack([modes.poles.real, modes.poles.imag])
    residues = torch.stack([modes.residues.real, modes.residues.imag])
    u = normal(2, CHANNELS, length)
    states = states_reference(u, poles)
    assert gap(final_state(u, poles), states[-1]) < 1e-13
    source = torch.tensor([4, 0, 0, 1, 3])
    assert gap(final_state(u, poles, source), states_reference(u[:, source], poles)[-1]) < 1e-13
    kernel = modal_filter(modes, length + 1)
    for t in (0, length - 1):
        before = states[t - 1] if t else torch.zeros_like(states[0])
        z, after = recurrence_step(before, u[:, :, t], poles, residues, modes.skip)
        assert gap(z, (u[:, :, : t + 1] * kernel[:, : t + 1].flip(-1)).sum(-1)) < 1e-12
        assert gap(after, states[t]) < 1e-13


FILTERS = {
    "average": (averages, 1),
    "rational": (rational, 2),
    "s4d_16": (lambda n: s4d(n, 16), 16),
    "s4d_64": (lambda n: s4d(n, 64), 64),
    "pairs": (lambda n: modal_filter(random_modes(8), n), 16),
    "many_pairs": (lambda n: modal_filter(random_modes(32), n), 64),
    "mixed": (lambda n: modal_filter(random_modes(3, 4), n), 10),
}


@pytest.mark.parametrize("name", FILTERS)
def test_sums_of_exponentials_are_found(name):
    make, order = FILTERS[name]
    kernel = make(8192)
    modes = fit_modes(kernel, EPS / 8)
    assert modes is not None
    assert modes.order <= order
    norm = kernel.norm(dim=-1)
    assert ((modal_filter(modes, 8192) - kernel).norm(dim=-1) <= EPS / 8 * norm).all()
    assert (torch.finfo(torch.float64).eps * modal_rounding(modes, 8192) <= EPS / 8 * norm).all()
    assert float(modes.poles.abs().max()) <= 1


def oscillating(length: int) -> Tensor:
    """Hyena's kind: sines of sines under a decay."""
    t = torch.linspace(0, 1, length, dtype=torch.float64)
    inner = torch.sin(uniform(CHANNELS, 8, 1) * 60 * t + uniform(CHANNELS, 8, 1))
    return torch.exp(-3 * t) * (normal(CHANNELS, 8, 1) * torch.sin(14 * inner)).sum(1)


@pytest.mark.parametrize("length", [1024, 8192])
def test_other_filters_are_refused_before_a_pole_is_looked_for(length, monkeypatch):
    monkeypatch.setattr(modes_kernel, "_fit_channels", lambda *args: pytest.fail("looked for poles"))
    noise = normal(CHANNELS, length) * torch.exp(-torch.arange(length) / 300)
    for kernel in (oscillating(length), noise):
        assert fit_modes(kernel, EPS / 8) is None


@pytest.mark.parametrize("loudness", [1, 1e-20])
def test_one_channel_that_is_no_sum_of_exponentials_refuses_all(loudness):
    kernel = averages(1024).repeat(8, 1)
    kernel[17, 700] += 1e-5 * float(kernel[17].norm())
    kernel[17] *= loudness
    assert fit_modes(kernel, EPS / 8) is None


def test_the_bound_on_rounding_holds():
    """In float32, for an input that keeps its sign, over the memory of a slow mode."""
    modes = Modes(
        *(torch.tensor([[v]], dtype=torch.complex128) for v in (1 - 1e-4, 1)), skip=torch.ones(1).double()
    )
    u = uniform(1, 1, 20_000).float()
    poles = torch.stack([modes.poles.real, modes.poles.imag])
    exact = states_reference(u.double(), poles)[:, 0, 0, 0, 0]
    rounded = states_reference(u, poles.float())[:, 0, 0, 0, 0].double()
    # What the pole lost when it was rounded to float32 is not the recurrence's.
    again = states_reference(u.double(), poles.float().double())[:, 0, 0, 0, 0]
    error, bound = (
        (rounded - again).abs().max(),
        EPS * float(modal_rounding(modes, 20_000)) * u.double().norm(),
    )
    assert error <= bound
    assert error > EPS * exact.abs().max() * 3  # and float32 is no place for it


# the increment


@pytest.mark.parametrize("sign", ["any", "same"])
@pytest.mark.parametrize("name", ["s4d_64", "average", "rational"])
def test_16384_steps_stay_within_rounding(name, sign):
    length = 16_384
    kernel = FILTERS[name][0](length)
    modes = fit_modes(kernel, EPS / 8)
    assert modes is not None
    increment = Recurrence(CHANNELS)
    weights = increment.weights(Filter(kernel, None, modes), torch.arange(CHANNELS), torch.float32)
    ring = increment.ring(1, weights)
    u = (normal(1, CHANNELS, length) if sign == "any" else uniform(1, CHANNELS, length)).float()
    found = [increment.step(ring, torch.tensor([t]), u[:, :, t], weights).float() for t in range(length)]
    size = 2 * length
    expected = torch.fft.irfft(torch.fft.rfft(u.double(), size) * torch.fft.rfft(kernel, size), size)[
        ..., :length
    ]
    error = (torch.stack(found, -1).double() - expected).abs().amax(-1)[0]
    assert (error <= 3 * EPS * u[0].double().norm(dim=-1) * kernel.norm(dim=-1)).all()


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 40])
def test_filling_equals_stepping(length):
    kernel = modal_filter(random_modes(2, 1), 64)
    increment = Recurrence(CHANNELS)
    weights = increment.weights(Filter(kernel, None), torch.arange(CHANNELS), torch.float32)
    weights["source"] = torch.tensor([1, 1, 0, 2, 2])
    u = normal(2, 3, length).float()
    stepped, filled = increment.ring(2, weights), increment.ring(2, weights).fill_(7)
    for t in range(length):
        increment.step(stepped, torch.tensor([t]), u[:, :, t], weights)
    increment.fill(filled, u, weights)
    torch.testing.assert_close(filled, stepped, rtol=1e-12, atol=1e-12)


# in a model

MODAL = ("filter_real_modes", "filter_complex_modes", "filter_rational_fixed_length", "filter_cached_table")
WIDTH, MOST = 4, 1500


def own(name: str = "filter_complex_modes", **options):
    model = module(SPELLINGS[name], WIDTH, MOST)
    return model, decoder(model, features(2, 9, WIDTH).float(), **options)


def check(found: Tensor, expected: Tensor) -> None:
    assert gap(found, expected) < 1e-5


@pytest.mark.parametrize("name", MODAL)
def test_modal_models_run_as_recurrences(name):
    model, dec = own(name, max_length=MOST)
    (mixer,) = dec.report.mixers
    assert (mixer.kind, mixer.lowering, mixer.filter_length) == ("long_conv", "recurrence", MOST)
    assert "modes" in mixer.cost
    assert dec.report.schedule is None
    double = module(SPELLINGS[name], WIDTH, MOST).double()
    x = features(2, 400, WIDTH).float()
    for prompt, sequence in ((1, x), (250, x.abs())):
        assert rounding(dec, model, double, sequence, prompt) <= 3
    assert lanes(dec)[0].conv is None


@pytest.mark.parametrize("name", ["filter_plain", "filter_implicit_mlp_decay"])
def test_other_models_keep_their_tiles(name):
    _, dec = own(name, max_length=MOST)
    assert [m.lowering for m in dec.report.mixers] == ["tiles"]


def test_float64_models_keep_their_tiles():
    model = module(SPELLINGS["filter_real_modes"], WIDTH, MOST).double()
    dec = decoder(model, features(2, 9, WIDTH), max_length=MOST)
    assert [m.lowering for m in dec.report.mixers] == ["tiles"]


def test_state_and_work_do_not_depend_on_the_capacity():
    small, large = (own("filter_complex_modes", max_length=n)[1] for n in (300, MOST))
    lane, longer = lanes(small)[0], lanes(large)[0]
    assert lane.state_bytes == longer.state_bytes
    nodes = [[n.target for n in d.engine.step_graph().graph_module.graph.nodes] for d in (small, large)]
    assert nodes[0] == nodes[1]
    assert MOST not in {size for t in longer.tensors.values() for size in t.shape}


def test_going_back_a_little_is_free_and_far_is_a_new_start(monkeypatch):
    model, dec = own(max_length=MOST)
    x = features(2, 200, WIDTH).float()
    expected = model(x)
    dec.prefill(x[:, :100])
    for t in range(100, 140):
        dec.step(x[:, t])
    forward, calls = dec.engine.forward, []
    monkeypatch.setattr(dec.engine, "forward", lambda *args: calls.append(1) or forward(*args))
    for back, forwards in ((139, 0), (126, 0), (90, 1)):
        dec.rewind(back)
        check(dec.step(x[:, back]), expected[:, back])
        assert len(calls) == forwards
    dec.rewind(0)
    check(stacked([dec.step(x[:, t]) for t in range(30)]), expected[:, :30])


def test_forks_reorders_and_ragged_rows():
    model, dec = own(max_length=MOST)
    x = features(2, 120, WIDTH).float()
    other = features(2, 120, WIDTH, seed=5).float()
    expected = model(x)
    dec.prefill(x[:, :50])
    copy = dec.fork()
    for t in range(50, 60):
        copy.step(other[:, t])
    check(dec.step(x[:, 50]), expected[:, 50])
    dec.reorder([1, 1, 0])
    check(dec.step(x[[1, 1, 0], 51]), expected[[1, 1, 0], 51])
    mixed = torch.cat([x[:, :50], other[:, 50:61]], 1)
    check(copy.step(other[:, 60]), model(mixed)[:, 60])
    dec.prefill(x[:, :50], [50, 20])
    check(dec.step(torch.stack([x[0, 50], x[1, 20]]))[1], expected[1, 20])


def grown(by: str, dec: Decoder, x: Tensor, expected: Tensor) -> None:
    """Go beyond the capacity from position 100, one way or another."""
    dec.prefill(x[:, :100])
    match by:
        case "step":
            check(stacked([dec.step(x[:, t]) for t in range(100, 300)]), expected[:, 100:300])
        case "extend":
            check(dec.extend(x[:, 100:]), expected[:, 100:])
        case "prefill":
            check(dec.prefill(x), expected[:, -1])


@pytest.mark.parametrize("by", ["step", "extend", "prefill"])
def test_growth_keeps_the_modes(by, monkeypatch):
    model, dec = own(capacity=128)
    x = features(2, 700, WIDTH).float()
    expected = model(x)
    monkeypatch.setattr(dec.engine, "enlarged", lambda capacity: pytest.fail("analysed again"))
    grown(by, dec, x, expected)
    assert [m.lowering for m in dec.report.mixers] == ["recurrence"]
    assert lanes(dec)[0].derived.capacity > 128


class Late(nn.Module):
    """A sum of exponentials up to lag 200, half of it from there on."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(0.01 * torch.rand(WIDTH) + 0.003)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        lag = torch.arange(length, device=x.device)
        k = torch.exp(-self.rate[:, None] * lag) * torch.where(lag < 200, 1.0, 0.5)
        product = torch.fft.rfft(x.mT, n=2 * length) * torch.fft.rfft(k, n=2 * length)
        return torch.fft.irfft(product, n=2 * length)[..., :length].mT


@pytest.mark.parametrize("by", ["step", "extend", "prefill"])
def test_a_filter_that_is_no_longer_modal_at_growth(by):
    model, x = Late().eval(), features(2, 400, WIDTH).float()
    dec = decoder(model, x[:, :9], capacity=128)
    assert [m.lowering for m in dec.report.mixers] == ["recurrence"]
    expected = model(x)
    grown(by, dec, x, expected)
    assert [m.lowering for m in dec.report.mixers] == ["tiles"]


def test_changed_weights_change_the_modes():
    model, dec = own(max_length=MOST)
    x = features(2, 200, WIDTH).float()
    dec.prefill(x[:, :100])
    for parameter in model.parameters():
        parameter.mul_(1.1)
    check(dec.prefill(x[:, :150]), model(x)[:, 149])
    check(dec.step(x[:, 150]), model(x)[:, 150])


def test_the_compiled_step_is_exact():
    model, dec = own(max_length=MOST, step="inductor")
    x = features(2, 60, WIDTH).float()
    check(decoded(dec, x, 20), model(x)[:, 19:])


@pytest.mark.slow
def test_a_whole_model_over_16384_positions():
    length = 16_384
    model, double = (module(SPELLINGS["filter_complex_modes"], 2, length) for _ in range(2))
    x = features(1, length, 2).float()
    dec = decoder(model, x[:, :9], max_length=length)
    assert [m.lowering for m in dec.report.mixers] == ["recurrence"]
    assert rounding(dec, model, double.double(), x, 1) <= 3
