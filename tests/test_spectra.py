"""Filters kept as spectra: whether they are causal is a property of their values."""

import pytest
import torch
from torch import Tensor, nn
from torch.fft import fft, ifft, irfft, rfft

import fi_compile
from decoding import decoded, decoder, features, gap, rounding

WIDTH, LONGEST, N = 3, 64, 128


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Kept(nn.Module):
    """A convolution with a spectrum in a buffer; ``whole``: all bins of it, channels last."""

    def __init__(self, spectrum: Tensor, whole: bool = False):
        super().__init__()
        self.register_buffer("spectrum", spectrum)
        self.whole = whole
        self.head = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            y = ifft(fft(x, n=N, dim=1) * self.spectrum, n=N, dim=1).real[:, : x.shape[1]]
        else:
            y = irfft(rfft(x.mT, n=N) * self.spectrum, n=N)[..., : x.shape[1]].mT
        return self.head(y.to(x.dtype))


def taps(count: int) -> Tensor:
    return torch.randn(WIDTH, count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 40, 65])
@pytest.mark.parametrize("whole", [False, True])
def test_spectra_of_taps_that_end_early_are_filters(count, whole):
    spectrum = fft(taps(count).mT, n=N, dim=0) if whole else rfft(taps(count), n=N)
    model, x = Kept(spectrum, whole), features(2, LONGEST, WIDTH)
    dec = decoder(model, x[:, :9], max_length=LONGEST)
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-10
    report = dec.report
    assert report.verdict == "numerically bounded"
    assert "spectrum" in str(report)
    assert not any(mixer.kind == "region" for mixer in report.mixers)


def test_one_spectrum_for_all_channels():
    model, x = Kept(rfft(taps(40)[0], n=N)), features(2, LONGEST, WIDTH)
    dec = decoder(model, x[:, :9], max_length=LONGEST)
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-10


class Sensitive(Kept):
    """Taps from nodes on the unit circle, by a quotient that all but vanishes: nodes are no filter."""

    def forward(self, x: Tensor) -> Tensor:
        filter = irfft(1 / (1.0001 + self.spectrum), n=N)
        return irfft(rfft(x.mT, n=N) * rfft(filter[..., :LONGEST], n=N), n=N)[..., : x.shape[1]].mT.to(
            x.dtype
        )


def test_numbers_computed_from_a_spectrum_keep_its_own_values():
    nodes = torch.exp(-2j * torch.pi * torch.arange(N // 2 + 1) / N).to(torch.complex64)
    model, x = Sensitive(nodes), features(1, LONGEST, WIDTH)
    exact = Sensitive(nodes.to(torch.complex128))  # the same numbers; the model's own arithmetic is single
    dec = decoder(model, x[:, :9], max_length=LONGEST)
    assert dec.report.verdict == "proved"
    assert gap(decoded(dec, x, 5), exact(x)[:, 4:]) < 1e-9


@pytest.mark.parametrize("count", [66, 100, N])
def test_spectra_of_taps_that_wrap_around_are_refused(count):
    model, x = Kept(rfft(taps(count), n=N)), features(2, 9, WIDTH)
    with pytest.raises(fi_compile.Unsupported):
        fi_compile.decoder(model, x, max_length=LONGEST)


def test_spectra_in_single_precision():
    spectrum = rfft(taps(40), n=N).to(torch.complex64)
    model, x = Kept(spectrum).float(), features(2, LONGEST, WIDTH).float()
    dec = decoder(model, x[:, :9], max_length=LONGEST)
    assert rounding(dec, model, Kept(spectrum.to(torch.complex128)), x, 1) <= 3


def test_another_spectrum_is_read_anew():
    model, x = Kept(rfft(taps(20), n=N)), features(2, LONGEST, WIDTH)
    dec = decoder(model, x[:, :9], max_length=LONGEST)
    model.spectrum.copy_(rfft(2 * taps(60), n=N))
    dec.refresh()
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-10
    model.spectrum.copy_(rfft(taps(100), n=N))
    with pytest.raises(fi_compile.Unsupported):
        dec.refresh()


def test_parameters_are_no_spectra():
    model = Kept(rfft(taps(20), n=N))
    spectrum = nn.Parameter(model.spectrum)
    del model.spectrum
    model.spectrum = spectrum
    with pytest.raises(fi_compile.Unsupported):
        fi_compile.decoder(model, features(2, 9, WIDTH), max_length=LONGEST)
