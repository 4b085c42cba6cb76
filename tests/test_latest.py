"""Outputs of the last few positions: rows that move on at every step, kept as rows of delayed values."""

import pytest
import torch
from torch import Tensor, nn

import fi_compile
from decoding import Net, by_speed, decoder, features, gap, ids, language_model
from transparent import OPTIONS

KEPT = 3


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Latest(nn.Module):
    """Logits of the last few positions, and the sum of them, of a model that returns all."""

    def __init__(self, kept: int = KEPT, end: int | None = None):
        super().__init__()
        self.end = end
        self.model, self.kept = language_model("fft_scale_on_filter", width=4, l_max=64), kept

    def forward(self, read: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(read)[:, -self.kept : self.end, :]
        return logits, logits.sum(1)


def test_the_last_rows_move_on():
    net, sequence = Latest().eval(), ids(2, 40)
    dec = decoder(net, ids(2, 9), max_length=64)
    assert dec.report.verdict == "proved"
    for prompt in (KEPT, 20):
        found = [dec.prefill(sequence[:, :prompt])]
        found += [dec.step(sequence[:, t]) for t in range(prompt, 40)]
        for t, (logits, total) in enumerate(found, prompt):
            assert gap(logits, net(sequence[:, :t])[0]) < 1e-12
            assert gap(total, net(sequence[:, :t])[1]) < 1e-12
    dec.rewind(25)
    assert gap(dec.step(sequence[:, 25])[0], net(sequence[:, :26])[0]) < 1e-12
    assert gap(dec.extend(sequence[:, 26:33])[0], net(sequence[:, :33])[0]) < 1e-12


def test_fewer_positions_have_fewer_rows():
    net = Latest().eval()
    dec = decoder(net, ids(2, 9), max_length=64)
    assert net(ids(2, 2))[0].shape[1] == 2
    with pytest.raises(fi_compile.InputError, match=f"give at least {KEPT}"):
        dec.prefill(ids(2, KEPT - 1))
    net.model.embedding.weight.mul_(1.5)  # and with other weights too
    dec.reset()
    with pytest.raises(fi_compile.InputError, match=f"give at least {KEPT}"):
        dec.prefill(ids(2, KEPT - 1))
    assert gap(dec.prefill(ids(2, 7))[0], net(ids(2, 7))[0]) < 1e-12


def test_a_growing_prefix(fresh_dynamo):
    net, sequence = Latest().eval(), ids(2, 24)
    fast = torch.compile(net, backend="flashinf", dynamic=True, options=OPTIONS)
    with torch.inference_mode():
        for t in range(1, 25):
            for found, expected in zip(fast(sequence[:, :t]), net(sequence[:, :t]), strict=True):
                assert gap(found, expected) < 1e-12
    assert not fi_compile.last_report().refusals


def test_rows_before_the_newest():
    net, sequence = Latest(KEPT, -1).eval(), ids(2, 20)
    dec = decoder(net, ids(2, 9), max_length=64)
    dec.prefill(sequence[:, :KEPT])
    for t in range(KEPT, 20):
        assert gap(dec.step(sequence[:, t])[0], net(sequence[:, : t + 1])[0]) < 1e-12


def test_too_many_to_keep():
    with pytest.raises(fi_compile.Unsupported, match="positions that move on"):
        decoder(Latest(40).eval(), ids(2, 50), max_length=64)


@pytest.mark.parametrize("far", [140, 1000])
def test_rows_that_fall_behind_later(far):
    """The last three, less one position more after every so many: nothing of that shows in short sequences."""

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        return x.cumsum(1).narrow(1, x.shape[1] - KEPT - x.shape[1] // far, KEPT)

    with pytest.raises(fi_compile.Unsupported, match="positions that move on"):
        decoder(Net(forward), features(2, 9, 2), max_length=1100)


def test_a_start_that_is_never_negative():
    net, sequence = Net(lambda _, x: x.cumsum(1)[:, max(x.shape[1] - KEPT, 0) :]), features(2, 20, 2)
    dec = decoder(net, features(2, 9, 2), max_length=40)
    dec.prefill(sequence[:, :KEPT])
    for t in range(KEPT, 20):
        assert gap(dec.step(sequence[:, t]), net(sequence[:, : t + 1])) < 1e-12


def test_a_size_that_torch_leaves_open():
    """Where it cannot tell the sign of a start; the reason is the model's all the same."""
    net = Net(lambda _, x: x.cumsum(1)[:, x.shape[1] - KEPT - x.shape[1] // 140 :])
    with pytest.raises(fi_compile.Unsupported, match="positions that move on"):
        decoder(net, features(2, 9, 2), max_length=200)


def newest_of_each_row(y: Tensor) -> Tensor:
    return y[torch.arange(y.shape[0]), torch.full((y.shape[0],), y.shape[1] - 1)]


SPELLINGS = [
    lambda y: y[:, [-2, -1]], lambda y: y[:, [-1, -3]], lambda y: y[:, -2], lambda y: y.flip(1)[:, :3],
    lambda y: y.flip(1)[:, 0], lambda y: y[:, torch.arange(y.shape[1] - 3, y.shape[1])],
    lambda y: y.index_select(1, torch.tensor([y.shape[1] - 1])), newest_of_each_row,
    lambda y: y.gather(1, torch.full((y.shape[0], 1, y.shape[2]), y.shape[1] - 2)),
    lambda y: y.split(y.shape[1] - 1, 1)[1], lambda y: y.flip(1)[:, 1:3, None].mean(2),
]  # fmt: skip


@pytest.mark.parametrize(
    "spelling", by_speed(SPELLINGS, {SPELLINGS[i] for i in (1, 2, 3, 7, 8)}.__contains__)
)
def test_positions_in_other_words(spelling):
    net, sequence = Net(lambda _, x: spelling(x.cumsum(1))), features(2, 20, 2)
    dec = decoder(net, features(2, 9, 2), max_length=40)
    assert dec.report.verdict == "proved"
    assert not dec.report.notes
    dec.prefill(sequence[:, :4])
    for t in range(4, 20):
        assert gap(dec.step(sequence[:, t]), net(sequence[:, : t + 1])) < 1e-12


OTHERS = [
    (lambda y: y[:, [0, -1]], "data_dependent|positions"),
    (lambda y: y[:, [-2, -40]], "positions|out of bounds"),
    (lambda y: y.flip(1)[:, :40], "positions"),
    (lambda y: y[:, torch.arange(y.shape[1] // 2, y.shape[1] // 2 + 2)], "index"),
    (lambda y: y.gather(1, y.sort(1)[1][:, :2]), "positions|future"),
    (lambda y: y[:, 1:], "cut or shift what is returned"),
    (lambda y: y[:, :3], "holds the first 3 positions"),
]


@pytest.mark.parametrize(("spelling", "reason"), OTHERS)
def test_other_positions_are_named(spelling, reason):
    with pytest.raises(fi_compile.Unsupported, match=reason):
        decoder(Net(lambda _, x: spelling(x.cumsum(1))), features(2, 50, 2), max_length=60)
