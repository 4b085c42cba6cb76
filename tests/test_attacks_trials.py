"""Attacks on what is settled by trial or by the weights: rare events, loud channels, whole rows hidden.

Each model once gave wrong numbers. It is refused, or exact.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fi_compile
from decoding import Net, decoded, decoder, gap

EOS = 499


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    torch.manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def later(n: int) -> Tensor:
    return torch.arange(n)[:, None] < torch.arange(n)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.chunk(2, -1)
    return a, b


def exact_or_refused(net: nn.Module, example: Tensor, x: Tensor) -> bool:
    """Whether the model is decoded; exactly, then."""
    try:
        dec = decoder(net.eval(), example, max_length=128)
    except fi_compile.Unsupported:
        return False
    expected = net(x)
    assert gap(decoded(dec, x, 1), expected) < (1e-9 if expected.dtype == torch.float64 else 1e-4)
    return True


RARE = {
    "count": lambda s, i: s.table[i] + (i == EOS).cumsum(1)[..., None],
    "previous": lambda s, i: s.table[i] + F.pad((i == EOS).long(), (1, 0))[:, :-1, None],
    "since": lambda s, i: s.table[i] + (i == EOS).long().cummax(1)[0][..., None],
    "products": lambda s, i: s.table[i] + (i // 400 * 2 + 1).cumprod(1)[..., None],
}


@pytest.mark.parametrize("name", RARE)
def test_tokens_that_the_sample_never_had(name):
    ids = torch.randint(0, 400, (1, 16))
    ids[0, 7] = EOS
    assert exact_or_refused(Net(RARE[name], table=rand(500, 2)), torch.randint(0, 400, (1, 12)), ids)


def test_features_that_the_sample_never_had():
    net = Net(lambda s, x: x * (1 + (x[..., :1] > 6).long().cumsum(1)))
    x = rand(1, 15, 2)
    x[:, 9] = 7
    assert exact_or_refused(net, rand(1, 12, 2), x)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("branch", [lambda b: b == 1, lambda b: b <= 2, lambda b: b == 2])
def test_branches_on_the_size_of_the_batch(batch, branch):
    net = Net(lambda s, x: x * 2 if branch(x.shape[0]) else x * 3)
    assert exact_or_refused(net, rand(batch, 12, 2), rand(batch, 9, 2))


@pytest.mark.parametrize("low", [torch.finfo(torch.float64).min, -1e4])
def test_rows_that_are_masked_as_a_whole(low):
    def attend(_: nn.Module, x: Tensor) -> Tensor:
        n, q = x.shape[1], F.layer_norm(x, (16,))
        mask = later(n) | (torch.arange(n)[:, None] >= 90)
        return (q @ q.mT).masked_fill(mask, low).softmax(-1) @ x[..., :2]

    assert not exact_or_refused(Net(attend), rand(1, 12, 16), rand(1, 120, 16))


def test_finite_masks_before_a_logarithm():
    def attend(_: nn.Module, x: Tensor) -> Tensor:
        q = F.layer_norm(x, (16,))
        weights = (q @ q.mT / 4).masked_fill(later(x.shape[1]), -1e4).log_softmax(-1)
        return (weights + x[:, None, :, 0]).exp() @ x[..., 1:3]

    assert not exact_or_refused(Net(attend), rand(1, 12, 16), rand(1, 8, 16))


def test_the_same_value_joined_many_times():
    def attend(_: nn.Module, x: Tensor) -> Tensor:
        a, b = (torch.cat([F.layer_norm(t, (256,))] * 8, -1) for t in halves(x))
        return (a @ b.mT).masked_fill(later(x.shape[1]), -1100.0).softmax(-1) @ x[..., :2]

    row = rand(1, 1, 256)
    x = torch.cat([row, -row], -1).repeat(1, 6, 1)
    x[..., :2] += 0.01 * rand(1, 6, 2)
    assert not exact_or_refused(Net(attend), rand(1, 12, 512), x)


def test_averages_of_a_vector():
    def attend(s: nn.Module, x: Tensor) -> Tensor:
        a, b = (t.unflatten(-1, (32, 16)).softmax(-1) @ s.values for t in halves(x))
        return (-a @ b.mT).masked_fill(later(x.shape[1]), -800.0).softmax(-1) @ x[..., 1:3]

    x = rand(1, 6, 1024)
    x.view(1, 6, 64, 16)[..., 0] += 60
    values = torch.tensor([6.0] + [0] * 15, dtype=torch.float64)
    assert not exact_or_refused(Net(attend, values=values), rand(1, 12, 1024), x)


def test_integers_that_wrap_around():
    def attend(_: nn.Module, x: Tensor) -> Tensor:
        a, b = halves(x)
        q = (2 * torch.tanh(100 - a)).to(torch.uint8).to(x.dtype)
        return (q @ (-4 * b.tanh()).mT).masked_fill(later(x.shape[1]), -900.0).softmax(-1) @ x[..., :2]

    x = rand(1, 7, 16) + torch.tensor([130.0] * 8 + [20.0] * 8, dtype=torch.float64)
    assert not exact_or_refused(Net(attend), rand(1, 12, 16), x)


@pytest.mark.parametrize("from_data", [True, False])
def test_a_loud_channel_hides_no_quiet_one(from_data):
    gain = torch.tensor([1e12, 1.0], dtype=torch.float64)
    weight = torch.ones(512, 2, dtype=torch.float64)
    weight[64:, 1] = 2

    def mix(s: nn.Module, x: Tensor) -> Tensor:
        n = x.shape[1]
        a, b = halves(x.tanh())
        a, b = (torch.fft.rfft(t, n=2 * n, dim=-2) for t in (a, b if from_data else s.filters[:n]))
        return (torch.fft.irfft(a * b, n=2 * n, dim=1) * (s.weight * s.gain)[: 2 * n])[:, :n] / s.gain

    net = Net(mix, gain=gain, weight=weight, filters=rand(512, 2))
    exact_or_refused(net, rand(1, 12, 4), rand(1, 100, 4))


def test_a_loud_channel_hides_no_far_row_of_a_quiet_one():
    gain = torch.tensor([1e12, 1.0], dtype=torch.float64)

    def mix(s: nn.Module, x: Tensor) -> Tensor:
        lag = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        near, far = (lag == 0).to(x.dtype), (lag == 40).to(x.dtype)
        weights = torch.stack([near, near + far]) * s.gain[:, None, None]
        return (weights * x.mT.unsqueeze(2)).sum(-1).mT / s.gain

    exact_or_refused(Net(mix, gain=gain), rand(1, 12, 2), rand(1, 100, 2))


def test_a_loud_spectrum_hides_no_quiet_one():
    taps = torch.randn(2, 256) * 0.1
    taps[0, 10:] = 0
    taps[0] *= 1e8

    def mix(s: nn.Module, x: Tensor) -> Tensor:
        y = torch.fft.irfft(torch.fft.rfft(x.mT, n=512) * s.spectrum, n=512)[..., : x.shape[1]]
        return (y / s.gain).mT

    net = Net(mix, spectrum=torch.fft.rfft(taps, n=512), gain=torch.tensor([[1e8], [1.0]]))
    exact_or_refused(net, torch.randn(1, 12, 2), torch.randn(1, 100, 2))


def test_spectra_of_no_real_sequence():
    a, b = (torch.fft.rfft(rand(2, 100) * 0.1, n=512) for _ in range(2))
    a[:, 0] += 20j
    b[:, 0] += 20j

    def mix(s: nn.Module, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x.mT, n=512) * (s.a * s.b), n=512)[..., : x.shape[1]].mT

    assert not exact_or_refused(Net(mix, a=a, b=b), rand(1, 12, 2), rand(1, 60, 2))


@pytest.mark.parametrize("newest", [-1, slice(-1, None)])
def test_one_position_of_which_only_the_newest_output_is_seen(newest):
    """A length of 1 is never traced, and no longer run shows what was returned there."""
    net = Net(lambda _, x: (x.cumsum(1) * (2 if x.shape[1] == 1 else 1))[:, newest])
    dec = decoder(net.eval(), rand(2, 12, 2), max_length=64)
    with pytest.raises(fi_compile.InputError, match="give at least 2"):
        dec.prefill(rand(2, 1, 2))
