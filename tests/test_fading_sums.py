"""Linear attention whose weights fade with the data, written over all pairs of positions: a state in its own scale."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.attention import Attention, lags
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
    module,
    rounding,
)

WIDTH = 8


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def seen(x: Tensor) -> Tensor:
    return lags(x, x.shape[-2]) >= 0


def total(k: Tensor) -> Tensor:
    """The running sum of a gate's logarithm, [B, H, L]."""
    return F.logsigmoid(k[..., 0]).cumsum(-1)


def between(c: Tensor) -> Tensor:
    """c[t] - c[j]."""
    return c[..., :, None] - c[..., None, :]


# ways to write it


def gated_retention(q, k, v):
    return (q @ k.mT * between(total(k)).masked_fill(~seen(q), -torch.inf).exp()) @ v


def masked_after_the_exponential(q, k, v):
    return (q @ k.mT * between(total(k)).exp().tril()) @ v


def infinity_added(q, k, v):
    mask = torch.full((q.shape[-2],) * 2, -torch.inf, dtype=q.dtype).triu(1)
    return torch.einsum("bhts,bhts,bhsd->bhtd", q @ k.mT, torch.exp(between(total(k)) + mask), v)


def state_space_dual(q, k, v):
    """Mamba-2 (arXiv 2405.21060): steps of a length of their own, heads of different rates."""
    step = F.softplus(k[..., 0])
    rate = -torch.linspace(0.5, 2, q.shape[1], dtype=q.dtype)[:, None]
    kept = torch.where(seen(q), between((rate * step).cumsum(-1)), -torch.inf).exp()
    return torch.einsum("bhtn,bhsn,bhts,bhsp->bhtp", q, k, kept, v * step[..., None])


def gate_a_channel(q, k, v):
    """GLA (arXiv 2312.06635) without a factor of growing exponentials."""
    c = F.logsigmoid(v + k).cumsum(-2)
    kept = (c[:, :, :, None] - c[:, :, None]).masked_fill(~seen(q)[..., None], -torch.inf)
    return torch.einsum("bhtd,bhsd,bhtsd->bhts", q, k, kept.exp()) @ v


def gate_a_channel_in_factors(q, k, v):
    c = F.logsigmoid(v + k).cumsum(-2)
    return ((q * c.exp()) @ (k * (-c).exp()).mT).tril() @ v


def exponential_input_gate(q, k, v):
    """mLSTM (arXiv 2405.04517) without its running maximum."""
    kept = (between(total(k)) + v[..., None, :, 0]).masked_fill(~seen(q), -torch.inf)
    scores = q @ k.mT * kept.exp()
    return scores @ v / scores.sum(-1, keepdim=True).abs().clamp_min(1.0)


def up_and_down(q, k, v):
    """Sums of steps of both signs."""
    kept = between((3 * k[..., 0]).cumsum(-1)).masked_fill(~seen(q), -torch.inf)
    return torch.tanh(q @ k.mT * kept.exp() @ v)


def own_position_left_out(q, k, v):
    return (q @ k.mT * between(total(k)).exp()).tril(-1) @ v


def shared_gate(q, k, v):
    """One gate for all heads."""
    return (q @ k.mT * between(total(k[:, :1])).exp().tril()) @ v


RECURRENT = [
    gated_retention, masked_after_the_exponential, infinity_added, state_space_dual, gate_a_channel,
    gate_a_channel_in_factors, exponential_input_gate, up_and_down, own_position_left_out, shared_gate,
]  # fmt: skip


# what looks like it and is not


def a_window(q, k, v):
    hidden = ~(seen(q) & (lags(q, q.shape[-2]) < 100))
    return (q @ k.mT * between(total(k)).masked_fill(hidden, -torch.inf).exp()) @ v


def faster_from_some_lag_on(q, k, v):
    faster = torch.where(lags(q, q.shape[-2]) < 90, 1.0, 2.0).to(q.dtype)
    return (q @ k.mT * (between(total(k)) * faster).masked_fill(~seen(q), -torch.inf).exp()) @ v


def faster_from_some_position_on(q, k, v):
    faster = torch.where(torch.arange(q.shape[-2]) < 90, 1.0, 2.0).to(q.dtype)
    return (q @ k.mT * (between(total(k)) * faster[:, None]).masked_fill(~seen(q), -torch.inf).exp()) @ v


def two_exponentials(q, k, v):
    c = between(total(k))
    return (q @ k.mT * (c.exp() + (2 * c).exp()).tril()) @ v


def bounded_below(q, k, v):
    kept = between(total(k)).clamp_min(-40).masked_fill(~seen(q), -torch.inf)
    return (q @ k.mT * kept.exp()) @ v


def forgetting_softmax(q, k, v):
    """Forgetting Transformer (arXiv 2503.02130): its weights are no products."""
    return (q @ k.mT + between(total(k))).masked_fill(~seen(q), -torch.inf).softmax(-1) @ v


CACHED = [
    a_window, faster_from_some_lag_on, faster_from_some_position_on, two_exponentials, bounded_below,
    forgetting_softmax,
]  # fmt: skip


def model(attend, dtype: torch.dtype = torch.float64) -> nn.Module:
    return module(lambda width, l_max: Attention(width, l_max, attend), WIDTH, 0).to(dtype)


@pytest.mark.parametrize("attend", RECURRENT, ids=lambda f: f.__name__)
def test_it_runs_as_a_recurrence(attend):
    net = model(attend)
    dec = decoder(net, features(2, 20, WIDTH), max_length=160)
    assert kinds(dec) == {"linear_attention", "scan"}
    assert not dec.engine.plan.histories
    follows_prompts(net, dec, WIDTH, 1e-11)


@pytest.mark.parametrize("attend", CACHED, ids=lambda f: f.__name__)
def test_anything_else_keeps_keys_and_values(attend):
    keeps_keys_and_values(model(attend), WIDTH)


def steep(q, k, v):
    """The running sum of every model leaves the range of single precision's exponential before position 150."""
    c = (F.logsigmoid(k[..., 0]) - 0.7).cumsum(-1)
    return (q @ k.mT * between(c).masked_fill(~seen(q), -torch.inf).exp()) @ v


@pytest.mark.parametrize("attend", [steep, exponential_input_gate], ids=lambda f: f.__name__)
def test_long_sequences(attend):
    double, single = model(attend), model(attend, torch.float32)
    sequence = features(1, 1100, WIDTH).float()
    fast = decoder(single, features(2, 20, WIDTH).float(), max_length=1100)
    assert kinds(fast) == {"linear_attention", "scan"}
    for prompt in (1, 1000):
        assert rounding(fast, single, double, sequence, prompt) < 3


def test_no_exponential_of_one_side_alone_is_taken():
    """exp(c[t] - c[j] - 80) of a c from -80 to 80: neither exp(c[t]) nor exp(c[t] - c[j]) is a float32."""

    class Swings(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v, c, bound = x.unsqueeze(1).split([2, 2, 2, 1, 1], -1)
            kept = (between(c[..., 0]) - bound).masked_fill(~seen(q), -torch.inf)
            return F.normalize((q @ k.mT * kept.exp() @ v).squeeze(1).double(), dim=-1)

    x = features(1, 60, 8).float()
    x[..., 6], x[..., 7] = 80 * torch.sin(torch.arange(60) / 3), 80
    dec = decoder(Swings(), features(2, 20, 8).float(), max_length=64)
    assert kinds(dec) == {"linear_attention"}
    for prompt in (1, 40):
        assert gap(decoded(dec, x, prompt), Swings()(x)[:, prompt - 1 :]) < 1e-4


class Exponents(nn.Module):
    """exp(weights(a, b)[t, j]) between queries and keys, all of them data."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, a, b = x.unsqueeze(1).split([2, 2, 2, 1, 1], -1)
        return (q @ k.mT * self.weights(a[..., 0], b[..., 0]).exp() @ v).squeeze(1)


def hidden_keys(a, b):
    return (a[..., None] + torch.where(b > 0, 0.0, -torch.inf)[..., None, :]).masked_fill(
        lags(b, b.shape[-1]) < 0, -torch.inf
    )


def the_past_alone(a, b):
    return (a[..., None] + b[..., None, :]).masked_fill(lags(b, b.shape[-1]) < 1, -torch.inf)


def lowered(a, b):
    return (a[..., None] + b[..., None, :] - 200).masked_fill(lags(b, b.shape[-1]) < 0, -torch.inf)


def first_keys_hidden(x):
    x[0, :12, 7], x[1, :, 7] = -1, -1


def a_large_key_not_yet_seen(x):
    x[:, 20, 7], x[:, 21:, 6] = 200, -200


def nothing_before_position_20(x):
    x[:, :20, 7] = -torch.inf


def large_queries_and_keys(x):
    x[..., 6:] += 100


EDGES = [
    (hidden_keys, first_keys_hidden),
    (the_past_alone, a_large_key_not_yet_seen),
    (the_past_alone, nothing_before_position_20),
    (lowered, large_queries_and_keys),
]


@pytest.mark.parametrize(("weights", "given"), EDGES, ids=lambda f: f.__name__)
def test_exponents_that_are_no_numbers_alone(weights, given):
    net, x = Exponents(weights), features(2, 40, 8).float()
    given(x)
    dec = decoder(net, features(2, 20, 8).float(), max_length=64)
    assert kinds(dec) == {"linear_attention"}
    expected = net(x)
    assert expected.isfinite().all()
    for prompt in (1, 7, 30):
        assert gap(decoded(dec, x, prompt), expected[:, prompt - 1 :]) < 1e-5


def test_state_is_moved_like_any_other():
    net = model(exponential_input_gate)
    dec = decoder(net, features(2, 20, WIDTH), max_length=64)
    sequence = features(2, 60, WIDTH)
    decoded(dec, sequence, 40)
    goes_back(net, dec, sequence, (58, 30, 1), 2)
    forks_and_beams(net, dec, WIDTH)


def test_new_weights_are_asked_again():
    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.bend = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v, g = x.unsqueeze(1).split([2, 2, 2, 1], -1)
            kept = between(F.logsigmoid(g[..., 0]).cumsum(-1)) * self.bend
            return (q @ k.mT * kept.exp().tril() @ v).squeeze(1)

    net, sequence = Bent(), features(2, 40, 7)
    dec = decoder(net, features(2, 20, 7), max_length=64)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12
    with torch.no_grad():
        net.bend.fill_(1.5)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12
