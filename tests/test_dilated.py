"""Filters of few lags far apart, such as dilated convolutions: a step reads the rows that count and no others."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fi_compile
from decoding import decoded, decoder, features, forks_and_beams, gap, goes_back
from fi_compile.kernels.short_conv import short_conv_step, short_conv_step_reference

WIDTH, LENGTH = 4, 420


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Dilated(nn.Module):
    """Causal convolutions of ever larger dilation, gated; depthwise, or of all channels."""

    def __init__(self, dilations=(1, 3, 70, 150), taps=3, groups=1):
        super().__init__()
        self.dilations, self.taps = dilations, taps
        self.convs = nn.ModuleList(
            nn.Conv1d(WIDTH, 2 * WIDTH, taps, dilation=d, groups=groups) for d in dilations
        )
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        for conv, dilation in zip(self.convs, self.dilations, strict=True):
            a, b = conv(F.pad(x, (dilation * (self.taps - 1), 0))).chunk(2, 1)
            x = x + 3 * torch.tanh(a) * torch.sigmoid(b)
        return x.mT


class Unevenly(nn.Module):
    """Echoes at lags that are no multiples of one another, not of the newest row."""

    def __init__(self, lags=(2, 71, 200)):
        super().__init__()
        self.lags = lags
        self.gain = nn.Parameter(torch.rand(len(lags), WIDTH, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        echoes = [
            F.pad(x, (0, 0, lag, 0))[:, : x.shape[1]] * g for lag, g in zip(self.lags, self.gain, strict=True)
        ]
        return torch.relu(sum(echoes)) + x


@pytest.mark.parametrize("groups", [1, 2, WIDTH])
def test_dilated_convolutions_keep_windows_and_decode_exactly(groups):
    model, x = Dilated(groups=groups), features(2, LENGTH, WIDTH)
    dec = decoder(model, x[:, :9], max_length=LENGTH)
    assert {(m.kind, m.lowering) for m in dec.report.mixers} == {("short_conv", "window")}
    assert [m.filter_length for m in dec.report.mixers] == [3, 7, 141, 301]
    expected = model(x)
    for prompt in (1, 80, 350):
        assert gap(decoded(dec, x, prompt), expected[:, prompt - 1 :]) < 1e-12
    goes_back(model, dec, x, (390, 200, 3), 12)
    forks_and_beams(model, dec, WIDTH)


def test_a_step_reads_the_lags_that_count():
    dec = decoder(Dilated(), features(1, 9, WIDTH), max_length=LENGTH)
    weights = dec.engine.derived(1, LENGTH).constants
    taps = sorted(len(t) for name, t in weights.items() if name.startswith("kernel:"))
    assert taps == [3, 3, 3, 3]


def test_uneven_lags_and_growth():
    model, x = Unevenly(), features(2, LENGTH, WIDTH)
    dec = decoder(model, x[:, :9], capacity=64)  # the farthest echoes appear as it grows
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-12
    dec = decoder(model, x[:, :9], max_length=LENGTH)
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-12
    assert {m.lowering for m in dec.report.mixers} == {"window"}


class Sparse(nn.Module):
    """A filter that is a parameter, with most taps zero for now."""

    def __init__(self):
        super().__init__()
        taps = torch.zeros(WIDTH, 1, 90, dtype=torch.float64)
        taps[..., [0, 40, 89]] = torch.tensor([0.5, -1.0, 1.0], dtype=torch.float64)
        self.taps = nn.Parameter(taps)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(F.conv1d(F.pad(x.mT, (89, 0)), self.taps, groups=WIDTH)).mT


def test_taps_that_are_zero_for_now_may_come_alive():
    model, x = Sparse(), features(1, LENGTH, WIDTH)
    dec = decoder(model, x[:, :9], max_length=LENGTH)
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-12
    model.taps += torch.rand_like(model.taps)
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-12


def test_the_compiled_step_is_the_step():
    model, x = Dilated((1, 70)).float(), features(1, 200, WIDTH).float()
    dec = fi_compile.decoder(model, x[:, :9], max_length=200)
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-5


@pytest.mark.parametrize("source", [None, torch.tensor([2, 0, 0, 1, 1, 2])])
def test_the_kernel_is_its_definition(source):
    ring, x = torch.randn(90, 2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    fan_in, lags = (1, torch.tensor([7, 8, 80])) if source is None else (2, torch.tensor([33]))
    kernel = torch.randn(len(lags) + 1, 3 if source is None else 6, dtype=torch.float64)
    expected, after = short_conv_step_reference(ring, 131, x, kernel, source, fan_in, lags)
    found = short_conv_step(ring, torch.tensor([131]), x, kernel, source, fan_in, lags)
    torch.testing.assert_close(found, expected)
    assert torch.equal(ring, after)
