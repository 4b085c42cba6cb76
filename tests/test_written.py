"""Tensors filled in place: the increments of what they come to hold, and no region of a whole tensor exchanged."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fi_compile
from corpus import scale_weights
from decoding import by_speed, decoded, decoder, features, gap
from fi_compile.capture import trace_module
from fi_compile.program import Program, operator_name
from fi_compile.written import with_writes_resolved

WIDTH = 8
WRITES = {"slice_scatter", "select_scatter", "copy", "fill", "index_put", "index_copy"}


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Writes(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.linear, self.qkv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.taps = nn.Parameter(torch.randn(4, WIDTH))
        self.first = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def made(function) -> nn.Module:
    torch.manual_seed(0)
    return scale_weights(Writes(function), 0).double().eval()


def moved_by_one(net: Writes, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:, 0] = 0
    y[:, 1:] = x[:, :-1]
    return net.linear(y).tanh()


def rotated(net: Writes, x: Tensor) -> Tensor:
    y = x.roll(2, 1)
    y[:, :3] = net.first
    return net.linear(y)


def differences(net: Writes, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] -= x[:, :-1].tanh()
    return y


def taps(net: Writes, x: Tensor) -> Tensor:
    y = x * net.taps[0]
    for i in range(1, 4):
        y[:, i:] += x[:, :-i] * net.taps[i]
    return y


def some_channels(net: Writes, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:, :3] = net.linear(x[:, :-1])[..., 2:5]
    return y


def in_heads(net: Writes, x: Tensor) -> Tensor:
    heads = net.linear(x).unflatten(-1, (2, -1)).transpose(1, 2)
    moved = torch.zeros_like(heads)
    moved[:, :, 2:] = F.layer_norm(heads[:, :, :-2], heads.shape[-1:])
    return (heads * moved).transpose(1, 2).flatten(2)


def first_row(net: Writes, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = net.first
    return y.cumsum(1)


def every_second_feature(net: Writes, x: Tensor) -> Tensor:
    """Rotary positions of queries and keys, in place."""
    batch, length, _ = x.shape
    q, k, v = net.qkv(x).view(batch, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
    angles = torch.arange(length, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
    turned = []
    for each in (q, k):
        out, a, b = torch.empty_like(each), each[..., ::2], each[..., 1::2]
        out[..., ::2] = a * angles.cos() - b * angles.sin()
        out[..., 1::2] = a * angles.sin() + b * angles.cos()
        turned.append(out)
    scores = turned[0] @ turned[1].mT
    scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu_(1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH)


def in_a_padded_buffer(net: Writes, x: Tensor) -> Tensor:
    """What an inverse transform gave is written to, too: where its rows beyond the length are not read."""
    batch, length, width = x.shape
    padded, taps = x.new_zeros(batch, 2 * length, width), x.new_zeros(2 * length, width)
    padded[:, :length] = x
    taps[:length] = 0.9 ** torch.arange(length, dtype=x.dtype)[:, None] * net.first
    spectrum = torch.fft.rfft(padded, dim=1)
    spectrum *= torch.fft.rfft(taps, dim=0)
    y = torch.fft.irfft(spectrum, 2 * length, dim=1)[:, :length]
    y += x * net.first
    return y


def after_four(net: Writes, x: Tensor) -> Tensor:
    """Of fewer than four positions nothing is written, whatever sizes the trace computes."""
    y = torch.ones_like(x)
    y[:, 4:] = torch.where(x[:, :-4] > 0, x[:, :-4], x[:, 4:])
    return y.cumsum(1)


def several_writes(net: Writes, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] = x[:, :-1]
    y[:, 2:] += y[:, :-2] * 0.5
    y[:, :, 2:5] = 0
    y[..., ::2].mul_(net.first[::2])
    y[:, 1:4] = net.linear(x)[:, :3]
    return y


def by_number(net: Writes, x: Tensor) -> Tensor:
    """A cache of fixed size, and a shift, through lists of positions."""
    batch, length, width = x.shape
    cache, later = x.new_zeros(batch, 64, width), torch.zeros_like(x)
    cache[:, torch.arange(length)] = net.linear(x)
    later.index_copy_(1, torch.arange(1, length), x[:, :-1].tanh())
    return cache[:, :length].cumsum(1) + later


KINDS = {
    moved_by_one: {"short_conv"},
    rotated: {"short_conv"},
    differences: {"short_conv"},
    taps: {"short_conv"},
    some_channels: {"short_conv"},
    in_heads: {"short_conv"},
    first_row: {"scan"},
    after_four: {"scan", "short_conv"},
    every_second_feature: {"attention"},
    in_a_padded_buffer: {"long_conv"},
    several_writes: {"short_conv"},
    by_number: {"scan", "short_conv"},
}


@pytest.mark.parametrize(
    "function",
    by_speed(KINDS, (some_channels, every_second_feature, in_a_padded_buffer, by_number).__contains__),
)
def test_increments(function):
    net = made(function)
    dec = decoder(net, features(2, 9, WIDTH), max_length=60)
    assert {m.kind for m in dec.report.mixers} == KINDS[function]
    assert not dec.report.notes
    sequence = features(2, 40, WIDTH)
    for prompt in (5, 17) if function in (rotated, several_writes) else (1, 17):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-12


def written_in(program: Program) -> set[str]:
    return {operator_name(n.target) for n in program.graph.nodes if n.op == "call_function"} & WRITES


@pytest.mark.parametrize("function", by_speed(KINDS, (first_row, by_number).__contains__))
def test_no_write_is_left_and_nothing_changes(function):
    net = made(function)
    traced = trace_module(net, features(2, 9, WIDTH))
    resolved = with_writes_resolved(traced)
    assert written_in(traced)
    assert not written_in(resolved)
    for length in (*range(traced.lengths.minimum, 8), 40):
        sequence = features(2, length, WIDTH)
        assert gap(resolved.run(sequence), net(sequence)) < 1e-12


def next_position(net: Writes, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :-1] = x[:, 1:]
    return y


def came_around(net: Writes, x: Tensor) -> Tensor:
    """One of two rows that came from the end is left."""
    y = x.roll(2, 1)
    y[:, 0] = 0
    return y


def newest_position(net: Writes, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, -1] = 0
    return y


def second_half(net: Writes, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, x.shape[1] // 2 :] *= 2
    return y


def read_of_what_is_left(net: Writes, x: Tensor) -> Tensor:
    """Beyond what was written stands what was there, the wrapped end of the convolution."""
    length = x.shape[1]
    y = torch.fft.irfft(torch.fft.rfft(x, length, dim=1).square(), length, dim=1)
    y[:, :4] = 0
    return y


def earlier_by_number(net: Writes, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, torch.arange(x.shape[1] - 1)] = x[:, 1:]
    return y


def added_by_number(net: Writes, x: Tensor) -> Tensor:
    y = x.roll(1, 1).transpose(0, 1)
    return y.index_put((torch.arange(x.shape[1]),), x.transpose(0, 1), accumulate=True).transpose(0, 1)


TRAPS = [
    earlier_by_number,
    added_by_number,
    next_position,
    came_around,
    newest_position,
    second_half,
    read_of_what_is_left,
]


@pytest.mark.parametrize(
    "function", by_speed(TRAPS, (came_around, earlier_by_number, added_by_number).__contains__)
)
def test_writes_that_see_later_positions_are_refused(function):
    net, sequence = made(function), features(2, 40, WIDTH)
    assert gap(net(sequence)[:, :20], net(sequence[:, :20])) > 1e-6
    with pytest.raises(fi_compile.Unsupported):
        decoder(net, features(2, 9, WIDTH), max_length=60)
