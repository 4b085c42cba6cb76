"""Rotated sequences: a shift where a mask erases all that wraps around, whatever the mask is made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fi_compile
from decoding import Net, decoded, decoder, features, gap

WIDTH = 3


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def at(x: Tensor) -> Tensor:
    """Positions, [L, 1]."""
    return torch.arange(x.shape[1])[:, None]


def chosen(x):
    return torch.where(at(x) > 0, x.roll(1, 1), 0)


def chosen_otherwise(x):
    return torch.where(at(x) < 2, torch.zeros_like(x), x.roll(2, 1))


def filled(x):
    return x.roll(1, 1).masked_fill(at(x) == 0, 0)


def multiplied(x):
    return x.roll(3, 1) * (at(x) >= 3).to(x.dtype)


def by_ones_behind_a_zero(x):
    return x.roll(1, 1) * F.pad(x.new_ones(x.shape[1] - 1), (1, 0))[:, None]


def by_ones_with_a_zero_written(x):
    mask = x.new_ones(x.shape[1])
    mask[0] = 0
    return x.roll(1, 1) * mask[:, None]


def mixed(x):
    """RWKV's token shift."""
    shifted = x.roll(1, dims=1) * (at(x) != 0)
    return x * 0.3 + shifted * 0.7


SHIFTS = [
    chosen, chosen_otherwise, filled, multiplied, by_ones_behind_a_zero, by_ones_with_a_zero_written, mixed,
]  # fmt: skip


def too_few_rows(x):
    return torch.where(at(x) > 0, x.roll(2, 1), 0)


def one_entry_less(x):
    return x.roll(1, 1) * ((at(x) > 0) | (torch.arange(WIDTH) == 2))


def forwards(x):
    return x.roll(-1, 1) * (at(x) > 0)


def counted_from_the_end(x):
    return x.roll(1, 1) * (at(x) < x.shape[1] - 1)


def further_in_longer_sequences(x):
    return torch.where(at(x) > 0, x.roll(1 + x.shape[1] // 100, 1), 0)


LEAKS = [too_few_rows, one_entry_less, forwards, counted_from_the_end, further_in_longer_sequences]


class Rolling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x)) + x


@pytest.mark.parametrize("function", SHIFTS, ids=lambda f: f.__name__)
def test_a_window_where_all_that_wraps_is_erased(function):
    net = Rolling(function)
    dec = decoder(net, features(2, 20, WIDTH), max_length=128)
    assert [mixer.kind for mixer in dec.report.mixers] == ["short_conv"]
    sequence = features(2, 120, WIDTH)
    for prompt in (1, 7):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-12


def test_a_mask_among_the_buffers():
    class Masked(Rolling):
        def __init__(self):
            super().__init__(lambda x: x.roll(1, 1) * self.mask[: x.shape[1], None])
            self.register_buffer("mask", (torch.arange(128) > 0).double())

    net, sequence = Masked(), features(2, 60, WIDTH)
    dec = decoder(net, features(2, 20, WIDTH), max_length=64)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12
    net.mask[0] = 1
    with pytest.raises(fi_compile.Unsupported):
        dec.prefill(sequence[:, :7])


@pytest.mark.parametrize("function", LEAKS, ids=lambda f: f.__name__)
def test_what_wraps_into_sight_is_refused(function):
    with pytest.raises(fi_compile.Unsupported):
        decoder(Rolling(function), features(2, 20, WIDTH), max_length=128)


def test_the_first_row_kept():
    """What is shown in place of the erased rows need not be zero."""
    net = Rolling(lambda x: torch.where(at(x) == 0, x, x.roll(1, 1)))
    sequence = features(2, 60, WIDTH)
    dec = decoder(net, features(2, 20, WIDTH), max_length=64)
    assert gap(decoded(dec, sequence, 1), net(sequence)) < 1e-12


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("far", [-torch.inf, torch.inf, torch.nan])
def test_a_shift_multiplies_nothing(n: int, far: float):
    """As a filter it is zero at lag 0, and zero times what is infinite is no number."""

    def function(net: Net | None, x: Tensor) -> Tensor:
        return F.pad(x.mul(2), (0, 0, n, 0))[:, :-n]

    x = features(2, 30, WIDTH)
    dec = decoder(Net(function), x[:, :6], max_length=40)
    x[:, 8, 1] = far
    dec.prefill(x[:, :6])
    rows = torch.stack([dec.step(x[:, t]) for t in range(6, 30)], 1)
    assert torch.equal(rows.isfinite(), function(None, x)[:, 6:].isfinite())
