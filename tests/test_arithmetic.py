"""Python's arithmetic on a length: logarithms, whole numbers, bits. A trace must hold at every length."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fi_compile
from decoding import EAGER, decoded, features, gap
from fi_compile.symbolic import evaluate_at


def bits_of_an_int(length):
    assert isinstance(length, (int, torch.SymInt))
    return 1 << (int(2 * int(length)) - 1).bit_length()


def power_of_two_or_next(length):
    return 2 * (length if length & (length - 1) == 0 else 1 << length.bit_length())


SIZES = {
    "numpy": lambda length: int(2 ** np.ceil(np.log2(2 * length))),
    "base 2": lambda length: 2 ** math.ceil(math.log(2 * length, 2)),
    "int": bits_of_an_int,
    "is a power": power_of_two_or_next,
}


class Transformed(nn.Module):
    def __init__(self, size_of) -> None:
        super().__init__()
        self.size_of = size_of
        self.taps = nn.Parameter(torch.randn(4, 512) / 8)

    def forward(self, x):
        length = x.shape[1]
        n = self.size_of(length)
        taps = torch.fft.rfft(self.taps[:, :length], n=n)
        return x + torch.fft.irfft(torch.fft.rfft(x.mT, n=n) * taps, n=n)[..., :length].mT


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n != "int" else ()) for n in SIZES]
)
def test_the_next_power_of_two(name):
    torch.manual_seed(0)
    model, x = Transformed(SIZES[name]).double().eval(), features(2, 70, 4)
    bit_length, numbers = torch.SymInt.bit_length, (math.log2, np.ceil)
    dec = fi_compile.decoder(model, x[:, :24], max_length=128, options=EAGER)
    assert (torch.SymInt.bit_length, (math.log2, np.ceil)) == (bit_length, numbers)
    assert "int" not in globals()
    with torch.no_grad():
        for length, prompt in ((2, 1), (33, 31), (65, 64), (70, 5)):  # beside and at powers of two
            part = x[:, :length]
            assert gap(decoded(dec, part, prompt), model(part)[:, prompt - 1 :]) < 1e-12
    assert [(m.kind, m.lowering) for m in dec.report.mixers] == [("long_conv", "tiles")]


@pytest.mark.slow
def test_a_transform_one_power_too_short_wraps():
    """The same arithmetic, but the size of a signal alone: refused for the lengths where it matters."""
    torch.manual_seed(0)
    model = Transformed(lambda length: 1 << (length - 1).bit_length())
    with pytest.raises(fi_compile.Unsupported) as refused:
        fi_compile.decoder(model, features(2, 12, 4), max_length=20, options=EAGER)
    assert {"alias", "non_causal"} & {r.kind for r in refused.value.refusals}


def test_logarithms_at_powers_of_two_are_whole():
    length = torch.fx.experimental.symbolic_shapes.ShapeEnv().create_unbacked_symint()
    every = np.arange(1, 1 << 16)
    found = evaluate_at(math.floor(torch._sym_log2(length)).node.expr, {length.node.expr: every}, every.shape)
    assert found.tolist() == [n.bit_length() - 1 for n in every.tolist()]
