"""Running products, maxima, minima and log-sum-exps: decoded with one row of state."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fi_compile
from decoding import Net, decoded, decoder, features, forks_and_beams, gap, goes_back, lanes, module, rounding

WIDTH = 6


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def running_max(x: Tensor) -> Tensor:
    return x.cummax(1).values


def running_min_before_features(x: Tensor) -> Tensor:
    return x.mT.contiguous().cummin(-1)[0].mT


def age_of_the_max(x: Tensor) -> Tensor:
    """How long ago the largest value was: of equal ones the latest counts."""
    last = (2 * x).round().cummax(1).indices
    return (torch.arange(x.shape[1])[None, :, None] - last).to(x.dtype).log1p()


def both_parts(x: Tensor) -> Tensor:
    values, places = torch.cummin(x, dim=-2)
    return values * (1 + places / 100)


def gathered(x: Tensor) -> Tensor:
    """The features of the position at which the first one was largest."""
    place = x[..., :1].cummax(1).indices
    return x.gather(1, place.expand_as(x))


def running_product(x: Tensor) -> Tensor:
    return (1 + 0.1 * x.tanh()).cumprod(1)


def product_with_zeros(x: Tensor) -> Tensor:
    return F.relu(x + 1.5).clamp(max=1.01).cumprod(1)


def min_gru(x: Tensor) -> Tensor:
    """Feng et al. 2024 (arXiv 2410.01201), in log space."""
    a, b = x.chunk(2, -1)
    kept, taken = -F.softplus(a), -F.softplus(-a)
    total = kept.cumsum(1)
    h = (total + (taken + b - total).logcumsumexp(1)).exp()
    return torch.cat([h, -h], -1)


def log_of_a_running_sum(x: Tensor) -> Tensor:
    return torch.logcumsumexp(x, 1) - torch.arange(1, 1 + x.shape[1], dtype=x.dtype).log()[:, None]


def masked_entries(x: Tensor) -> Tensor:
    """Some of the inputs are -inf, at the start perhaps all."""
    return x.masked_fill(x < 0.3, -math.inf).logcumsumexp(1).exp()


FOLDS: list[Callable[[Tensor], Tensor]] = [
    running_max, running_min_before_features, age_of_the_max, both_parts, running_product, product_with_zeros,
    min_gru, log_of_a_running_sum, masked_entries,
]  # fmt: skip


# what looks like it and is not


def from_the_end(x: Tensor) -> Tensor:
    return x.flip(1).cummax(1).values.flip(1)


def whole_max(x: Tensor) -> Tensor:
    return x - x.amax(1, keepdim=True)


def over_whole_products(x: Tensor) -> Tensor:
    return x.cumprod(1) / x.prod(1, keepdim=True)


def over_features(x: Tensor) -> Tensor:
    return x.cummax(-1).values + x.cumprod(-1)


class Wrapped(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]):
        super().__init__()
        self.mix = mix
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.into(x)))


def model(mix: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> nn.Module:
    return module(lambda width, l_max: Wrapped(mix), WIDTH, 0).to(dtype)


@pytest.mark.parametrize("mix", FOLDS, ids=lambda f: f.__name__)
def test_one_row_is_kept(mix):
    net = model(mix)
    dec = decoder(net, features(2, 20, WIDTH), max_length=200)
    assert {m.kind for m in dec.report.mixers} == {"scan"}
    assert not dec.engine.plan.histories
    sequence = features(2, 180, WIDTH)
    for prompt in (1, 7, 150):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-10


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 500])
@pytest.mark.parametrize("mix", [min_gru, both_parts], ids=lambda f: f.__name__)
def test_lengths(mix, length):
    net = model(mix)
    dec = decoder(net, features(2, 20, WIDTH), max_length=500)
    sequence = features(2, length, WIDTH)
    for prompt in sorted({1, min(7, length), length}):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-10


def test_a_choice_of_positions_by_data_is_refused():
    with pytest.raises(fi_compile.Unsupported):
        decoder(model(gathered), features(2, 20, WIDTH), max_length=200)


@pytest.mark.parametrize("mix", [from_the_end, whole_max, over_whole_products], ids=lambda f: f.__name__)
def test_what_sees_later_positions_is_refused(mix):
    with pytest.raises(fi_compile.Unsupported):
        decoder(model(mix), features(2, 20, WIDTH), max_length=200)


def test_scans_over_features_keep_nothing():
    net = model(over_features)
    dec = decoder(net, features(2, 20, WIDTH), max_length=200)
    assert not dec.report.mixers
    sequence = features(2, 50, WIDTH)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12


@pytest.mark.parametrize("mix", [running_product, running_max], ids=lambda f: f.__name__)
def test_float32_is_as_exact_as_the_forward(mix):
    single, double = model(mix, torch.float32), model(mix)
    sequence = features(2, 180, WIDTH).float()
    dec = decoder(single, sequence[:, :20], max_length=200)
    assert rounding(dec, single, double, sequence, 7) < 3


def test_bfloat16():
    net = model(running_max, torch.bfloat16)
    sequence = features(2, 60, WIDTH).bfloat16()
    dec = decoder(net, sequence[:, :20], max_length=200)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-2


@pytest.mark.parametrize("scan", [torch.cumsum, torch.cumprod])
def test_a_narrower_type_overflows_as_it_enters(scan):
    net = Net(lambda net, x: scan(x * 1e5, 1, dtype=torch.float16))
    sequence = torch.full((1, 40, WIDTH), 1e-5, dtype=torch.float64)
    sequence[:, 10:13] = torch.tensor([[[2.0], [1e-6], [-2.0]]])
    dec = decoder(net, sequence[:, :9], max_length=40)
    torch.testing.assert_close(decoded(dec, sequence, 5), net(sequence)[:, 4:], equal_nan=True)


def test_nan_stays():
    net = model(running_max)
    dec = decoder(net, features(1, 20, WIDTH), max_length=200)
    sequence = features(1, 40, WIDTH)
    sequence[:, 11] = math.nan
    found, expected = decoded(dec, sequence, 7), net(sequence)[:, 6:]
    assert bool(found[:, 5:].isnan().all())
    assert gap(found[:, :5], expected[:, :5]) < 1e-12


@pytest.fixture(scope="module")
def folded():
    with torch.no_grad():
        net = model(both_parts)
        return net, decoder(net, features(2, 20, WIDTH), max_length=200)


def test_going_back(folded):
    net, dec = folded
    sequence = features(2, 160, WIDTH)
    decoded(dec, sequence[:, :140], 20)
    (lane,) = lanes(dec)
    assert lane.rewind(100)
    assert not lane.rewind(20)
    goes_back(net, dec, sequence, (98, 40, 3, 0), 9)
    dec.reset()


def test_forks_and_beams(folded):
    net, dec = folded
    forks_and_beams(net, dec, WIDTH)
    dec.reset()


def test_growth():
    net = model(min_gru)
    dec = decoder(net, features(2, 20, WIDTH), capacity=32)
    sequence = features(2, 150, WIDTH)
    assert gap(decoded(dec, sequence, 20), net(sequence)[:, 19:]) < 1e-10


@pytest.mark.slow
def test_compiled():
    net = model(both_parts, torch.float32)
    sequence = features(1, 60, WIDTH).float()
    dec = fi_compile.decoder(net, sequence[:, :20], max_length=200)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-5
