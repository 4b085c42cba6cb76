"""Tables that no rule certifies, evaluated at every length."""

import pytest
import torch
from torch import Tensor, nn

import fi_compile
from decoding import decoded, decoder, features, gap

WIDTH = 4


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Signed(nn.Module):
    """Running sums of every second row's negative, by whole numbers written in place."""

    def __init__(self, from_the_end: bool):
        super().__init__()
        self.from_the_end = from_the_end

    def forward(self, x: Tensor) -> Tensor:
        signs = torch.full((x.shape[1], 1), 1)
        signs[1::2] *= -1
        if self.from_the_end:
            signs = signs.flip(0)
        return x + (x * signs).cumsum(1)


def test_whole_numbers_written_in_place():
    model, x = Signed(False), features(2, 90, WIDTH)
    dec = decoder(model, x[:, :9], max_length=90)
    assert dec.report.verdict == "numerically bounded"
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-12


def test_signs_that_turn_with_the_length_are_refused():
    with pytest.raises(fi_compile.Unsupported):
        decoder(Signed(True), features(2, 9, WIDTH), max_length=90)
