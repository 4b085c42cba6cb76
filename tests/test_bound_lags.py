"""A filter that is proved to end is evaluated no further than that, and what is proved is never less than it has."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fft import irfft, rfft

import fi_compile
from decoding import decoded, decoder, features, gap
from fi_compile.decoder import build_engine
from fi_compile.mixers import convolution
from fi_compile.options import read_options
from fi_compile.passes.bound_lags import bound_lags

WIDTH, MOST = 3, 2048


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Taps(nn.Module):
    """A causal convolution of few taps in one of several spellings, beside a long one; everything has a bias."""

    def __init__(self, spelling: str, taps: int = 5, dilation: int = 1):
        super().__init__()
        self.spelling, self.taps, self.dilation = spelling, taps, dilation
        self.conv = nn.Conv1d(WIDTH, WIDTH, taps, dilation=dilation, groups=WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3)
        self.table = nn.Parameter(torch.randn(WIDTH, taps))
        self.shift = nn.Parameter(torch.randn(WIDTH, 1))
        self.long = nn.Parameter(torch.randn(WIDTH, MOST) * torch.exp(-torch.arange(MOST) / 200.0) / 8)

    def short(self, x: Tensor) -> Tensor:
        length, reach = x.shape[-1], (self.taps - 1) * self.dilation
        if self.spelling == "padded":
            return self.conv(F.pad(x, (reach, 0)))
        if self.spelling == "cut":
            return F.conv1d(x, self.conv.weight, self.conv.bias, 1, reach, self.dilation, WIDTH)[..., :length]
        if self.spelling == "series":
            return self.mix(F.pad(self.conv(F.pad(x, (reach, 0))) + self.shift, (2, 0)))
        if self.spelling == "spectrum":
            n = 2 * length
            return irfft(rfft(x, n=n) * rfft(self.table[:, :length], n=n), n=n)[..., :length] + self.shift
        shifted = [F.pad(x, (i, 0))[..., :length] * self.table[:, i, None] for i in range(self.taps)]
        return torch.stack(shifted).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        n = 2 * x.shape[1]
        z = torch.tanh(self.short(x.mT))
        y = irfft(rfft(z, n=n) * rfft(self.long[:, : x.shape[1]], n=n), n=n)[..., : x.shape[1]]
        return (y + z).mT


def mixers_of(model: nn.Module, capacity: int = MOST):
    engine = build_engine(model, features(1, 20, WIDTH).double(), read_options(None, max_length=capacity))
    return engine, [unit.mixer for unit in engine.plan.units if unit.mixer is not None]


@pytest.mark.parametrize(
    ("spelling", "taps", "dilation", "expected"),
    [("padded", 5, 1, 5), ("padded", 4, 7, 22), ("cut", 5, 3, 13), ("sum", 4, 1, 4)],
)
def test_bounds_are_those_of_the_operators(spelling, taps, dilation, expected):
    engine, mixers = mixers_of(Taps(spelling, taps, dilation).double())
    bounds = {m.kind: bound_lags(engine.proof, m.unit, m.x) for m in mixers}
    assert bounds == {"short_conv": expected, "long_conv": MOST}
    assert {m.kind: m.bound for m in mixers} == {"short_conv": expected, "long_conv": None}


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["padded", "cut", "series", "spectrum", "sum"]),
    st.integers(1, 9),
    st.integers(1, 6),
)
def test_no_filter_is_longer_than_its_bound(spelling, taps, dilation):
    engine, mixers = mixers_of(Taps(spelling, taps, dilation).double(), capacity=300)
    for mixer in mixers:
        bound = bound_lags(engine.proof, mixer.unit, mixer.x)
        found = convolution.replace(mixer, bound=None, kind="long_conv", ends=False)
        kernel = found.derive(engine.double_values, 300).kernel
        rounding = 1e-14 * float(kernel.norm(dim=-1).max()) if spelling == "spectrum" else 0.0
        assert not (kernel[:, bound:].abs() > rounding).any()


@pytest.mark.parametrize("spelling", ["padded", "series", "spectrum"])
def test_short_filters_are_evaluated_at_few_positions(spelling, monkeypatch):
    lengths: dict[str, set[int]] = {}
    plain = convolution.UnitFunction.__call__

    def counting(self, value):
        lengths.setdefault(self.unit.exit.name, set()).add(self.length)
        return plain(self, value)

    monkeypatch.setattr(convolution.UnitFunction, "__call__", counting)
    model = Taps(spelling).double()
    dec = decoder(model, features(1, 20, WIDTH).double(), max_length=MOST)
    kinds = {unit.exit.name: unit.mixer.kind for unit in dec.engine.plan.units if unit.mixer is not None}
    assert all((max(lengths[name]) == MOST) == (kind == "long_conv") for name, kind in kinds.items())
    assert all(max(lengths[name]) < 200 for name, kind in kinds.items() if kind == "short_conv")
    assert set(kinds.values()) == {"long_conv", "short_conv"}
    x = features(1, 700, WIDTH).double()
    assert gap(decoded(dec, x, 3), model(x)[:, 2:]) < 1e-11


class Late(nn.Module):
    """Channels that read each other, but only from a lag on that no sample has."""

    def __init__(self, first: int):
        super().__init__()
        other = torch.randn(WIDTH, MOST) / 30
        other[:, :first] = 0
        self.own, self.other = nn.Parameter(torch.randn(WIDTH, MOST) / 30), nn.Parameter(other)

    def forward(self, x: Tensor) -> Tensor:
        length, n = x.shape[1], 2 * x.shape[1]
        s = rfft(x.mT, n=n)
        own, other = (rfft(k[:, :length], n=n) for k in (self.own, self.other))
        return irfft(s * own + s.roll(1, dims=1) * other, n=n)[..., :length].mT


@pytest.mark.parametrize("first", [200, 1500, MOST - 2])
def test_channels_that_meet_late_are_seen(first):
    model, x = Late(first).double(), features(1, MOST, WIDTH).double()
    try:
        dec = decoder(model, x[:, :20], max_length=MOST)
    except fi_compile.Unsupported:
        return
    dec.prefill(x[:, :-2])
    found = torch.stack([dec.step(row) for row in x[:, -2:].unbind(1)], 1)
    assert gap(found, model(x)[:, -2:]) < 1e-11


def test_an_offset_that_moves_is_evaluated_at_every_position():
    class Moving(Taps):
        def short(self, x: Tensor) -> Tensor:
            return super().short(x) + torch.linspace(0, 1, MOST, dtype=x.dtype)[: x.shape[-1]]

    model, x = Moving("series").double(), features(1, 600, WIDTH).double()
    dec = decoder(model, x[:, :20], max_length=MOST)
    assert gap(decoded(dec, x, 3), model(x)[:, 2:]) < 1e-11
