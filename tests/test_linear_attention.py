"""Linear attention written over all pairs of positions: decoded with a state that does not grow."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus import scale_weights
from corpus.attention import Attention, lags, linear_quadratic, retention
from decoding import (
    decoded,
    decoder,
    features,
    follows_prompts,
    forks_and_beams,
    gap,
    goes_back,
    keeps_keys_and_values,
    kinds,
    lanes,
    module,
    rounding,
)
from fi_compile.kernels.linear_attention import (
    Contraction,
    attention_reference,
    attention_step,
    final_state,
)
from fi_compile.lane import Lane

WIDTH = 8


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def seen(q: Tensor) -> Tensor:
    return lags(q, q.shape[-2]) >= 0


def causal(q: Tensor) -> Tensor:
    return seen(q).to(q.dtype)


def decay(q: Tensor, rate: Tensor, first: int = 0) -> Tensor:
    """rate^(lag - first) at lags ≥ first, else 0."""
    lag = lags(q, q.shape[-2]) - first
    return torch.where(lag >= 0, rate ** lag.clamp(min=0), 0.0)


def scalar(q: Tensor, value: float) -> Tensor:
    return torch.tensor(value, dtype=q.dtype)


# ways to write it


def relu_with_epsilon(q, k, v):
    scores = (F.relu(q) @ F.relu(k).mT) * causal(q)
    return (scores @ v) / (scores.sum(-1, keepdim=True) + 1e-6)


def softmax_features(q, k, v):
    scores = torch.tril(q.softmax(-1) @ k.softmax(-1).mT)
    return scores @ v / scores.sum(-1, keepdim=True).clamp_min(1e-4)


def normalised_scores(q, k, v):
    scores = torch.tril(elu(q) @ elu(k).mT)
    return (scores / (scores.sum(-1, keepdim=True) + 1e-6)) @ v


def scaled_by_a_reciprocal(q, k, v):
    scores = torch.einsum("bhtd,bhsd->bhts", elu(q), elu(k)).masked_fill(~seen(q), 0)
    norm = 1 / (torch.einsum("bhts->bht", scores) + 1e-6)
    return torch.einsum("bhts,bht,bhsd->bhtd", scores, norm, v)


def hedgehog(q, k, v):
    """Hedgehog (arXiv 2402.04347): φ(x) = softmax of x and of -x."""

    def phi(x):
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    scores = torch.einsum("bhmd,bhnd->bhmn", phi(q), phi(k)).masked_fill(later, 0)
    return torch.einsum("bhmn,bhnd->bhmd", scores / scores.sum(-1, keepdim=True), v)


def based(q, k, v):
    """Based (arXiv 2402.18668): φ the Taylor series of exp to second order."""

    def phi(x):
        square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(2 * x.shape[-1])
        return torch.cat([torch.ones_like(x[..., :1]), x / x.shape[-1] ** 0.25, square], -1)

    scores = torch.tril(phi(q) @ phi(k).mT)
    return scores @ v / (scores.sum(-1, keepdim=True) + 1e-12)


def positions_before_heads(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (elu(q), elu(k), v))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k)
    scores = torch.where(seen(scores), scores, torch.zeros_like(scores))
    return torch.einsum("bhlm,bmhd->blhd", scores, v).transpose(1, 2)


def one_einsum(q, k, v):
    return torch.einsum("bhtd,bhsd,ts,bhse->bhte", elu(q), elu(k), causal(q), v)


def exponential_decay(q, k, v):
    rate = torch.log(1 - 2.0 ** -torch.arange(3, 3 + q.shape[1], dtype=q.dtype))
    weights = torch.exp(lags(q, q.shape[-2]) * rate[:, None, None]) * seen(q)
    return (q @ k.mT * q.shape[-1] ** -0.5 * weights) @ v


def slow_decay(q, k, v):
    """Rates whose ρ no float32 holds."""
    rate = torch.arange(1, 1 + q.shape[1], dtype=q.dtype) * 7e-4
    return (q @ k.mT * torch.exp(-lags(q, q.shape[-2]) * rate[:, None, None]) * seen(q)) @ v


def retention_through_infinity(q, k, v):
    """The mask of RetNet's code: lags above the diagonal become infinite, decayed to 0."""
    rate = torch.log(1 - 2.0 ** (-5 - torch.arange(q.shape[1], dtype=q.dtype)))
    i = torch.arange(q.shape[-2], dtype=q.dtype)
    lag = (i[:, None] - i[None, :]).masked_fill(~seen(q), float("inf"))
    weights = torch.nan_to_num(torch.exp(lag * rate[:, None, None]))
    return F.layer_norm(q @ k.mT * weights @ v, (v.shape[-1],))


def rotated(q, k, v):
    """xPos (arXiv 2212.10554): a rotation and a growth by position on one side, its inverse on the other."""
    t = torch.arange(q.shape[-2], dtype=q.dtype)[:, None]
    cos, sin = (0.3 * t).cos(), (0.3 * t).sin()

    def turn(x, sign):
        a, b = x[..., :1], x[..., 1:]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1) * 1.01 ** (sign * t)

    return (turn(q, -1) @ turn(k, 1).mT * causal(q)) @ v


def earlier_positions_only(q, k, v):
    return torch.tril(q @ k.mT, -1) @ v


def own_position_apart(q, k, v):
    weights = decay(q, scalar(q, 0.9), 1) + 0.3 * torch.eye(q.shape[-2], dtype=q.dtype)
    return (q @ k.mT * weights) @ v


def shared_keys(q, k, v):
    """All heads read the same keys and values, each with a decay of its own."""
    rate = torch.linspace(0.8, 0.99, q.shape[1], dtype=q.dtype)[:, None, None]
    return (q @ k[:, :1].mT * decay(q, rate)) @ v[:, :1]


def gated_keys(q, k, v):
    return (torch.tril(q @ k.mT) * k[..., 0].sigmoid()[:, :, None, :]) @ v


def divided_keys(q, k, v):
    return (torch.tril(q @ k.mT) / (1 + k.norm(dim=-1))[:, :, None, :]) @ v


def mean_so_far(q, k, v):
    """A scale that depends on the position belongs to the query."""
    count = torch.arange(1, q.shape[-2] + 1, dtype=q.dtype)
    return (torch.tril(q @ k.mT) / count[:, None]) @ v


def growing(q, k, v):
    return (q @ k.mT * decay(q, scalar(q, 1.01))) @ v


def alternating(q, k, v):
    return (q @ k.mT * decay(q, scalar(q, -0.9))) @ v


def summed_decay(q, k, v):
    total = torch.full((q.shape[-2],), math.log(0.97), dtype=q.dtype).cumsum(0)
    return (q @ k.mT * torch.tril(torch.exp(total[:, None] - total[None, :]))) @ v


def weighted_sum_of_keys(q, k, v):
    return torch.tril(elu(q) @ elu(k).mT).sum(-1, keepdim=True) * v


def one_value_as_query_and_key(q, k, v):
    return torch.einsum("bhtd,bhsd,ts,bhse->bhte", q, q, causal(q), v)


def one_value_as_all(q, k, v):
    return (q @ q.mT).tril() @ q


def one_value_as_all_in_one_einsum(q, k, v):
    return torch.einsum("bhtd,bhsd,ts,bhse->bhte", q, q, causal(q), q)


def keys_as_values(q, k, v):
    return torch.einsum("bhts,bhse->bhte", torch.einsum("bhtd,bhsd->bhts", q, k).tril(), k)


RECURRENT: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    linear_quadratic, retention, relu_with_epsilon, softmax_features, normalised_scores, scaled_by_a_reciprocal,
    hedgehog, based, positions_before_heads, one_einsum, exponential_decay, retention_through_infinity, rotated,
    earlier_positions_only, own_position_apart, shared_keys, gated_keys, divided_keys, mean_so_far, growing,
    alternating, summed_decay, weighted_sum_of_keys, one_value_as_query_and_key, one_value_as_all,
    one_value_as_all_in_one_einsum, keys_as_values,
]  # fmt: skip


# what looks like it and is not


def hole(q, k, v):
    """One far lag is hidden."""
    lag = lags(q, q.shape[-2])
    return (q @ k.mT * ((lag >= 0) & (lag != 90))) @ v


def hole_in_a_decay(q, k, v):
    lag = lags(q, q.shape[-2])
    return (q @ k.mT * decay(q, scalar(q, 0.5)) * (lag != 61)) @ v


def window(q, k, v):
    lag = lags(q, q.shape[-2])
    return (q @ k.mT * ((lag >= 0) & (lag < 100))) @ v


def nearly_geometric(q, k, v):
    bent = 1 + 1e-9 * lags(q, q.shape[-2]).to(q.dtype).sin()
    return (q @ k.mT * decay(q, scalar(q, 0.99)) * bent) @ v


def two_rates(q, k, v):
    return (q @ k.mT * (decay(q, scalar(q, 0.9)) + decay(q, scalar(q, 0.6)))) @ v


def hidden_position(q, k, v):
    """The mask depends on the position, not on the lag: one far key is hidden from all."""
    i = torch.arange(q.shape[-2])
    return (q @ k.mT * (seen(q) & (i != 77)[None, :])) @ v


def hidden_pair(q, k, v):
    """One far position does not see one key; the newest row shows nothing of it."""
    i = torch.arange(q.shape[-2])
    return (q @ k.mT * (seen(q) & ~((i == 120)[:, None] & (i == 3)[None, :]))) @ v


def clamped_scores(q, k, v):
    """No sample reaches the bound."""
    return torch.tril((q @ k.mT).clamp(-1e4, 1e4)) @ v


def decay_by_position(q, k, v):
    i = torch.arange(q.shape[-2], dtype=q.dtype)
    return (torch.tril(q @ k.mT) * scalar(q, 0.99) ** (i[:, None] + i[None, :])) @ v


def squared_scores(q, k, v):
    scores = torch.tril(q @ k.mT)
    return (scores * scores) @ v


def scores_plus_a_table(q, k, v):
    far = lags(q, q.shape[-2]) == 70
    return torch.tril(q @ k.mT + far) @ v


CACHED: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    hole, hole_in_a_decay, window, nearly_geometric, two_rates, hidden_position, hidden_pair, decay_by_position,
    clamped_scores, squared_scores, scores_plus_a_table,
]  # fmt: skip


def model(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float64
) -> nn.Module:
    return module(lambda width, l_max: Attention(width, l_max, attend), WIDTH, 0).to(dtype)


@pytest.mark.parametrize("attend", RECURRENT, ids=lambda f: f.__name__)
def test_it_runs_as_a_recurrence(attend):
    net = model(attend)
    dec = decoder(net, features(2, 20, WIDTH), max_length=160)
    assert kinds(dec) == {"linear_attention"}
    assert {mixer.lowering for mixer in dec.report.mixers} == {"recurrence"}
    assert not dec.engine.plan.histories
    follows_prompts(net, dec, WIDTH, 1e-12)


@pytest.mark.parametrize("attend", CACHED, ids=lambda f: f.__name__)
def test_anything_else_keeps_keys_and_values(attend):
    keeps_keys_and_values(model(attend), WIDTH)


@pytest.mark.parametrize("attend", [linear_quadratic, slow_decay], ids=lambda f: f.__name__)
def test_long_sequences(attend):
    double, single = model(attend), model(attend, torch.float32)
    sequence = features(1, 1100, WIDTH).float()
    exact = decoder(double, features(2, 20, WIDTH), max_length=1100)
    fast = decoder(single, features(2, 20, WIDTH).float(), max_length=1100)
    expected = double(sequence.double())
    assert kinds(exact) == kinds(fast) == {"linear_attention"}
    for prompt in (1, 1000):
        assert gap(decoded(exact, sequence.double(), prompt), expected[:, prompt - 1 :]) < 1e-10
        assert rounding(fast, single, double, sequence, prompt) < 3
    assert {lane.tensors[name].dtype for lane in lanes(fast) for name in ring_names(lane)} == {torch.float32}


def ring_names(lane) -> list[str]:
    return [name for name in lane.tensors if name.startswith("ring:")]


def test_the_state_does_not_grow_with_the_capacity():
    def held(attend, capacity: int) -> int:
        dec = decoder(model(attend), features(2, 20, WIDTH), max_length=capacity)
        return Lane(dec.engine.derived(2), 2).state_bytes

    assert held(retention, 64) == held(retention, 512)
    assert held(hole, 512) > 8 * held(retention, 512)


def test_tables_from_data_of_single_precision():
    net = model(based, torch.float32)
    dec = decoder(net, features(2, 20, WIDTH).float(), max_length=64)
    assert kinds(dec) == {"linear_attention"}
    sequence = features(2, 40, WIDTH).float()
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-5


def test_bfloat16():
    net = model(linear_quadratic, torch.bfloat16)
    dec = decoder(net, features(2, 20, WIDTH).bfloat16(), max_length=64)
    assert kinds(dec) == {"linear_attention"}
    sequence = features(2, 40, WIDTH).bfloat16()
    double = model(linear_quadratic, torch.bfloat16).double()
    truth = double(sequence.double())[:, 6:]
    found = decoded(dec, sequence, 7)
    assert found.dtype == torch.bfloat16
    own = (net(sequence)[:, 6:].double() - truth).abs().max()
    assert (found.double() - truth).abs().max() < 1.5 * own


@pytest.fixture(scope="module")
def retained():
    with torch.no_grad():
        net = model(retention)
        return net, decoder(net, features(2, 20, WIDTH), max_length=200)


def test_going_back_a_few_positions_is_free(retained):
    net, dec = retained
    sequence = features(2, 60, WIDTH)
    decoded(dec, sequence[:, :40], 20)
    (lane,) = lanes(dec)
    assert lane.rewind(36)
    assert not lane.rewind(20)
    goes_back(net, dec, sequence, (34, 31, 3, 0), 9)
    dec.reset()


def test_forks_and_beams(retained):
    net, dec = retained
    forks_and_beams(net, dec, WIDTH)
    dec.reset()


def test_ragged_prompts(retained):
    net, dec = retained
    sequence = features(2, 40, WIDTH)
    found = dec.prefill(sequence[:, :30], lengths=torch.tensor([30, 11]))
    assert gap(found[0], net(sequence)[0, 29]) < 1e-12
    assert gap(found[1], net(sequence)[1, 10]) < 1e-12
    following = dec.step(torch.stack([sequence[0, 30], sequence[1, 11]]))
    assert gap(following[0], net(sequence)[0, 30]) < 1e-12
    assert gap(following[1], net(sequence)[1, 11]) < 1e-12
    dec.reset()


def test_growth():
    net = model(retention)
    dec = decoder(net, features(2, 20, WIDTH), capacity=32)
    sequence = features(2, 150, WIDTH)
    assert gap(decoded(dec, sequence, 20), net(sequence)[:, 19:]) < 1e-12
    assert kinds(dec) == {"linear_attention"}


def test_growth_beyond_a_window_looks_again():
    """Up to 100 positions a window of 100 lags is no window."""
    net = model(window)
    dec = decoder(net, features(2, 20, WIDTH), capacity=64)
    assert kinds(dec) == {"linear_attention"}
    sequence = features(2, 150, WIDTH)
    assert gap(decoded(dec, sequence, 20), net(sequence)[:, 19:]) < 1e-12
    assert dec.engine.plan.histories


class Learned(nn.Module):
    """A decay that is a parameter, a rate or any table of lags."""

    def __init__(self, table: bool):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.rate = nn.Parameter(torch.tensor(0.9))
        self.table = nn.Parameter(0.9 ** torch.arange(200.0)) if table else None

    def forward(self, x):
        lag = lags(x, x.shape[1])
        past = lag.clamp(min=0)
        weights = self.rate**past if self.table is None else self.table[past]
        scores = self.q(x) @ self.k(x).mT * torch.where(lag >= 0, weights, 0.0)
        return scores @ self.v(x)


def learned(table: bool) -> nn.Module:
    torch.manual_seed(0)
    return scale_weights(Learned(table), 0).double().eval()


def test_new_weights_are_read_again():
    net = learned(table=False)
    dec = decoder(net, features(2, 20, WIDTH), max_length=100)
    sequence = features(2, 60, WIDTH)
    for rate in (0.9, 0.7, 1.0, -0.5, 0.0):
        with torch.no_grad():
            net.rate.fill_(rate)
        dec.reset()
        assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12
    assert dec.report.mixers[0].depends_on == ("rate",)


def test_weights_that_may_become_anything_are_not_taken_for_a_decay():
    net = learned(table=True)
    dec = decoder(net, features(2, 20, WIDTH), max_length=100)
    assert "linear_attention" not in kinds(dec)
    sequence = features(2, 60, WIDTH)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12


class Buffered(nn.Module):
    """A mask of fixed size held as a buffer."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.register_buffer("mask", torch.ones(200, 200).tril())

    def forward(self, x):
        n = x.shape[1]
        return (self.q(x) @ self.k(x).mT * self.mask[:n, :n]) @ self.v(x)


def test_a_mask_in_a_buffer():
    torch.manual_seed(0)
    net = scale_weights(Buffered(), 0).double().eval()
    sequence = features(2, 150, WIDTH)
    dec = decoder(net, features(2, 20, WIDTH), max_length=180)
    assert kinds(dec) == {"linear_attention"}
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12
    with torch.no_grad():
        net.mask[120, 3] = 0
    dec.reset()
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12
    assert dec.engine.plan.histories


# kernels

HOWS = {
    "heads": Contraction(("hd",), ("hd", "he"), "he", "h", {"h": 2, "d": 3, "e": 4}),
    "row sums": Contraction(("hd",), ("hd",), "h", "h", {"h": 2, "d": 3}),
    "shared keys": Contraction(("hd",), ("d", "e"), "he", "h", {"h": 2, "d": 3, "e": 4}),
    "gated": Contraction(("hd", "h"), ("hd", "h", "he"), "eh", "", {"h": 2, "d": 3, "e": 4}),
    "decay by value": Contraction(("d",), ("d", "e"), "e", "e", {"d": 3, "e": 4}),
}


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("length", [1, 2, 63])
def test_steps_equal_the_definition(how, length):
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    queries = [normal(2, *how.shape(x), length) for x in how.queries]
    keys = [normal(2, *how.shape(x), length) for x in how.keys]
    shape = [how.sizes[x] if x in how.coefficients else 1 for x in how.state]
    now, past, rho = normal(*shape), normal(*shape), torch.rand(*shape, dtype=torch.float64)
    lag = torch.arange(length).view(-1, *[1] * len(shape))
    d = torch.where(lag == 0, now, past * rho ** (lag - 1).clamp(min=0))
    kept = [x for x in how.state if x in how.coefficients]
    d = d.reshape(length, *how.shape("".join(kept)))
    expected = attention_reference(
        queries, keys, d.permute(0, *(1 + kept.index(x) for x in how.coefficients)), how
    )
    state, rows = normal(2, *how.shape(how.state)) * 0, []
    for t in range(length):
        row, state = attention_step(
            state, [q[..., t] for q in queries], [k[..., t] for k in keys], now, past, rho, how
        )
        rows.append(row)
    assert gap(torch.stack(rows, -1), expected) < 1e-12
    assert gap(final_state(keys, rho, how), state) < 1e-12
