"""Operators that have no rule: those torch composes of others, and those whose results have sizes of their own."""

import pytest
import torch
from torch import nn

import fi_compile
from decoding import EAGER, decoded, features, gap


class Convolved(nn.Module):
    """[B, s, 4]: powers of a rate as filters, behind a learned first position that every row gets a copy of."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([0.5, 0.9, 0.99, -0.7]))
        self.turn = nn.Parameter(torch.eye(4) + 0.1)
        self.first = nn.Parameter(torch.randn(1, 1, 4))
        self.mix = nn.Linear(8, 4)

    def forward(self, x):
        n = x.shape[1]
        taps = torch.linalg.vander(self.rates, N=n)
        u = torch.cat([self.first.tile(x.shape[0], 1, 1), x], 1)[:, :-1].mT
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * n) * torch.fft.rfft(taps, n=2 * n), n=2 * n)[..., :n].mT
        gate = torch.special.softmax(torch.multiply(x, 2), -1)
        y = torch.subtract(y, torch.negative(gate) * torch.linalg.vecdot(x, y).unsqueeze(-1))
        return x @ torch.linalg.inv(self.turn) + self.mix(torch.dstack([y, x]))


def test_operators_that_torch_composes_of_others():
    torch.manual_seed(0)
    model, x = Convolved().double().eval(), features(2, 40, 4)
    dec = fi_compile.decoder(model, x[:, :24], max_length=64, options=EAGER)
    with torch.no_grad():
        assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-12
        assert gap(decoded(dec, x[:, :3], 2), model(x[:, :3])[:, 1:]) < 1e-12
        with pytest.raises(fi_compile.InputError, match="give at least 2"):  # the model itself fails there
            dec.prefill(x[:, :1])
    assert sorted(m.kind for m in dec.report.mixers) == ["long_conv", "short_conv"]


def test_what_they_are_composed_of_is_still_judged():
    with pytest.raises(fi_compile.Unsupported) as refused:
        fi_compile.decoder(Lambda(torch.fliplr), features(2, 24, 4), options=EAGER)
    assert refused.value.refusals[0].kind == "non_causal"


def pairs_by_nonzero(x):
    """The lower triangle by its entries' indices, which are as many as the ones of a mask."""
    n = x.shape[1]
    i, j = torch.ones(n, n).tril().nonzero().mT
    return x + torch.zeros(n, n, dtype=x.dtype).index_put((i, j), torch.ones((), dtype=x.dtype)) @ x


def test_sizes_counted_from_values():
    with pytest.raises(fi_compile.Unsupported) as refused:
        fi_compile.decoder(Lambda(pairs_by_nonzero), features(2, 24, 4), options=EAGER)
    (refusal,) = refused.value.refusals
    assert refusal.kind == "data_dependent"
    assert "nonzero" in refusal.hint
    assert "test_composites" in str(refusal.source)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
