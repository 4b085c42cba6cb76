"""What changes no weight of a softmax: biases counted from the newest position, largest scores taken off, sinks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fi_compile
from corpus import scale_weights
from decoding import by_speed, decoded, decoder, features, gap
from fi_compile.capture import trace_module
from fi_compile.softmaxes import with_softmaxes_bare

WIDTH, HEADS = 8, 2
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def later(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


class Attention(nn.Module):
    """``weigh(self, scores)`` [B, heads, s, s] → weights."""

    def __init__(self, weigh):
        super().__init__()
        self.weigh = weigh
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        slopes = torch.tensor([0.5, 0.3], dtype=torch.float64)[:, None, None]
        self.register_buffer("table", slopes * torch.arange(-127, 1))
        self.register_buffer("curved", slopes * torch.arange(-127, 1) ** 2 / 50)
        lag = torch.arange(128)[:, None] - torch.arange(128)
        self.register_buffer("square", -slopes * lag.abs().double().sqrt())
        self.register_buffer("late", torch.zeros(128, dtype=torch.float64))
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.3], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        weights = self.weigh(self, q @ k.mT / math.sqrt(WIDTH // HEADS))
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def last_columns(self, scores: Tensor) -> Tensor:
    """A table as long as the longest sequence, cut at its end."""
    length = scores.shape[-1]
    biased = scores + self.table[:, :, self.table.shape[-1] - length :]
    return biased.masked_fill(later(length), LOWEST).float().softmax(-1).to(scores.dtype)


def last_square(self, scores: Tensor) -> Tensor:
    """A table of lags, cut at the end of both its axes, again for each row of the batch."""
    length = scores.shape[-1]
    bias = self.square[:, -length:, -length:].repeat(scores.shape[0], 1, 1, 1)
    return (scores + bias).masked_fill(later(length), -math.inf).softmax(-1)


def repeated_columns(self, scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    bias = self.table[:, :, -length:].expand(scores.shape[0], -1, length, -1)
    return (scores + bias.repeat(1, 1, 1, 1)).masked_fill(later(length), -math.inf).softmax(-1)


def counted_down(self, scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    bias = torch.arange(1 - length, 1, dtype=scores.dtype) * 0.25
    mask = torch.zeros(length, length, dtype=scores.dtype).masked_fill(later(length), -math.inf)
    return (2 * (scores + bias) + mask).softmax(-1)


def learned_slopes(self, scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    biased = scores - self.slopes.abs()[:, None, None] * torch.arange(length - 1, -1, -1)
    return biased.masked_fill(later(length), -math.inf).softmax(-1)


def half_slopes(self, scores: Tensor) -> Tensor:
    """Powers of two, times whole numbers: exact as far as these are."""
    length = scores.shape[-1]
    bias = torch.tensor([0.5, 0.25], dtype=torch.bfloat16)[:, None, None] * torch.arange(1 - length, 1)
    return (scores + bias).masked_fill(later(length), -math.inf).softmax(-1)


def largest_taken_off(self, scores: Tensor) -> Tensor:
    scores = scores.masked_fill(later(scores.shape[-1]), -math.inf)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1)


def by_hand(self, scores: Tensor) -> Tensor:
    """The largest of masked scores is one of an earlier key."""
    scores = scores.masked_fill(later(scores.shape[-1]), -math.inf)
    weights = (scores - scores.max(-1, keepdim=True).values).exp()
    return weights / weights.sum(-1, keepdim=True)


def times_the_largest(self, scores: Tensor) -> Tensor:
    """No softmax at all: the largest score is a number for each query."""
    scores = scores.masked_fill(later(scores.shape[-1]), LOWEST)
    return scores.masked_fill(later(scores.shape[-1]), 0.0) * scores.amax(-1, keepdim=True).tanh()


def sink(self, scores: Tensor) -> Tensor:
    """One more column, the same to all queries: it takes weight from the keys."""
    batch, _, length, _ = scores.shape
    scores = scores.masked_fill(later(length), LOWEST)
    column = self.sinks.view(1, -1, 1, 1).expand(batch, -1, length, -1)
    joined = torch.cat([scores, column], -1)
    joined = joined - joined.max(-1, keepdim=True).values
    return F.softmax(joined, -1)[..., :-1]


def two_sinks_before(self, scores: Tensor) -> Tensor:
    """Columns of the queries themselves, before the keys."""
    own = (scores * torch.eye(scores.shape[-1], dtype=scores.dtype)).sum(-1)
    columns = torch.stack([own / 2, torch.ones_like(own)], -1)
    scores = scores.masked_fill(later(scores.shape[-1]), -math.inf)
    return torch.cat([columns, scores], -1).softmax(-1)[..., 2:]


MODELS = [
    last_columns,
    last_square,
    repeated_columns,
    counted_down,
    learned_slopes,
    half_slopes,
    largest_taken_off,
    by_hand,
    times_the_largest,
    sink,
    two_sinks_before,
]


def made(weigh) -> nn.Module:
    torch.manual_seed(0)
    net = scale_weights(Attention(weigh), 0).double().eval()
    net.sinks.copy_(torch.tensor([1.0, 3.0]))  # a sink that takes nothing would show nothing
    return net


@pytest.mark.parametrize("weigh", by_speed(MODELS, (last_square, learned_slopes, by_hand, sink).__contains__))
def test_keys_and_values_are_kept(weigh):
    net = made(weigh)
    dec = decoder(net, features(2, 9, WIDTH), max_length=100)
    assert {m.kind for m in dec.report.mixers} == {"attention"}
    sequence = features(2, 60, WIDTH)
    allowed = 1e-6 if weigh is last_columns else 1e-12  # its softmax is in float32
    for prompt in (1, 17):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < allowed


def curved(self, scores: Tensor) -> Tensor:
    """Not linear: an earlier query would have weighed these keys otherwise."""
    length = scores.shape[-1]
    biased = scores + self.curved[:, :, self.curved.shape[-1] - length :]
    return biased.masked_fill(later(length), -math.inf).softmax(-1)


def largest_of_queries(self, scores: Tensor) -> Tensor:
    scores = scores.masked_fill(later(scores.shape[-1]), -math.inf)
    weights = (scores - scores.amax(-2, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def largest_of_next(self, scores: Tensor) -> Tensor:
    """Of the keys up to the one after the query."""
    length = scores.shape[-1]
    beyond = torch.ones(length, length, dtype=torch.bool).triu(2)
    seen = (scores + 9.0 * later(length)).masked_fill(beyond, -math.inf)
    return (scores - seen.amax(-1, keepdim=True)).masked_fill(later(length), 0.0)


def shifted_mask(self, scores: Tensor) -> Tensor:
    """The masked are lowered by too little to weigh nothing beside a bias."""
    length = scores.shape[-1]
    return (scores + self.table[:, :, self.table.shape[-1] - length :] - 20.0 * later(length)).softmax(-1)


@pytest.mark.parametrize(
    "weigh",
    by_speed(
        [curved, largest_of_queries, largest_of_next, shifted_mask], (curved, largest_of_next).__contains__
    ),
)
def test_what_does_change_weights_is_refused(weigh):
    net = made(weigh)
    sequence = features(2, 40, WIDTH)
    assert gap(net(sequence)[:, :20], net(sequence[:, :20])) > 1e-6
    with pytest.raises(fi_compile.Unsupported):
        decoder(net, features(2, 9, WIDTH), max_length=100)


@pytest.mark.slow
def test_a_square_that_lags_do_not_make_is_refused():
    """One entry that is only seen by sequences longer than any sample."""
    net = made(last_square)
    net.square[:, 20, 10] += 0.5
    with pytest.raises(fi_compile.Unsupported):
        decoder(net, features(2, 9, WIDTH), max_length=128)


def test_a_square_is_asked_again():
    net, sequence = made(last_square), features(2, 20, WIDTH)
    dec = decoder(net, sequence[:, :9], max_length=30)
    net.square.mul_(2.0)
    assert gap(decoded(dec, sequence, 5), net(sequence)[:, 4:]) < 1e-12
    net.square[:, 100, 99] += 1
    with pytest.raises(fi_compile.Unsupported):
        dec.prefill(sequence)


def late_numbers(self, length: int) -> Tensor:
    """A number for each query, 0 for all that a short sample has."""
    return self.late[:length, None].expand(-1, 2).amax(-1, keepdim=True)


def beside_a_sink(self, scores: Tensor) -> Tensor:
    """The number lowers the keys, and the sink it is beside not."""
    length = scores.shape[-1]
    lowered = scores.masked_fill(later(length), -math.inf) - late_numbers(self, length)
    column = self.sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, length, -1)
    return torch.cat([lowered, column], -1).softmax(-1)[..., :-1]


def before_rounding(self, scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    lowered = torch.div(scores - late_numbers(self, length), 0.7, rounding_mode="floor")
    return lowered.masked_fill(later(length), -math.inf).softmax(-1)


def before_a_cast(self, scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    lowered = (3 * (scores - late_numbers(self, length))).to(torch.int32).to(scores.dtype)
    return lowered.masked_fill(later(length), -math.inf).softmax(-1)


NUMBERS = [beside_a_sink, before_rounding, before_a_cast]


@pytest.mark.parametrize("weigh", NUMBERS)
def test_numbers_that_only_late_queries_have(weigh):
    """A sample shows no difference without them, because there they are 0."""
    net = made(weigh)
    net.late[30:] = 0.37
    sequence = features(2, 40, WIDTH)
    program = trace_module(net, features(2, 9, WIDTH))
    assert gap(with_softmaxes_bare(program).run(sequence), net(sequence)) < 1e-12


def test_biases_that_bend_by_little():
    """In single precision the furthest of 2^17 entries is rounded by more than the bend."""

    def bent(self, scores: Tensor) -> Tensor:
        length = scores.shape[-1]
        bias = 0.05 * torch.arange(1 - length, 1, dtype=scores.dtype)
        bias = bias - 0.003 * (bias < -0.8)
        return (scores + bias).masked_fill(later(length), -math.inf).softmax(-1)

    net, sequence = made(bent).float(), features(2, 40, WIDTH).float()
    assert gap(net(sequence)[:, :30], net(sequence[:, :30])) > 1e-5
    with pytest.raises(fi_compile.Unsupported):
        decoder(net, features(2, 9, WIDTH).float(), max_length=64)


def rounded_slopes(self, scores: Tensor) -> Tensor:
    """Each product is rounded by its distance from the newest position, which follows the length."""
    length = scores.shape[-1]
    slopes, distance = torch.tensor([0.65, 0.3]).bfloat16()[:, None, None], torch.arange(1 - length, 1)
    bias = (slopes * distance.bfloat16()).to(scores.dtype)
    return (scores + bias).masked_fill(later(length), -math.inf).softmax(-1)


def learned_bend(self, scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    bias = self.slopes[:, None, None] * torch.arange(1 - length, 1).clamp(min=-20)
    return (scores + bias).masked_fill(later(length), -math.inf).softmax(-1)


@pytest.mark.parametrize("weigh", [rounded_slopes, learned_bend])
def test_products_that_are_no_multiples_of_the_distance(weigh):
    net, sequence = made(weigh), features(2, 40, WIDTH)
    assert gap(net(sequence)[:, :20], net(sequence[:, :20])) > 1e-5
    program = trace_module(net, features(2, 9, WIDTH))
    assert with_softmaxes_bare(program) is program


def test_half_precision_ends_where_it_rounds():
    program = with_softmaxes_bare(trace_module(made(half_slopes), features(2, 9, WIDTH)))
    assert program.lengths.maximum == 257


def strictly_earlier(self, scores: Tensor) -> Tensor:
    scores = scores.masked_fill(later(scores.shape[-1]) | torch.eye(scores.shape[-1]).bool(), -math.inf)
    return (scores - scores.amax(-1, keepdim=True)).exp()


def test_rows_without_a_key_are_named():
    with pytest.raises(fi_compile.Unsupported, match="of rows that may be masked as a whole"):
        decoder(made(strictly_earlier), features(2, 9, WIDTH), max_length=100)


def test_queries_that_are_not_beside_the_keys():
    """A bias by the distance from the query would stand at the wrong place."""

    class Between(Attention):
        def forward(self, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).unbind(2)
            scores = torch.einsum("bqhd,bkhd->bqhk", q, k)
            scores = scores + 0.25 * torch.arange(1 - length, 1, dtype=x.dtype)
            scores = scores.masked_fill(later(length)[None, :, None], -math.inf)
            return self.out(torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))

    program = trace_module(Between(None).double().eval(), features(2, 9, WIDTH))
    assert with_softmaxes_bare(program) is program


@pytest.mark.slow
def test_linear_at_its_end_only():
    """Up to where it is evaluated: a bend far back is found."""
    net = made(last_columns)
    net.table[..., :30] *= 2
    assert with_softmaxes_bare(trace_module(net, features(2, 9, WIDTH))).lengths.maximum is not None
    with pytest.raises(fi_compile.Unsupported):
        decoder(net, features(2, 9, WIDTH), max_length=120)


def test_weights_that_are_seen_stay_as_they_are():
    """Columns that are not cut off, or cut elsewhere, are no sinks."""

    def kept(self, scores: Tensor) -> Tensor:
        length = scores.shape[-1]
        joined = torch.cat([scores.masked_fill(later(length), LOWEST), scores[..., :1] * 0], -1).softmax(-1)
        return joined[..., :-1] + joined[..., -1:] * torch.eye(length)

    net = made(kept)
    program = trace_module(net, features(2, 9, WIDTH))
    sequence = features(2, 11, WIDTH)
    assert gap(with_softmaxes_bare(program).run(sequence), net(sequence)) < 1e-12
