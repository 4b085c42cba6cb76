"""Long filters that end: a state of their reach, whatever the length of the sequence."""

import pytest
import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft

from decoding import decoded, decoder, features, gap, lanes, rounding, stacked
from fi_compile.mixers.reference import convolve
from fi_compile.mixers.stack import ConvState, FilterBank
from fi_compile.schedule import SLACK, window_size

WIDTH, TAPS, MOST = 3, 300, 8192
BLOCK = 4


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Finite(nn.Module):
    """Filters of TAPS lags at any length: by FFT, or faded rather than cut."""

    def __init__(self, faded: bool = False):
        super().__init__()
        noise = torch.randn(WIDTH, 2 * MOST if faded else TAPS)
        self.taps = nn.Parameter(noise * torch.exp(-torch.arange(2 * MOST) / 10) if faded else noise / 10)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        n = 2 * length
        k = self.taps[:, : torch.sym_min(self.taps.shape[1], length)]
        return irfft(rfft(x.mT, n=n) * rfft(k, n=n), n=n)[..., :length].mT


class Growing(nn.Module):
    """Zero from lag 300 on, and not from ``again`` on."""

    def __init__(self, again: int):
        super().__init__()
        self.again = again
        self.taps = nn.Parameter(torch.randn(WIDTH, MOST) / 10)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        lag = torch.arange(length, device=x.device)
        k = self.taps[:, :length] * torch.where((lag < 300) | (lag >= self.again), 1.0, 0.0)
        return irfft(rfft(x.mT, n=2 * length) * rfft(k, n=2 * length), n=2 * length)[..., :length].mT


def own(**options):
    model = Finite().double().eval()
    return model, decoder(model, features(2, 9, WIDTH), **{"max_length": MOST, **options})


def check(found: Tensor, expected: Tensor) -> None:
    assert gap(found, expected) < 1e-10


# the stack


def drive(state: ConvState, inputs: Tensor, start: int = 0) -> Tensor:
    """Outputs [B, C, n] of the stack at positions start …, as a step computes them."""
    out = []
    for t in range(start, inputs.shape[-1]):
        j, k = state.local, state.bank.block
        x = inputs[:, :, t]
        now = state.block_pending[j] + x * state.bank.skip
        for i in range(j):
            now = now + state.block_inputs[i] * state.bank.block_table[k - j + i]
        state.block_inputs[j] = x
        state.advance()
        out.append(now)
    return torch.stack(out, -1)


def bank(reach: int) -> FilterBank:
    size = window_size(reach, BLOCK)
    filters = torch.randn(2, reach).double()
    return FilterBank(nn.functional.pad(filters, (0, size - reach)), channels_in=2, block=BLOCK, reach=reach)


@pytest.mark.parametrize("reach", [1, 2, 65, 193])
def test_a_stack_goes_on_for_ever(reach):
    some = bank(reach)
    inputs = torch.randn(2, 2, 3 * some.capacity + 5).double()
    expected = convolve(inputs, some.filters, None, 1)
    assert gap(drive(ConvState(some, 2), inputs), expected) < 1e-12
    half = some.capacity // 2
    for prompt in (0, 1, half - 1, half, 2 * half - 3, 2 * half - 1, 2 * half, 2 * half + 1, 5 * half + 7):
        state = ConvState(some, 2)
        state.fill(inputs[:, :, :prompt])
        assert state.dropped + state.position == prompt
        found = drive(state, inputs, prompt)
        assert gap(found, expected[:, :, prompt:]) < 1e-12


@pytest.mark.parametrize("reach", [2, 65])
def test_going_back_as_far_as_inputs_are_kept(reach):
    some = bank(reach)
    inputs = torch.randn(1, 2, 3 * some.capacity).double()
    expected = convolve(inputs, some.filters, None, 1)
    for end in range(some.capacity - 9, some.capacity + 9):
        state = ConvState(some, 1)
        drive(state, inputs[:, :, :end])
        reached = [p for p in range(end + 1) if state.can_rewind(p)]
        assert set(range(end - SLACK, end + 1)) <= set(reached)
        assert 0 in reached
        for p in reached[:: max(1, len(reached) // 7)]:
            state = ConvState(some, 1)
            drive(state, inputs[:, :, :end])
            copy = state.clone()
            copy.rewind_sequence(p)
            assert copy.dropped + copy.position == p
            assert gap(drive(copy, inputs[:, :, : p + 40], p), expected[:, :, p : p + 40]) < 1e-12


def test_banks_that_cannot_hold_their_reach_are_refused():
    for capacity, reach in ((64, 40), (2 * (BLOCK * 40 + 1), 20)):
        with pytest.raises(ValueError, match="two halves"):
            FilterBank(torch.zeros(1, capacity), channels_in=1, block=BLOCK, reach=reach)
    state = ConvState(bank(65), 1)
    drive(state, torch.randn(1, 2, 3 * state.capacity).double())
    with pytest.raises(ValueError, match="dropped"):
        state.grow(bank(300))


# in a model


@pytest.mark.parametrize("faded", [False, True])
def test_filters_that_end_keep_a_state_of_their_reach(faded):
    torch.manual_seed(0)
    model = Finite(faded).eval()
    torch.manual_seed(0)
    double, x = Finite(faded).double().eval(), features(1, 3000, WIDTH).float()
    small, large = (decoder(model, x[:, :9], max_length=n) for n in (5000, MOST))
    (mixer,) = large.report.mixers
    assert (mixer.kind, mixer.lowering) == ("long_conv", "tiles")
    assert 256 < mixer.filter_length < 512
    assert "M" in mixer.cost
    assert lanes(small)[0].state_bytes == lanes(large)[0].state_bytes
    assert MOST not in {size for t in lanes(large)[0].tensors.values() for size in t.shape}
    derived = lanes(large)[0].derived
    assert derived.bank is not None
    assert derived.bank.capacity < 2 * 1200
    assert rounding(large, model, double, x, 1200) <= 3


def test_decoding_far_beyond_the_window():
    model, dec = own(block=BLOCK)
    x = features(2, 4000, WIDTH)
    expected = model(x)
    check(decoded(dec, x[:, :2600], 1), expected[:, :2600])
    check(dec.extend(x[:, 2600:]), expected[:, 2600:])
    for prompt in (1023, 1024, 2047, 3500):
        check(dec.prefill(x[:, :prompt]), expected[:, prompt - 1])
        check(
            stacked([dec.step(x[:, t]) for t in range(prompt, prompt + 40)]),
            expected[:, prompt : prompt + 40],
        )


def test_rewind_fork_and_reorder_after_inputs_were_dropped():
    model, dec = own(block=BLOCK)
    x, other = features(2, 2400, WIDTH), features(2, 2400, WIDTH, seed=3)
    expected = model(x)
    dec.prefill(x[:, :2040])
    for t in range(2040, 2070):
        dec.step(x[:, t])
    copy = dec.fork()
    copy.step(other[:, 0])
    for back in (2045, 2000, 1200, 0):
        dec.rewind(back)
        check(dec.step(x[:, back]), expected[:, back])
    mixed = torch.cat([x[:, :2070], other[:, :2]], 1)
    copy.reorder([1, 0, 1])
    check(copy.step(other[[1, 0, 1], 1]), model(mixed)[[1, 0, 1], 2071])


def test_growth_where_the_end_is_not_far_enough_to_matter():
    model, x = Growing(again=MOST).double().eval(), features(2, 6000, WIDTH)
    dec = decoder(model, x[:, :9], capacity=2400)
    assert [m.filter_length for m in dec.report.mixers] == [2400]
    expected = model(x)
    dec.prefill(x[:, :2390])
    check(stacked([dec.step(x[:, t]) for t in range(2390, 2500)]), expected[:, 2390:2500])
    check(dec.extend(x[:, 2500:]), expected[:, 2500:])


def test_a_filter_that_ends_no_longer_at_growth():
    model, x = Growing(again=5000).double().eval(), features(1, 6000, WIDTH)
    dec = decoder(model, x[:, :9], capacity=4300)
    assert [m.filter_length for m in dec.report.mixers] == [300]
    expected = model(x)
    dec.prefill(x[:, :4290])
    check(stacked([dec.step(x[:, t]) for t in range(4290, 4330)]), expected[:, 4290:4330])
    check(dec.extend(x[:, 4330:]), expected[:, 4330:])


def test_growth_keeps_the_window():
    model, x = Growing(again=MOST).double().eval(), features(2, 6000, WIDTH)
    dec = decoder(model, x[:, :9], capacity=4100)
    assert [m.filter_length for m in dec.report.mixers] == [300]
    expected = model(x)
    dec.prefill(x[:, :4090])
    check(stacked([dec.step(x[:, t]) for t in range(4090, 4200)]), expected[:, 4090:4200])
    assert lanes(dec)[0].conv.capacity < 2400
    assert lanes(dec)[0].derived.capacity > 4100
