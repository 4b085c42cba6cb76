"""Buffers of one whole number, on which a forward branches: traced as they are, watched, traced again."""

import pytest
import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft

import fi_compile
from decoding import decoded, decoder, features, gap

WIDTH, MOST = 4, 128


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Calibrated(nn.Module):
    """A long convolution whose filter is scaled if a flag says so, and as long as a buffer says."""

    def __init__(self):
        super().__init__()
        decay = torch.exp(-torch.arange(MOST)[:, None] / 30)
        self.filter = nn.Parameter(torch.randn(MOST, WIDTH, dtype=torch.float64) * decay)
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("taps", torch.zeros(1).int() + 100)

    def forward(self, x: Tensor) -> Tensor:
        k, n = self.filter[: self.taps.item()], 2 * MOST
        if not self.calibrated:
            k = k / k.norm(dim=0)
        if self.taps[0] > 90:
            x = x.tanh()
        return x + irfft(rfft(x, n=n, dim=1) * rfft(k, n=n, dim=0), n=n, dim=1)[:, : x.shape[1]]


def test_a_forward_that_branches_on_flags():
    model, x = Calibrated(), features(2, 90, WIDTH)
    dec = decoder(model, x[:, :9], max_length=90)
    assert [m.kind for m in dec.report.mixers] == ["long_conv"]
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-12
    assert isinstance(model._buffers["calibrated"], Tensor)
    assert list(model.state_dict()) == ["filter", "calibrated", "taps"]


@pytest.mark.parametrize("change", [lambda m: m.calibrated.fill_(True), lambda m: m.taps.sub_(20)])
def test_a_flag_that_changes_is_noticed_and_traced_again(change):
    model, x = Calibrated(), features(2, 90, WIDTH)
    dec = decoder(model, x[:, :9], max_length=90)
    dec.prefill(x[:, :20])
    before = model(x)
    change(model)
    assert gap(model(x), before) > 0.01
    with pytest.raises(fi_compile.WeightsChanged):
        dec.step(x[:, 20])
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-12


def test_branches_on_anything_else_are_refused():
    class Branches(Calibrated):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(fi_compile.Unsupported):
        decoder(Branches(), features(1, 9, WIDTH), max_length=90)
