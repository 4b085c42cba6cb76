"""What is counted of ids: segments, positions, attention within documents; decoded with a count as state."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fi_compile
from decoding import VOCAB, decoded, decoder, features, forks_and_beams, gap, goes_back, ids
from fi_compile.capture import trace_module
from fi_compile.passes.prove_prefix import prove_prefix

SEPARATOR, WIDTH, HEADS = 3, 8, 2


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Net(nn.Module):
    """``mix(self, ids, x)`` with queries, keys and values of x, the ids embedded."""

    def __init__(self, mix: Callable[..., Tensor]):
        super().__init__()
        self.mix = mix
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCAB, WIDTH)
            self.places = nn.Embedding(300, WIDTH)
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.head = nn.Linear(WIDTH, VOCAB)
        self.double().eval()

    def forward(self, i: Tensor) -> Tensor:
        return self.head(self.mix(self, i, self.embed(i)))

    def scores(self, x: Tensor) -> Tensor:
        return self.query(x) @ self.key(x).mT / 3


def segments(i: Tensor) -> Tensor:
    return (i == SEPARATOR).cumsum(1)


def causal(i: Tensor) -> Tensor:
    n = torch.arange(i.shape[1])
    return n[:, None] >= n


# -- masks that hide other documents: a position always sees itself ----------------------------------------


def bool_mask(net: Net, i: Tensor, x: Tensor) -> Tensor:
    s = segments(i)
    mask = causal(i) & (s[:, :, None] == s[:, None, :])
    return net.scores(x).masked_fill(~mask, -torch.inf).softmax(-1) @ net.value(x)


def mask_of_an_operator(net: Net, i: Tensor, x: Tensor) -> Tensor:
    s = segments(i)
    mask = (causal(i) & s.unsqueeze(2).eq(s.unsqueeze(1)))[:, None]
    q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (net.query, net.key, net.value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def added_masks(net: Net, i: Tensor, x: Tensor) -> Tensor:
    s = segments(i)[:, :, None].expand(-1, -1, i.shape[1])
    same = torch.where((s - s.mT) == 0, 0.0, -torch.inf).to(x.dtype)
    later = torch.full(same.shape[1:], -torch.inf, dtype=x.dtype).triu(1)
    return (net.scores(x) + later + same).softmax(-1) @ net.value(x)


def what_is_hidden(net: Net, i: Tensor, x: Tensor) -> Tensor:
    s = segments(i)
    hidden = ~causal(i) | (s[:, :, None] != s[:, None, :])
    return net.scores(x).masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1) @ net.value(x)


def counted_twice(net: Net, i: Tensor, x: Tensor) -> Tensor:
    n = i.shape[1]
    mask = causal(i) & (segments(i).view(-1, n, 1) <= segments(i).reshape(-1, 1, n))
    return torch.where(mask, net.scores(x), -torch.inf).softmax(-1) @ net.value(x)


MASKS = [bool_mask, mask_of_an_operator, added_masks, what_is_hidden, counted_twice]


@pytest.mark.parametrize("mix", MASKS, ids=lambda f: f.__name__)
def test_attention_within_documents(mix):
    net = Net(mix)
    dec = decoder(net, ids(2, 12), max_length=128)
    kinds = {m.kind: m.lowering for m in dec.report.mixers}
    assert kinds == {"scan": "running_sum", "attention": "kv_cache"}
    sequence = ids(2, 90, seed=5)
    assert gap(decoded(dec, sequence, 3), net(sequence)[:, 2:]) < 1e-12


# -- masks that hide a position from itself, or may ---------------------------------------------------------


def strictly(net: Net, i: Tensor, x: Tensor) -> Tensor:
    s = segments(i)
    mask = causal(i) & (s[:, :, None] > s[:, None, :])
    return net.scores(x).masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1) @ net.value(x)


def against_another_count(net: Net, i: Tensor, x: Tensor) -> Tensor:
    s, other = segments(i), (i == SEPARATOR + 1).cumsum(1)
    mask = causal(i) & (s[:, :, None] == other[:, None, :])
    return net.scores(x).masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1) @ net.value(x)


def against_pieces_of_one_value(net: Net, i: Tensor, x: Tensor) -> Tensor:
    a, b = torch.stack([segments(i), i], -1).split(1, -1)
    mask = causal(i) & (a == b.mT)
    return net.scores(x).masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1) @ net.value(x)


def against_the_one_before(net: Net, i: Tensor, x: Tensor) -> Tensor:
    s = segments(i)
    mask = causal(i) & (s[:, :, None] == F.pad(s, (1, 0))[:, None, :-1])
    return net.scores(x).masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1) @ net.value(x)


def of_numbers_that_may_be_nan(net: Net, i: Tensor, x: Tensor) -> Tensor:
    s = (x[..., 0] - 1).log()
    mask = causal(i) & (s[:, :, None] == s[:, None, :])
    return net.scores(x).masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1) @ net.value(x)


def twice_less_once(net: Net, i: Tensor, x: Tensor) -> Tensor:
    s = segments(i)
    mask = causal(i) & (torch.sub(s[:, :, None], s[:, None, :], alpha=2) == 0)
    return net.scores(x).masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1) @ net.value(x)


HIDING = [
    strictly, against_another_count, against_pieces_of_one_value, against_the_one_before,
    of_numbers_that_may_be_nan, twice_less_once,
]  # fmt: skip


def is_proved(mix: Callable[..., Tensor]) -> bool:
    """Whether a certificate covers the model, whatever a few numbers say of it."""
    proof = prove_prefix(trace_module(Net(mix), ids(2, 12), length=40), 40)
    return all(proof.proved(o) for o in proof.program.outputs)


@pytest.mark.parametrize("mix", [what_is_hidden, *HIDING], ids=lambda f: f.__name__)
def test_a_row_that_may_see_nothing_is_not_proved(mix):
    assert is_proved(mix) is (mix not in HIDING)


# -- counts --------------------------------------------------------------------------------------------------


def positions_within_documents(net: Net, i: Tensor, x: Tensor) -> Tensor:
    place = torch.arange(i.shape[1])
    start = torch.where(i == SEPARATOR, place, 0).cummax(1).values
    return x + net.places(place - start)


def positions_beside_padding(net: Net, i: Tensor, x: Tensor) -> Tensor:
    mask = (i != SEPARATOR).long()
    return x + net.places((mask.cumsum(-1) - 1).clamp(min=0))


def wrapped_around(net: Net, i: Tensor, x: Tensor) -> Tensor:
    total = (i * 37).cumsum(1, dtype=torch.int8).long() + (2 * i + 1).cumprod(1) // 2**56
    return x * (1 + total[..., None] / 300)


def beyond_what_floats_hold(net: Net, i: Tensor, x: Tensor) -> Tensor:
    total = (i * 2**55 + i).cumsum(1)
    return x + net.places(total % 251) + net.places((i * 2**54 + i).cummax(1).values % 241)


def flags(net: Net, i: Tensor, x: Tensor) -> Tensor:
    seen, all_small = (i == SEPARATOR).cummax(1).values, (i < VOCAB - 2).cummin(1)
    return torch.where(seen[..., None], x, -x) + all_small.values[..., None] + all_small.indices[..., None]


def along_another_dimension(net: Net, i: Tensor, x: Tensor) -> Tensor:
    marks = torch.stack([i == 1, i == 2], 1).cumsum(-1)
    return x + net.places(marks[:, 0]) + net.places(marks[:, 1])


COUNTS = [
    positions_within_documents, positions_beside_padding, wrapped_around, beyond_what_floats_hold, flags,
    along_another_dimension,
]  # fmt: skip


@pytest.mark.parametrize("mix", COUNTS, ids=lambda f: f.__name__)
def test_one_row_of_integers_is_kept(mix):
    net = Net(mix)
    dec = decoder(net, ids(2, 12), max_length=256)
    assert {m.kind for m in dec.report.mixers} == {"scan"}
    assert not dec.engine.plan.histories
    sequence = ids(2, 200, seed=5)
    for prompt in (1, 7, 150):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-12


def test_a_count_of_what_the_sample_never_had():
    def mix(net: Net, i: Tensor, x: Tensor) -> Tensor:
        return x + net.places((i == VOCAB - 1).cumsum(1))

    net, sequence = Net(mix), ids(1, 40, seed=5)
    dec = decoder(net, ids(1, 12).clamp(max=VOCAB - 2), max_length=64)
    assert {m.lowering for m in dec.report.mixers} == {"running_sum"}
    assert gap(decoded(dec, sequence, 3), net(sequence)[:, 2:]) < 1e-12


def test_a_count_that_ends_in_another_kind_of_number():
    def mix(net: Net, i: Tensor, x: Tensor) -> Tensor:
        return x * (1 + torch.cumsum(i, 1, dtype=torch.float32)[..., None])

    net, sequence = Net(mix), ids(1, 40, seed=5)
    dec = decoder(net, ids(1, 12), max_length=64)
    assert gap(decoded(dec, sequence, 3), net(sequence)[:, 2:]) < 1e-12


def test_going_back_forks_and_beams():
    class OnFeatures(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            s = (x > 1).cumsum(1)
            return x.cos() * s + (x < 1).long().cummax(1).indices

    net = OnFeatures()
    dec = decoder(net, features(2, 20, WIDTH), max_length=200)
    sequence = features(2, 160, WIDTH)
    decoded(dec, sequence[:, :140], 20)
    goes_back(net, dec, sequence, (98, 40, 3, 0), 9)
    dec.reset()
    forks_and_beams(net, dec, WIDTH)


@pytest.mark.slow
def test_compiled():
    net = Net(bool_mask).float()
    sequence = ids(1, 60)
    dec = fi_compile.decoder(net, sequence[:, :20], max_length=200)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-5
