"""Weights divided by their sum: what multiplies all weights of a query cancels, and nothing else does."""

import math

import pytest
import torch
from torch import Tensor, nn

import fi_compile
from corpus import scale_weights
from decoding import by_speed, decoded, decoder, features, gap
from fi_compile.capture import trace_module
from fi_compile.quotients import with_quotients_masked

WIDTH, HEADS = 8, 2


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def later(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def shifted(scores: Tensor) -> Tensor:
    """Exponentials below the largest score of all keys, later ones too."""
    return (scores - scores.amax(-1, keepdim=True)).exp()


class Attention(nn.Module):
    """``mix(scores [B, heads, s, s], values [B, heads, s, width])`` → the values mixed."""

    def __init__(self, mix, norm: bool = False):
        super().__init__()
        self.mix, self.qkv = mix, nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.mix(q @ k.mT / math.sqrt(WIDTH // HEADS), v).transpose(1, 2).flatten(2)


def made(mix, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return scale_weights(Attention(mix, norm), 0).double().eval()


def times_a_mask(scores: Tensor, v: Tensor) -> Tensor:
    e = shifted(scores) * ~later(scores.shape[-1])
    return e / e.sum(-1, keepdim=True) @ v


def cut_off(scores: Tensor, v: Tensor) -> Tensor:
    e = (scores - scores.detach().max(-1).values.unsqueeze(-1)).exp().tril()
    return e / e.sum(-1)[..., None] @ v


def divided_last(scores: Tensor, v: Tensor) -> Tensor:
    e = shifted(scores).masked_fill(later(scores.shape[-1]), 0.0)
    return 2 * (e @ v) / e.sum(-1, keepdim=True)


def normalised_twice(scores: Tensor, v: Tensor) -> Tensor:
    e = torch.where(later(scores.shape[-1]), 0.0, scores.softmax(-1))
    return e / e.sum(-1, keepdim=True) @ v


def decayed(scores: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(scores.shape[-1], dtype=scores.dtype)
    e = (shifted(scores) * 0.9 ** (i[:, None] - i).abs()).tril()
    return e / e.sum(-1, keepdim=True) @ v


def squared(scores: Tensor, v: Tensor) -> Tensor:
    e = shifted(scores).tril()
    return e * e / (e * e).sum(-1, keepdim=True) @ v


def by_each_other(scores: Tensor, v: Tensor) -> Tensor:
    """Each of two is a mask on the other."""
    e = shifted(scores).tril() * shifted(2 * scores).tril()
    return e / e.sum(-1, keepdim=True) @ v


MIXES = [times_a_mask, cut_off, divided_last, normalised_twice, decayed, squared, by_each_other]


@pytest.mark.parametrize("mix", by_speed(MIXES, (divided_last,).__contains__))
def test_keys_and_values_are_kept(mix):
    net = made(mix)
    dec = decoder(net, features(2, 9, WIDTH), max_length=60)
    assert {m.kind for m in dec.report.mixers} == {"attention"}
    sequence = features(2, 40, WIDTH)
    for prompt in (1, 17):
        newest = torch.stack([net(sequence[:, :n])[:, -1] for n in range(prompt, 41)], 1)
        assert gap(decoded(dec, sequence, prompt), newest) < 1e-12


def lowered(scores: Tensor, v: Tensor) -> Tensor:
    e = shifted(scores.masked_fill(later(scores.shape[-1]), -1e9))
    return e / e.sum(-1, keepdim=True) @ v


def by_its_logarithm(scores: Tensor, v: Tensor) -> Tensor:
    scores = torch.where(later(scores.shape[-1]), -1e9, scores)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


@pytest.mark.parametrize("mix", by_speed([lowered, by_its_logarithm], ().__contains__))
def test_large_masks_by_hand(mix):
    """As in a softmax: where the weights bound the scores, and not where nothing does."""
    net, sequence = made(mix, norm=True), features(2, 40, WIDTH)
    dec = decoder(net, features(2, 9, WIDTH), max_length=60)
    assert gap(decoded(dec, sequence, 3), net(sequence)[:, 2:]) < 1e-12
    with pytest.raises(fi_compile.Unsupported, match="nothing bounds"):
        decoder(made(mix), features(2, 9, WIDTH), max_length=60)


def with_a_rest(scores: Tensor, v: Tensor) -> Tensor:
    e = shifted(scores).tril()
    return e / (e.sum(-1, keepdim=True) + 0.1) @ v


def seen_beside(scores: Tensor, v: Tensor) -> Tensor:
    e = shifted(scores).tril()
    return (e / e.sum(-1, keepdim=True) + e) @ v


def of_another_power(scores: Tensor, v: Tensor) -> Tensor:
    e = shifted(scores).tril()
    return e * e / e.sum(-1, keepdim=True) @ v


def by_keys(scores: Tensor, v: Tensor) -> Tensor:
    e = shifted(scores).tril()
    return e / e.sum(-2, keepdim=True) @ v


def one_too_many(scores: Tensor, v: Tensor) -> Tensor:
    e = shifted(scores).tril(1)
    return e / e.sum(-1, keepdim=True) @ v


def transposed(scores: Tensor, v: Tensor) -> Tensor:
    """The product sums over the queries."""
    e = shifted(scores).tril()
    return (e.mT @ v) / e.sum(-1, keepdim=True)


def masked_softmax(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1).tril() @ v


def masked_by_its_logarithm(scores: Tensor, v: Tensor) -> Tensor:
    return (scores - scores.logsumexp(-1, keepdim=True)).exp().tril() @ v


TRAPS = [
    with_a_rest, seen_beside, of_another_power, by_keys, one_too_many, transposed, masked_softmax,
    masked_by_its_logarithm,
]  # fmt: skip


@pytest.mark.parametrize("mix", by_speed(TRAPS, (with_a_rest, transposed).__contains__))
def test_nothing_that_shows_is_changed(mix, monkeypatch):
    """By what is known of the operators; random input, which would find these, has no say."""
    monkeypatch.setattr("fi_compile.quotients.same_function", lambda *programs: True)
    net, sequence = made(mix), features(2, 40, WIDTH)
    assert gap(net(sequence)[:, :20], net(sequence[:, :20])) > 1e-6
    program = trace_module(net, features(2, 9, WIDTH))
    assert gap(with_quotients_masked(program).run(sequence), net(sequence)) < 1e-12


def test_weights_of_a_wider_type_stay_so():
    def mix(scores: Tensor, v: Tensor) -> Tensor:
        e = (scores - scores.amax(-1, keepdim=True).double()).exp().tril()
        return e / e.sum(-1, keepdim=True) @ v.double()

    net, sequence = made(mix).float(), features(2, 9, WIDTH).float()
    program = trace_module(net, sequence)
    assert gap(with_quotients_masked(program).run(sequence), net(sequence)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("mix", TRAPS)
def test_what_shows_is_refused(mix):
    with pytest.raises(fi_compile.Unsupported):
        decoder(made(mix), features(2, 9, WIDTH), max_length=60)


def two_windows(scores: Tensor, v: Tensor) -> Tensor:
    """One exponential under two masks, a quotient each."""
    e, mask = shifted(scores), ~later(scores.shape[-1])
    near, all_of_them = e * mask.triu(-3), e * mask
    return near @ v / near.sum(-1, keepdim=True) + all_of_them / all_of_them.sum(-1, keepdim=True) @ v


def masked_in_both(scores: Tensor, v: Tensor) -> Tensor:
    """Everything written out twice, as in a formula."""
    mask = ~later(scores.shape[-1])
    return (shifted(scores) * mask) @ v / (shifted(scores) * mask).sum(-1, keepdim=True)


def one_sum_for_both(scores: Tensor, v: Tensor) -> Tensor:
    """Masked twice, and divided by the sum under one of the masks."""
    e, mask = shifted(scores), ~later(scores.shape[-1])
    return (e * mask.triu(-3)) @ v / (e * mask).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "mixes", [(two_windows, one_sum_for_both), (masked_in_both, times_a_mask, masked_in_both)]
)
def test_any_number_of_quotients(mixes):
    layers = [made(mix, norm=True) for mix in mixes]
    net = nn.Sequential(*layers)
    x = features(2, 12, WIDTH)
    dec = decoder(net, x, max_length=32)
    assert gap(decoded(dec, x, 5), net(x)[:, 4:]) < 1e-10
    assert {m.kind for m in dec.report.mixers} == {"attention"}
