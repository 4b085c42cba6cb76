"""Convolutions that mix channels: dense, grouped and complex ones, in one bank with a sum for each output channel."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fft import fft, ifft, irfft, rfft

from decoding import decoded, decoder, features, gap, rounding
from fi_compile.kernels import channels
from fi_compile.kernels.prefix import prefix_reference, write_prefix
from fi_compile.kernels.tile import add_tile_direct, add_tile_fft, tile_reference, tile_spectrum
from fi_compile.mixers import convolution
from fi_compile.mixers.pairs import find_pairs
from fi_compile.mixers.reference import convolve

WIDTH, MOST = 4, 400


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Mixer(nn.Module):
    """A dense filter [out, in, lag], a complex one, and projections."""

    def __init__(self):
        super().__init__()
        decay = torch.exp(-torch.arange(MOST) / 60)
        self.k = nn.Parameter(torch.randn(WIDTH, WIDTH, MOST) * decay / 4)
        self.c = nn.Parameter(torch.randn(WIDTH, MOST, 2) * decay[:, None] / 3)
        self.project, self.back = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def long(self, length: int) -> Tensor:
        return rfft(self.k[:, :, :length], n=2 * length)

    def complex(self, x: Tensor, joined: bool) -> Tensor:
        length = x.shape[1]
        u = torch.view_as_complex(self.project(x).unflatten(-1, (WIDTH, 2))) if joined else x
        k = fft(torch.view_as_complex(self.c[:, :length]), n=2 * length)
        return ifft(fft(u.mT, n=2 * length) * k, n=2 * length)[..., :length].mT


class ByEinsum(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        n = 2 * x.shape[1]
        y = torch.einsum("bif,oif->bof", rfft(x.mT, n=n), self.long(x.shape[1]))
        return irfft(y, n=n)[..., : x.shape[1]].mT


class ByMatrix(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        n = 2 * x.shape[1]
        y = self.long(x.shape[1]).permute(2, 0, 1) @ rfft(x, n=n, dim=1).unsqueeze(-1)
        return irfft(y.squeeze(-1), n=n, dim=1)[:, : x.shape[1]]


class Triangular(Mixer):
    """Output o reads inputs 0 … o: another fan-in for each."""

    def forward(self, x: Tensor) -> Tensor:
        n, mask = 2 * x.shape[1], torch.ones(WIDTH, WIDTH, device=x.device).tril()[..., None]
        y = (rfft(x.mT, n=n)[:, None] * (self.long(x.shape[1]) * mask)).sum(2)
        return irfft(y, n=n)[..., : x.shape[1]].mT


class Conv1d(Mixer):
    def __init__(self, taps: int, groups: int = 1, bias: bool = True):
        super().__init__()
        self.taps, self.conv = taps, nn.Conv1d(WIDTH, 2 * WIDTH, taps, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.conv(F.pad(x.mT, (self.taps - 1, 0))).mT)


class Sums(Mixer):
    """Running sums of all channels, mixed inside one operator."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        lower = torch.ones(length, length, device=x.device, dtype=x.dtype).tril()
        return torch.einsum("ij,bjc,oc->bio", lower, x, self.k[:, :, 0])


class Complex(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.view_as_real(self.complex(x, True)).flatten(2))


class RealOfComplex(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return self.complex(x, True).real


class ComplexFilter(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return self.complex(x, False).abs()


class ComplexOutput(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return self.complex(x, True)


class ComplexModes(Mixer):
    """A complex diagonal state space: modes that share no conjugates."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        t = torch.arange(length, device=x.device)
        log_p = torch.complex(-0.01 * self.c[:, 0, 0].exp(), 3 * self.c[:, 0, 1])
        u = torch.view_as_complex(self.project(x).unflatten(-1, (WIDTH, 2))).mT
        k = torch.exp(log_p[:, None] * t)
        y = ifft(fft(u, n=2 * length) * fft(k, n=2 * length), n=2 * length)[..., :length]
        return self.back(torch.view_as_real(y.mT).flatten(2))


class InSeries(Mixer):
    """Dense and channelwise filters in one stack, the second reading the first."""

    def forward(self, x: Tensor) -> Tensor:
        n = 2 * x.shape[1]
        y = torch.einsum("bif,oif->bof", rfft(x.mT, n=n), self.long(x.shape[1]))
        y = torch.relu(irfft(y, n=n)[..., : x.shape[1]])
        z = rfft(y, n=n) * self.long(x.shape[1])[0]
        return irfft(z, n=n)[..., : x.shape[1]].mT


MODELS = {
    "einsum": (ByEinsum, ("tiles",), 4),
    "matrix": (ByMatrix, ("tiles",), 4),
    "triangular": (Triangular, ("tiles",), 4),
    "conv1d_5": (lambda: Conv1d(5), ("window",), 4),
    "conv1d_5_groups": (lambda: Conv1d(5, 2), ("window",), 2),
    "conv1d_300": (lambda: Conv1d(300, bias=False), ("tiles",), 4),
    "complex": (Complex, ("tiles",), 2),
    "real_of_complex": (RealOfComplex, ("tiles",), 2),
    "complex_filter": (ComplexFilter, ("tiles",), 1),
    "complex_output": (ComplexOutput, ("tiles",), 2),
    "in_series": (InSeries, ("tiles", "tiles"), 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_mixed_channels_decode_exactly(name):
    make, lowerings, fan_in = MODELS[name]
    model, x = make().double().eval(), features(2, 130, WIDTH)
    dec = decoder(model, x[:, :9], max_length=MOST)
    assert tuple(m.lowering for m in dec.report.mixers) == lowerings
    assert next(iter(dec.engine.derived(1).step.mixers)).fan_in == fan_in
    expected = model(x)
    for prompt in (2, 33):
        found = decoded(dec, x, prompt)
        assert found.dtype == expected.dtype
        assert float((found - expected[:, prompt - 1 :]).abs().max()) < 1e-10 * float(expected.abs().max())
    dec.rewind(40)
    assert float((dec.step(x[:, 40]) - expected[:, 40]).abs().max()) < 1e-10
    grown = decoder(model, x[:, :9], capacity=64)
    assert float((decoded(grown, x, 60) - expected[:, 59:]).abs().max()) < 1e-10


@pytest.mark.parametrize("name", ["einsum", "conv1d_5", "complex"])
def test_float32_stays_within_rounding(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    torch.manual_seed(0)
    double, x = MODELS[name][0]().double().eval(), features(2, 130, WIDTH).float()
    assert rounding(decoder(model, x[:, :9], max_length=MOST), model, double, x, 7) <= 3


def test_a_complex_state_space_is_a_recurrence():
    model, x = ComplexModes().eval(), features(2, 130, WIDTH).float()
    dec = decoder(model, x[:, :9], max_length=MOST)
    assert [m.lowering for m in dec.report.mixers] == ["recurrence"]
    assert gap(decoded(dec, x, 7), model(x)[:, 6:]) < 1e-5


def test_the_compiled_step_is_exact():
    model, x = InSeries().eval(), features(2, 80, WIDTH).float()
    dec = decoder(model, x[:, :9], max_length=MOST, step="inductor")
    assert gap(decoded(dec, x, 20), model(x)[:, 19:]) < 1e-5


class LateMeeting(Mixer):
    """Channelwise for sixty lags; channels meet only further back than samples are long."""

    def forward(self, x: Tensor) -> Tensor:
        n, lag = 2 * x.shape[1], torch.arange(x.shape[1], device=x.device)
        own = torch.eye(WIDTH, device=x.device)[..., None] * (lag < 60)
        k = self.k[:, :, : x.shape[1]] * torch.where(lag < 60, own, 1.0)
        y = torch.einsum("bif,oif->bof", rfft(x.mT, n=n), rfft(k, n=n))
        return irfft(y, n=n)[..., : x.shape[1]].mT


def test_channels_that_meet_late_are_not_missed():
    model, x = LateMeeting().double().eval(), features(2, 200, WIDTH)
    dec = decoder(model, x[:, :9], max_length=MOST)
    assert gap(decoded(dec, x, 100), model(x)[:, 99:]) < 1e-10
    assert [m.kind for m in dec.report.mixers] == ["region"]


def test_channels_that_meet_only_beyond_the_first_capacity():
    model, x = LateMeeting().double().eval(), features(2, 200, WIDTH)
    dec = decoder(model, x[:, :9], capacity=32)
    assert [m.kind for m in dec.report.mixers] == ["long_conv"]
    assert gap(decoded(dec, x, 20), model(x)[:, 19:]) < 1e-10


def test_too_many_long_filters_stay_a_region_with_the_reason(monkeypatch):
    monkeypatch.setattr(convolution, "_MOST_VALUES", 16 * 100)
    x = features(2, 130, WIDTH)
    model = ByEinsum().double().eval()
    dec = decoder(model, x[:, :9], max_length=MOST)
    assert [m.kind for m in dec.report.mixers] == ["region"]
    assert any("too many to keep" in note for note in dec.report.notes)
    assert gap(decoded(dec, x, 100), model(x)[:, 99:]) < 1e-10


def test_short_filters_are_extracted_shorter_than_the_capacity(monkeypatch):
    monkeypatch.setattr(convolution, "_MOST_VALUES", 32 * 20)
    model, x = Conv1d(5).double().eval(), features(2, 130, WIDTH)
    dec = decoder(model, x[:, :9], capacity=64)
    assert [(m.kind, m.filter_length) for m in dec.report.mixers] == [("short_conv", 5)]
    assert gap(decoded(dec, x, 10), model(x)[:, 9:]) < 1e-10


# kernels and probing


@pytest.mark.parametrize("quantum", [channels.QUANTUM, 40])
@pytest.mark.parametrize("side", [1, 2, 63])
def test_tiles_and_prefixes_sum_their_pairs(side, quantum, monkeypatch):
    monkeypatch.setattr(channels, "QUANTUM", quantum)
    source, target = torch.tensor([2, 0, 1, 1, 0, 2, 2]), torch.tensor([0, 0, 0, 1, 2, 2, 3])
    inputs, filters = torch.randn(2, 3, side).double(), torch.randn(7, 2 * side).double()
    expected = torch.zeros(2, 4, side).double()
    for p in range(7):
        expected[:, target[p]] += tile_reference(inputs, filters[p : p + 1], side, source[p : p + 1])[:, 0]
    assert gap(tile_reference(inputs, filters, side, source, None, target), expected) < 1e-13
    for add, weights in ((add_tile_direct, filters), (add_tile_fft, tile_spectrum(filters, side))):
        found = torch.ones(2, 4, side).double()
        add(found, inputs, weights, source, None, target)
        assert gap(found - 1, expected) < 1e-12
    written = torch.full((2, 4, side), torch.nan).double()
    write_prefix(written, inputs, filters, source, None, target)
    assert gap(written, prefix_reference(inputs, filters, source, None, target)) < 1e-12


@pytest.mark.parametrize("rows", [1, 2])
def test_pairs_are_found_and_their_filters_extracted(rows):
    """Outputs that read none, one, two and three of four inputs."""
    reads = [[], [3], [0, 2], [1, 2, 3], [0]]
    kernel = torch.zeros(5, 4, 20).double()
    for o, inputs in enumerate(reads):
        kernel[o, inputs] = torch.randn(len(inputs), 20).double()
    everything = torch.arange(4).repeat(5)

    def response(flat: Tensor) -> Tensor:
        return convolve(flat, kernel.flatten(0, 1), everything, 4)

    pairs = find_pairs(response, rows, 4, 20)
    assert pairs is not None
    assert pairs.fan_in == 3
    assert pairs.live is not None
    assert int(pairs.live.sum()) == 7
    assert int(pairs.colours.max()) + 1 == 3
    found = pairs.kernel(response, 4, 20)
    for p, (source, live) in enumerate(zip(pairs.source.tolist(), pairs.live.tolist(), strict=True)):
        assert gap(found[p], kernel[p // 3, source] if live else torch.zeros(20).double()) < 1e-12
    assert find_pairs(lambda flat: response(flat) + response(flat.roll(1, 1).square()), rows, 4, 20) is None
