"""Chunks of positions: what is certified within them and across, and what must not be."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus import scale_weights
from decoding import Net, by_speed, decoded, decoder, features, gap
from fi_compile import capture
from fi_compile.capture import trace_module
from fi_compile.errors import Unsupported
from fi_compile.exporting import export_module
from fi_compile.passes.prove_prefix import prove_prefix

WIDTH, CHUNK, LONGEST = 6, 8, 61


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def padded(x: Tensor, spare: int = 0) -> Tensor:
    """Whole chunks [B, n, 8, D]; with spare ones, as many lengths as there are take one way through torch."""
    x = F.pad(x, (0, 0, 0, -x.shape[1] % CHUNK + spare * CHUNK))
    return x.view(x.shape[0], -1, CHUNK, x.shape[-1])


def positions(y: Tensor, length: int) -> Tensor:
    return y.reshape(y.shape[0], -1, y.shape[-1])[:, :length]


def by_subtraction(q, k, v, length):
    q, k, v = padded(q), padded(k), padded(v)
    state = torch.einsum("bncd,bnce->bnde", k, v)
    across = q @ (state.cumsum(1) - state)
    return positions(across + (q @ k.mT).tril() @ v, length)


def by_concatenation(q, k, v, length):
    q, k, v = padded(q), padded(k), padded(v)
    state = (k.mT @ v).cumsum(1)
    state = torch.cat([torch.zeros_like(state[:, :1]), state[:, :-1]], 1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    within = (q @ k.mT).masked_fill(later, 0) @ v
    return positions(q @ state + within, length)


def by_padding(q, k, v, length):
    """Heads apart, chunks by unflatten, the state moved on by padding in front."""
    q, k, v = (F.pad(x, (0, 0, 0, -length % CHUNK)).unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
    q, k, v = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    state = F.pad((k.mT @ v).cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1]
    out = (q @ state + (q @ k.mT).tril() @ v).flatten(2, 3)
    return out.transpose(1, 2).flatten(2)[:, :length]


def retained(q, k, v, length, rate, extra=1.0, spare=0, joined=None):
    """Retention: within a chunk by a table, across by a table of chunks that leaves out the own one.

    ``extra``: what chunks more than three apart count, beside their decay. ``joined``: added to it, of whole chunks.
    """
    q, k, v = padded(q, spare), padded(k, spare), padded(v, spare)
    i = torch.arange(CHUNK, dtype=q.dtype)
    lag = i[:, None] - i[None, :]
    within = (q @ k.mT * torch.where(lag >= 0, rate ** lag.clamp(min=0), 0.0)) @ v
    state = (k * rate ** (CHUNK - 1 - i)[:, None]).mT @ v
    n = torch.arange(q.shape[1], dtype=q.dtype)
    apart = n[:, None] - n[None, :]
    weights = torch.where(apart > 0, rate ** (CHUNK * (apart - 1).clamp(min=0)), 0.0)
    weights = weights * torch.where(apart > 3, extra, 1.0)
    across = torch.einsum("bzcd,zn,bnde->bzce", q * rate ** (i + 1)[:, None], weights, state)
    return positions(within + across + (0 if joined is None else joined(k, v)), length)


def decayed_across(q, k, v, length):
    return retained(q, k, v, length, 0.9)


def spared(q, k, v, length):
    return retained(q, k, v, length, 0.9, spare=1)


def no_recurrence(q, k, v, length):
    """Far chunks count 1e-5 more than they would after their decay: 1e-13 of what near ones do, which hide it."""
    return retained(q, k, v, length, 0.5, extra=1.00001, spare=1)


SOUND = [by_subtraction, by_concatenation, by_padding, decayed_across]


# what looks like it and is not


def own_chunk_seen_whole(q, k, v, length):
    q, k, v = padded(q), padded(k), padded(v)
    return positions(q @ (k.mT @ v).cumsum(1), length)


def unmasked_within(q, k, v, length):
    q, k, v = padded(q), padded(k), padded(v)
    return positions((q @ k.mT) @ v, length)


def normalised_over_the_chunk(q, k, v, length):
    q, k, v = padded(q), padded(k), padded(v)
    within = (q @ k.mT).tril() @ v
    return positions(within / (1 + k.square().sum((2, 3), keepdim=True)), length)


def shifted_the_wrong_way(q, k, v, length):
    q, k, v = padded(q), padded(k), padded(v)
    state = (k.mT @ v).cumsum(1)
    state = torch.cat([state[:, 1:], torch.zeros_like(state[:, :1])], 1)
    return positions(q @ state + (q @ k.mT).tril() @ v, length)


def masked_the_wrong_way(q, k, v, length):
    q, k, v = padded(q), padded(k), padded(v)
    return positions((q @ k.mT).triu() @ v, length)


def padded_in_front(q, k, v, length):
    """Chunks end where the sequence ends: what they hold moves when it grows."""
    pad = -length % CHUNK
    q, k, v = (F.pad(x, (0, 0, pad, 0)).view(x.shape[0], -1, CHUNK, WIDTH) for x in (q, k, v))
    state = k.mT @ v
    out = q @ (state.cumsum(1) - state)
    return out.reshape(out.shape[0], -1, WIDTH)[:, pad:]


def places_before_chunks(q, k, v, length):
    """Each chunk holds every n-th position."""
    pad = -length % CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, pad)).view(x.shape[0], CHUNK, -1, WIDTH).transpose(1, 2) for x in (q, k, v))
    state = k.mT @ v
    out = q @ (state.cumsum(1) - state)
    return out.transpose(1, 2).reshape(out.shape[0], -1, WIDTH)[:, :length]


def less_another_term(q, k, v, length):
    """A running sum less something that is not its newest term."""
    q, k, v = padded(q), padded(k), padded(v)
    state = k.mT @ v
    return positions(q @ (state.cumsum(1) - 2 * state), length)


FLAWED = [
    own_chunk_seen_whole, unmasked_within, normalised_over_the_chunk, shifted_the_wrong_way, masked_the_wrong_way,
    padded_in_front, places_before_chunks, less_another_term,
]  # fmt: skip


class Chunked(nn.Module):
    def __init__(self, mix: Callable[..., Tensor]):
        super().__init__()
        self.mix = mix
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(*self.qkv(x).chunk(3, -1), x.shape[1]))


def model(mix: Callable[..., Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return scale_weights(Chunked(mix), 0).double().eval()


def accepted(mix: Callable[..., Tensor]) -> bool:
    try:
        program = trace_module(model(mix), features(2, 21, WIDTH), length=LONGEST)
    except Unsupported:  # it does something else at some lengths, say
        return False
    proof = prove_prefix(program, LONGEST)
    return all(proof.proved(o) for o in program.outputs)


def consistent(mix: Callable[..., Tensor]) -> bool:
    """The oracle: the model's own outputs at several lengths."""
    net, x = model(mix), features(2, 50, WIDTH)
    out = {n: net(x[:, :n]) for n in (5, 8, 13, 16, 29, 32, 33, 50)}
    return all(gap(out[50][:, :n], y) < 1e-12 for n, y in out.items())


@pytest.mark.parametrize("mix", by_speed(SOUND, lambda f: f is by_subtraction), ids=lambda f: f.__name__)
def test_chunks_are_certified(mix, monkeypatch):
    traces: list[bool] = []

    def export(model, example, dynamic_batch, dynamic_length, general=False):
        traces.append(dynamic_length)
        return export_module(model, example, dynamic_batch, dynamic_length, general)

    monkeypatch.setattr(capture, "export_module", export)
    assert consistent(mix)
    program = trace_module(model(mix), features(2, 21, WIDTH), length=LONGEST)
    assert program.lengths.are_all
    assert program.lengths.maximum is None
    assert traces.count(True) <= 5
    assert traces.count(False) < CHUNK  # those within the first chunk, where torch leaves each of them out
    proof = prove_prefix(program, LONGEST)
    assert all(proof.proved(o) for o in program.outputs)


@pytest.mark.parametrize("mix", by_speed(FLAWED, lambda f: f is unmasked_within), ids=lambda f: f.__name__)
def test_flawed_chunks_are_not(mix):
    assert not consistent(mix)
    assert not accepted(mix)


# Heads that are told apart only within the unit stay a region.
LOWERINGS = {by_padding: "history", no_recurrence: "history"}


@pytest.mark.parametrize(
    "mix", by_speed([*SOUND, spared, no_recurrence], lambda f: f is no_recurrence), ids=lambda f: f.__name__
)
def test_decoding(mix):
    net = model(mix)
    dec = decoder(net, features(2, 21, WIDTH), max_length=LONGEST)
    assert [m.lowering for m in dec.report.mixers] == [LOWERINGS.get(mix, "recurrence")]
    for length in (1, 2, 31, 32, 33, LONGEST):
        sequence = features(2, length, WIDTH)
        for prompt in sorted({1, min(7, length), length}):
            assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-10


def test_keys_that_meet_values_of_another_position(monkeypatch):
    """Of 40 positions before, which a short sample does not have. Chunks of one position are quick to trace."""
    monkeypatch.setitem(globals(), "CHUNK", 1)

    def joined(k, v):
        return k * F.pad(v, (0, 0, 0, 0, 40, 0))[:, :-40]

    def mix(q, k, v, length):
        return retained(q, k, v, length, 0.8, spare=1, joined=joined)

    net, sequence = model(mix), features(2, 50, WIDTH)
    dec = decoder(net, features(2, 21, WIDTH), max_length=LONGEST)
    assert gap(decoded(dec, sequence, 1), net(sequence)) < 1e-10


def test_a_single_chunk_that_is_squeezed():
    """The number of dimensions leaves no guard by itself, and no operator: with one chunk there is one less."""

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        chunks = padded(x)
        return positions(chunks * (1 + torch.squeeze(chunks.mean((2, 3)), 1).dim()), x.shape[1])

    program = trace_module(Net(forward), features(2, 21, WIDTH), length=LONGEST)
    assert program.lengths.fewest == CHUNK + 1


def test_lengths_are_compared_however_the_output_is_written():
    """Of whole chunks, as many positions as there are at most: that is a length, though it is not called that."""

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        chunks = padded(x)
        kept = F.conv1d(chunks.mean((2, 3))[:, None], x.new_ones(1, 1, 1)).squeeze(-1)
        return positions(chunks * (1 + kept.dim()), x.shape[1])

    program = trace_module(Net(forward), features(2, 21, WIDTH), length=LONGEST)
    assert program.lengths.fewest == CHUNK + 1
