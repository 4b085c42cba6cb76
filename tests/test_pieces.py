"""Joined, transformed together and cut apart again: each piece by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fft import irfft, rfft

import fi_compile
from decoding import decoded, decoder, features, forks_and_beams, gap
from fi_compile.capture import trace_module
from fi_compile.pieces import with_pieces_apart
from fi_compile.program import operator_name

WIDTH, MOST = 4, 300


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Joined(nn.Module):
    """A long convolution whose filter and input are transformed together; ``mix(x, filter)``."""

    def __init__(self, mix):
        super().__init__()
        decay = torch.exp(-torch.arange(MOST)[:, None] / 40)
        self.filter = nn.Parameter(torch.randn(MOST, WIDTH, dtype=torch.float64) * decay)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x, self.filter[: x.shape[1]])


def rows_as_columns(x: Tensor, k: Tensor) -> Tensor:
    """[n, D] and [n, B·D] side by side."""
    n, width = k.shape
    spectra = rfft(torch.cat([k, x.movedim(1, 0).reshape(n, -1)], 1), n=2 * n, dim=0)
    u = spectra[:, width:].unflatten(1, (-1, width)).movedim(0, 1)
    return irfft(u * spectra[:, :width], n=2 * n, dim=1)[:, :n]


def as_another_row(x: Tensor, k: Tensor) -> Tensor:
    """The filter as a row of the batch, padded and scaled with it."""
    n = k.shape[0]
    both = torch.cat([x, k[None]]) * torch.linspace(0.5, 1, WIDTH, dtype=torch.float64)
    spectra = rfft(F.pad(both, (0, 0, 0, n)), dim=1)
    u, f = spectra.split([x.shape[0], 1])
    return irfft(u * f, n=2 * n, dim=1)[:, :n]


def behind(x: Tensor, k: Tensor) -> Tensor:
    """As more channels, counted from the end."""
    n, width = k.shape
    spectra = rfft(torch.cat([x, k.expand(x.shape[0], -1, -1)], 2).mT.contiguous(), n=2 * n)
    return irfft(spectra[:, :width] * spectra[:, -width:], n=2 * n)[..., :n].mT


@pytest.mark.parametrize("mix", [rows_as_columns, as_another_row, behind], ids=lambda f: f.__name__)
def test_a_filter_transformed_with_the_sequence(mix):
    model, x = Joined(mix), features(2, 200, WIDTH)
    dec = decoder(model, x[:, :9], max_length=200)
    assert [m.kind for m in dec.report.mixers] == ["long_conv"]
    for prompt in (1, 7, 100):
        assert gap(decoded(dec, x, prompt), model(x)[:, prompt - 1 :]) < 1e-12
    if mix is not rows_as_columns:  # traced for two rows: a layout compares 4·B + 4 with the number of bins
        forks_and_beams(model, dec, WIDTH)


def joinings(program) -> int:
    return sum(operator_name(n.target) == "cat" for n in program.graph.nodes)


@pytest.mark.parametrize("mix", [rows_as_columns, as_another_row], ids=lambda f: f.__name__)
def test_the_program_computes_the_same(mix):
    x = features(2, 30, WIDTH)
    program = trace_module(Joined(mix), x)
    apart = with_pieces_apart(program)
    assert (joinings(program), joinings(apart)) == (1, 0)
    for other in (x, features(2, 41, WIDTH)):
        torch.testing.assert_close(apart.run(other), program.run(other))


def normalised_together(x: Tensor, k: Tensor) -> Tensor:
    both = torch.cat([x, k.expand(x.shape[0], -1, -1)], 2)
    return F.layer_norm(both, (2 * WIDTH,))[..., :WIDTH]


def of_two_pieces(x: Tensor, k: Tensor) -> Tensor:
    return torch.cat([x, k.expand(x.shape[0], -1, -1)], 2)[..., 1 : WIDTH + 1]


@pytest.mark.parametrize("mix", [normalised_together, of_two_pieces], ids=lambda f: f.__name__)
def test_what_meets_other_pieces_stays_joined(mix):
    model, x = Joined(mix), features(2, 30, WIDTH)
    program = trace_module(model, x)
    assert joinings(with_pieces_apart(program)) == joinings(program) == 1
    dec = decoder(model, x[:, :9], max_length=30)
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-12


class Neighbour(nn.Module):
    """Reads the row of the batch before its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) + torch.cat([torch.zeros_like(x[:1]), x])[:-1]


def test_other_rows_are_still_seen():
    dec = decoder(Neighbour(), features(2, 9, WIDTH))
    dec.prefill(features(2, 9, WIDTH))
    with pytest.raises(fi_compile.InputError):
        dec.reorder(torch.tensor([1, 0]))
