"""Operators of the user's own: decoded by the step that was registered for them."""

import pytest
import torch
from torch import Tensor, nn

import fi_compile
from corpus import scale_weights
from decoding import decoded, decoder, features, gap, lanes, rounding, stacked

WIDTH = 6


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


@torch.library.custom_op("flashinf_tests::delta", mutates_args=())
def delta(k: Tensor, v: Tensor, beta: Tensor, rate: float) -> Tensor:
    """The delta rule as a loop over time: [B, L, D], [B, L, D], [D] -> [B, L, D]."""
    state = k.new_zeros(k.shape[0], k.shape[2], v.shape[2])
    rows = []
    for t in range(k.shape[1]):
        row, state = delta_step(state, k[:, t], v[:, t], beta, rate)
        rows.append(row)
    return torch.stack(rows, 1) if rows else torch.empty_like(v)


@delta.register_fake
def _(k, v, beta, rate):
    return torch.empty_like(v)


def delta_step(state: Tensor, k: Tensor, v: Tensor, beta: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    k = torch.nn.functional.normalize(k, dim=-1)
    found = (k.unsqueeze(1) @ state).squeeze(1)
    state = rate * state + k.unsqueeze(2) * ((v - found) * beta.sigmoid()).unsqueeze(1)
    return (k.unsqueeze(1) @ state).squeeze(1), state


def delta_initial(k: Tensor, v: Tensor, beta: Tensor, rate: float) -> Tensor:
    return k.new_zeros(k.shape[0], k.shape[1], v.shape[1])


@torch.library.custom_op("flashinf_tests::relu", mutates_args=())
def relu(x: Tensor) -> Tensor:
    """Named like another operator; sees all that follows."""
    return x.flip(1).cumsum(1).flip(1)


@relu.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("flashinf_tests::largest", mutates_args=())
def largest(x: Tensor) -> Tensor:
    """The largest so far, at least 2: the state of no positions is not zero."""
    return x.cummax(1).values.clamp_min(2.0)


@largest.register_fake
def _(x):
    return torch.empty_like(x)


class Model(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.kv, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.beta = nn.Parameter(torch.randn(WIDTH))
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, -1)
        return self.out(self.mix(self, k, v))


def model(mix, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return scale_weights(Model(mix), 0).to(dtype).eval()


def delta_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return model(lambda own, k, v: torch.ops.flashinf_tests.delta(k, v, own.beta, 0.9), dtype)


@pytest.fixture
def registered(monkeypatch):
    from fi_compile.mixers.registered import REGISTERED
    from fi_compile.rules import RULES

    before = dict(REGISTERED), dict(RULES)
    fi_compile.register_mixer(
        "flashinf_tests::delta", initial=delta_initial, step=delta_step, kind="delta_rule"
    )
    yield
    for table, old in zip((REGISTERED, RULES), before, strict=True):
        table.clear()
        table.update(old)


def test_an_unknown_operator_is_refused_and_told_how_to_join():
    with pytest.raises(fi_compile.Unsupported) as refused:
        decoder(delta_net(), features(2, 20, WIDTH), max_length=100)
    assert refused.value.refusals[0].kind == "unknown_operator"
    assert "register" in str(refused.value.refusals[0].hint)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 300])
def test_lengths(registered, length):
    net = delta_net()
    dec = decoder(net, features(2, 20, WIDTH), max_length=300)
    assert [(m.kind, m.lowering) for m in dec.report.mixers] == [("delta_rule", "registered")]
    assert not dec.engine.plan.histories
    sequence = features(2, length, WIDTH)
    for prompt in sorted({1, min(7, length), length}):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-10


def test_float32_growth_and_new_weights(registered):
    net, double = delta_net(torch.float32), delta_net()
    dec = decoder(net, features(2, 20, WIDTH).float(), capacity=32)
    sequence = features(2, 100, WIDTH).float()
    assert rounding(dec, net, double, sequence, 7) < 3
    with torch.no_grad():
        net.beta.mul_(-2)
        double.beta.mul_(-2)
    dec.reset()
    assert rounding(dec, net, double, sequence, 7) < 3


def test_going_back_and_forks(registered):
    net = delta_net()
    dec = decoder(net, features(2, 20, WIDTH), max_length=100)
    sequence = features(2, 60, WIDTH)
    decoded(dec, sequence[:, :40], 20)
    (lane,) = lanes(dec)
    assert lane.rewind(30)
    assert not lane.rewind(10)
    for back in (28, 3, 0):
        dec.rewind(back)
        other = dec.fork()
        rest = [dec.step(sequence[:, t]) for t in range(back, back + 9)]
        assert gap(stacked(rest), net(sequence)[:, back : back + 9]) < 1e-12
        assert gap(other.step(sequence[:, back]), net(sequence)[:, back]) < 1e-12


def test_a_state_of_no_positions_that_is_not_zero(registered):
    def step(state, x):
        state = torch.maximum(state, x)
        return state, state

    fi_compile.register_mixer("flashinf_tests::largest", initial=lambda x: torch.full_like(x, 2.0), step=step)
    net = model(lambda own, k, v: torch.ops.flashinf_tests.largest(k))
    dec = decoder(net, features(2, 20, WIDTH), max_length=100)
    sequence = features(2, 60, WIDTH)
    for prompt in (1, 7):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-12


def test_a_step_that_is_not_its_operator_is_refused():
    def forgets(state, k, v, beta, rate):
        return delta_step(state, k, v, beta, rate - 1e-5)

    fi_compile.register_mixer("flashinf_tests::delta", initial=delta_initial, step=forgets)
    with pytest.raises(fi_compile.Unsupported) as refused:
        decoder(delta_net(), features(2, 20, WIDTH), max_length=100)
    assert refused.value.refusals[0].kind == "registered"


def test_an_operator_that_sees_later_positions_is_refused():
    fi_compile.register_mixer(
        "flashinf_tests::relu", initial=torch.zeros_like, step=lambda state, x: (state + x, state + x)
    )
    with pytest.raises(fi_compile.Unsupported) as refused:
        decoder(model(lambda own, k, v: torch.ops.flashinf_tests.relu(k)), features(2, 20, WIDTH))
    assert refused.value.refusals[0].kind == "non_causal"


def test_another_librarys_operator_is_not_taken_for_a_namesake():
    from fi_compile.mixers.registered import REGISTERED
    from fi_compile.rules import RULES

    REGISTERED.pop("flashinf_tests::relu", None)
    RULES.pop("flashinf_tests::relu", None)
    net = model(lambda own, k, v: torch.ops.flashinf_tests.relu(k) * 0 + v)
    with pytest.raises(fi_compile.Unsupported) as refused:
        decoder(net, features(2, 20, WIDTH))
    assert refused.value.refusals[0].kind in ("unknown_operator", "non_causal")


@pytest.mark.parametrize("name", ["delta", "relu"])
def test_names_must_be_qualified(name):
    with pytest.raises(fi_compile.FlashinfError, match="qualified"):
        fi_compile.register_mixer(name, initial=delta_initial, step=delta_step)


@pytest.mark.slow
def test_compiled(registered):
    net = delta_net(torch.float32)
    sequence = features(1, 60, WIDTH).float()
    dec = fi_compile.decoder(net, sequence[:, :20], max_length=100)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-5
