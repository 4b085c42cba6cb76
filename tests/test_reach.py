"""Models that are causal up to some length only: decoded that far, and no further."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft

import fi_compile
from decoding import EAGER, decoded, decoder, features, gap

WIDTH, TAPS, POINTS = 4, 60, 128
MOST = POINTS - TAPS + 1


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class OneTransform(nn.Module):
    """A filter of 60 lags by a transform of 128 points, whatever the length: from 70 positions on it wraps around."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(TAPS, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = rfft(x, n=POINTS, dim=1) * rfft(self.filter, n=POINTS, dim=0)
        return x + irfft(spectrum, n=POINTS, dim=1)[:, : x.shape[1]]


def test_it_is_decoded_as_far_as_it_is_causal():
    model, x = OneTransform(), features(2, MOST + 1, WIDTH)
    later = x.clone()
    later[:, -1] += 1
    assert not torch.equal(model(x)[:, 0], model(later)[:, 0])  # one position more and the first one moves
    dec = decoder(model, x[:, :9])
    assert gap(decoded(dec, x[:, :MOST], 5), model(x[:, :MOST])[:, 4:]) < 1e-12
    with pytest.raises(fi_compile.CapacityError, match=f"exceed {MOST}, .* certificate .* wraps around"):
        dec.step(x[:, MOST])


def test_more_is_refused_with_the_length_it_is_exact_for():
    with pytest.raises(fi_compile.Unsupported) as found:
        decoder(OneTransform(), features(1, 9, WIDTH), max_length=100)
    (refusal,) = found.value.refusals
    assert refusal.kind == "alias"
    assert f"max_length={MOST}" in refusal.hint
    decoder(OneTransform(), features(1, 9, WIDTH), max_length=MOST)


def test_an_example_beyond_it_is_refused():
    with pytest.raises(fi_compile.Unsupported):
        decoder(OneTransform(), features(1, MOST + 1, WIDTH))


def test_a_growing_prefix_beyond_it_runs_as_given():
    model, x = OneTransform(), features(1, MOST + 4, WIDTH)
    fast = torch.compile(model, backend="flashinf", dynamic=True, options={**EAGER, "fallback": "eager"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fi_compile.FlashinfWarning)
        for n in range(MOST - 9, MOST + 5):
            assert gap(fast(x[:, :n]), model(x[:, :n])) < 1e-12
