"""Short filters on whole numbers: the ids before, decoded with a ring of a few of them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding import VOCAB, decoded, decoder, gap, goes_back, ids


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Shifted(nn.Module):
    """Logits of an id and of what is made of the ids so far, another id."""

    def __init__(self, other: Callable[[Tensor], Tensor]):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCAB, 6, dtype=torch.float64)
            self.before = nn.Embedding(VOCAB, 6, dtype=torch.float64)
            self.head = nn.Linear(6, VOCAB, dtype=torch.float64)
        self.register_buffer("start", torch.tensor([[7]]))
        self.other = other

    def forward(self, read: Tensor) -> Tensor:
        return self.head(self.embedding(read) * self.before(self.other(read)).tanh())


def padded(read: Tensor) -> Tensor:
    return F.pad(read[:, :-1], (1, 0))


def padded_with_a_start(read: Tensor) -> Tensor:
    return F.pad(read, (1, -1), value=3)


def joined(read: Tensor) -> Tensor:
    return torch.cat([read.new_full((read.shape[0], 1), 5), read[:, :-1]], 1)


def rolled(read: Tensor) -> Tensor:
    before = read.roll(1, dims=1)
    before[:, 0] = 2
    return before


def hashed(read: Tensor) -> Tensor:
    """N-gram embedding: a number of the last three ids."""
    before = F.pad(read, (2, 0))
    return (read * 7919 + before[:, 1:-1] * 104729 - before[:, :-2] * 1299709) % VOCAB


def wraps_around(read: Tensor) -> Tensor:
    """As a hash by a large odd number does."""
    return ((read + padded(read)) * -7046029254386353131 >> 40) % VOCAB


def changed(read: Tensor) -> Tensor:
    return (read != padded(read)).long()


def counted(read: Tensor) -> Tensor:
    """With the position: what is added moves along the whole sequence."""
    return (padded(read) + torch.arange(read.shape[1])) % VOCAB


SHIFTS = [padded, padded_with_a_start, joined, rolled, hashed, wraps_around, changed, counted]


@pytest.mark.parametrize("other", SHIFTS, ids=lambda f: f.__name__)
def test_a_ring_of_ids(other: Callable[[Tensor], Tensor]):
    net, sequence = Shifted(other).eval(), ids(2, 40)
    dec = decoder(net, ids(2, 9), max_length=64)
    assert dec.report.verdict == "proved"
    assert {(m.kind, m.lowering) for m in dec.report.mixers} == {("short_conv", "window")}
    for prompt in (1, 2, 17):
        dec.reset()
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-14


def test_back_and_on():
    net, sequence = Shifted(hashed).eval(), ids(2, 40)
    dec = decoder(net, ids(2, 9), max_length=64)
    decoded(dec, sequence, 5)
    goes_back(net, dec, sequence, (38, 20, 1), 2)
    assert gap(dec.extend(sequence[:, 3:20]), net(sequence)[:, 3:20]) < 1e-14
    dec.reorder(torch.tensor([1, 1]))
    assert gap(dec.step(sequence[[1, 1], 20]), net(sequence[[1, 1], :21])[:, 20]) < 1e-14


def test_a_start_that_changes():
    net, sequence = (
        Shifted(lambda read: torch.cat([net.start.expand(read.shape[0], 1), read[:, :-1]], 1)),
        ids(2, 20),
    )
    dec = decoder(net, ids(2, 9), max_length=64)
    assert gap(decoded(dec, sequence, 1), net(sequence)) < 1e-14
    net.start.fill_(1)
    dec.reset()
    assert gap(decoded(dec, sequence, 1), net(sequence)) < 1e-14


# what looks like it and is not


def halved(read: Tensor) -> Tensor:
    return (read + padded(read)) // 2


def through_real_numbers(read: Tensor) -> Tensor:
    return (padded(read).to(torch.float32) * 0.5).long()


def narrowed(read: Tensor) -> Tensor:
    """Numbers that wrap around at 128 on the way."""
    return (padded(read * 100).to(torch.int8).long()) % VOCAB


def far_back(read: Tensor) -> Tensor:
    return F.pad(read, (300, 0))[:, : read.shape[1]]


@pytest.mark.parametrize("other", [halved, through_real_numbers, narrowed], ids=lambda f: f.__name__)
def test_what_rounds_is_exact_too(other: Callable[[Tensor], Tensor]):
    net, sequence = Shifted(other).eval(), ids(2, 30)
    assert gap(decoded(decoder(net, ids(2, 9), max_length=64), sequence, 3), net(sequence)[:, 2:]) < 1e-14


def test_a_far_lag():
    net, sequence = Shifted(far_back).eval(), ids(1, 400)
    dec = decoder(net, ids(1, 9), max_length=512)
    assert gap(decoded(dec, sequence, 290), net(sequence)[:, 289:]) < 1e-14
