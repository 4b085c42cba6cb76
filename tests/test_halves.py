"""States that keep no history: half the memory, the same numbers, and the way back through a forward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_endless import drive
from torch import Tensor, nn
from torch.fft import irfft, rfft

import fi_compile
from decoding import decoded, decoder, features, gap, lanes
from fi_compile.mixers.reference import convolve
from fi_compile.mixers.stack import ConvState, FilterBank

WIDTH, MOST, BLOCK = 3, 700, 4


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def bank(total: int, source: Tensor | None = None, radix: int = 2, **options) -> FilterBank:
    generator = torch.Generator().manual_seed(total)
    filters = torch.randn(2, total, generator=generator, dtype=torch.float64)
    return FilterBank(filters, source, channels_in=2, block=BLOCK, radix=radix, **options)


def test_the_state_is_halved_in_whole_blocks():
    for total, capacity in ((64, 32), (65, 40), (63, 32), (16, 8), (15, 15), (8, 8), (1, 1)):
        assert bank(total, keep_history=False).capacity == capacity
    whole, half = ConvState(bank(4096), 1), ConvState(bank(4096, keep_history=False), 1)
    assert half.large_bytes == whole.large_bytes // 2
    assert (
        bank(4096, keep_history=False).predict_bytes()["state"] < 0.51 * bank(4096).predict_bytes()["state"]
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.data())
def test_every_pair_meets_once(total, data):
    prompt = data.draw(st.integers(0, total))
    radix = data.draw(st.sampled_from([2, 4]))
    source = data.draw(st.sampled_from([None, torch.tensor([1, 0])]))
    some = bank(total, source, radix, keep_history=False)
    inputs = torch.randn(2, 2, total, dtype=torch.float64)
    state = ConvState(some, 2)
    state.fill(inputs[:, :, :prompt])
    assert state.dropped + state.position == prompt
    if source is not None:  # what a step computes with a channel map is tested in the model
        return
    if prompt < total:
        expected = convolve(inputs, some.filters, None, 1)[:, :, prompt:]
        assert float((drive(state, inputs, prompt) - expected).abs().max()) < 1e-10
    with pytest.raises(IndexError):
        state.advance()


def test_inputs_that_are_gone_are_not_asked_for():
    state = ConvState(bank(64, keep_history=False), 1)
    drive(state, torch.randn(1, 2, 45, dtype=torch.float64))
    assert [p for p in range(46) if state.can_rewind(p)] == [44, 45]
    with pytest.raises(RuntimeError, match="given up"):
        state.restart(3)
    with pytest.raises(ValueError, match="dropped"):
        state.grow(bank(128, keep_history=False))
    for options in ({"deferred": True}, {"reach": 2}):
        with pytest.raises(ValueError, match="given up"):
            bank(4096, keep_history=False, **options)


class Two(nn.Module):
    """Two long convolutions, the second of channels that are chosen among those of the first."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.randn(2, WIDTH, MOST) * torch.exp(-torch.arange(MOST) / 200) / 4)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def long(self, x: Tensor, k: Tensor) -> Tensor:
        n = 2 * x.shape[1]
        return irfft(rfft(x.mT, n=n) * rfft(k[:, : x.shape[1]], n=n), n=n)[..., : x.shape[1]].mT

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.long(self.mix(torch.tanh(self.long(x, self.k[0]))) * x, self.k[1]))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Two().double().eval()


@pytest.mark.parametrize("prompt", [1, 100, 383, 384, 385, 600, MOST])
def test_a_model_decodes_the_same_in_half_the_state(model, prompt):
    x = features(2, MOST, WIDTH).double()
    small, large = (decoder(model, x[:, :9], max_length=MOST, keep_history=keep) for keep in (False, True))
    assert gap(decoded(small, x, prompt), model(x)[:, prompt - 1 :]) < 1e-11
    decoded(large, x, prompt)
    held, whole = (lanes(dec)[0].conv.history.nbytes for dec in (small, large))
    assert held < 0.56 * whole
    assert "given up at position 384" in str(small.report)


def test_going_back_forks_and_growth(model):
    x = features(2, MOST, WIDTH).double()
    expected = model(x)
    dec = decoder(model, x[:, :9], keep_history=False, capacity=256)
    dec.prefill(x[:, :100])
    for position, to in ((200, 199), (230, 20), (150, 0), (250, 129), (400, 300), (MOST, 5), (40, 39)):
        start = int(dec.position[0])
        found = torch.stack([dec.step(row) for row in x[:, start:position].unbind(1)], 1)
        assert gap(found, expected[:, start:position]) < 1e-11
        twin = dec.fork()
        dec.rewind(to)
        assert int(twin.position[0]) == position
        twin.reorder([1, 1, 0])
        if position < MOST:
            row = x[[1, 1, 0], position]
            assert gap(twin.step(row), expected[[1, 1, 0], position]) < 1e-11


def test_what_cannot_give_up_its_history_says_so(model):
    x = features(1, 9, WIDTH).double()
    with pytest.raises(fi_compile.InputError, match="keep_history"):
        decoder(model, x, keep_history=False, latency="bounded")
    with pytest.raises(fi_compile.InputError, match="True or False"):
        decoder(model, x, keep_history="no")
