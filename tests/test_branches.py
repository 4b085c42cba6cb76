"""Branches on the length and on the batch: each length is covered by a trace made there, or not decoded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from decoding import Net, by_speed, decoder, features, gap
from fi_compile import capture
from fi_compile.capture import trace_module
from fi_compile.errors import FlashinfError, Unsupported
from fi_compile.guards import lengths_of
from fi_compile.program import Program
from fi_compile.symbolic import evaluate_at

WIDTH = 4


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def traced(net: Net, length: int | None, own: int = 12, batch: int = 2) -> Program:
    return trace_module(net, features(batch, own, WIDTH), length=length)


def below_a_branch(net: Net, x: Tensor) -> Tensor:
    y = x.cumsum(1)
    if x.shape[1] > 105:
        return y[:, : 2 * x.shape[1]]
    return y * 2 if x.shape[1] == 80 else y


def for_large_values_only(net: Net, x: Tensor) -> Tensor:
    y = x.cumsum(1)
    return y.clamp(-90, 90) if x.shape[1] == 37 else y


def padded_to_whole_chunks(net: Net, x: Tensor) -> Tensor:
    rest = -x.shape[1] % 8
    y = F.pad(x, (0, 0, 0, rest)) if rest else x
    return y.cumsum(1)[:, : x.shape[1]]


def parity(net: Net, x: Tensor) -> Tensor:
    return x.cumsum(1) * 2 if x.shape[1] % 2 else x.cumsum(1)


def parity_of_short_ones(net: Net, x: Tensor) -> Tensor:
    if x.shape[1] % 2:
        return x.cumsum(1) if x.shape[1] < 700 else x.cumsum(1) * 2
    return x.cumsum(1)


def two_paths(net: Net, x: Tensor) -> Tensor:
    n = x.shape[1]
    size = 2 * n if n > 30 else 64
    k = 0.5 ** torch.arange(n, dtype=x.dtype)
    return torch.fft.irfft(torch.fft.rfft(x.mT, n=size) * torch.fft.rfft(k, n=size), n=size)[..., :n].mT


def test_a_single_length_below_a_branch():
    net = Net(below_a_branch)
    assert traced(net, 200).lengths.fewest == 81

    def attack() -> float:
        dec = decoder(net, features(2, 12, WIDTH), max_length=200)
        x = features(2, 82, WIDTH)
        dec.prefill(x[:, :79])
        return gap(dec.step(x[:, 79]), net(x[:, :80])[:, 79])

    with pytest.raises(FlashinfError):
        attack()


@pytest.mark.parametrize(("length", "admitted"), [(100, range(38, 101)), (None, range(1, 37))])
def test_a_single_length_that_matters_for_large_values_only(length, admitted):
    lengths = traced(Net(for_large_values_only), length).lengths
    assert lengths.fewest == admitted[0]
    assert all(lengths.admits(n) for n in admitted if n > 1)
    assert lengths.maximum == (None if length else admitted[-1])


@pytest.mark.parametrize("length", [None, 200])
def test_calls_that_change_nothing_are_no_branch(length):
    lengths = traced(Net(padded_to_whole_chunks), length).lengths
    assert all(lengths.admits(n) for n in range(2, 300))
    assert lengths.fewest == 1


def test_something_else_at_every_second_length():
    with pytest.raises(Unsupported) as caught:
        traced(Net(parity), 100)
    assert caught.value.refusals[0].kind == "lengths"


def test_something_else_at_every_second_length_from_some_on():
    lengths = traced(Net(parity_of_short_ones), 100).lengths
    assert lengths.maximum == 700
    assert all(lengths.admits(n) for n in range(2, 701))


def test_the_same_operators_with_other_sizes():
    net = Net(two_paths)
    program = traced(net, 100)
    assert program.lengths.fewest == 1
    assert program.lengths.maximum is None


def test_bits_read_as_other_numbers():
    def function(net: Net, x: Tensor) -> Tensor:
        y = (x * 8).long()
        return x + (y.view(torch.float64) * 2.0**1060 if x.shape[1] < 16 else y)

    assert traced(Net(function), 100, own=40).lengths.fewest == 16


@pytest.mark.parametrize("own", [12, 40])
def test_one_view_under_three_names(own):
    """Which of them a trace has may depend on the order of a set."""
    view, unsafe = torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default

    def function(net: Net, x: Tensor) -> Tensor:
        (b, s, _), y = x.shape, x.cumsum(1)
        y = view(y, [b, s, 2, -1]) if s < 16 else unsafe(y, [b, s, 2, 2])
        return (y * 2).flip(-1).reshape(b, s, WIDTH)

    lengths = traced(Net(function), 100, own=own).lengths
    assert lengths.fewest == 1
    assert all(lengths.admits(n) for n in range(2, 300))


def test_another_table_of_nearly_the_same_numbers():
    def function(net: Net, x: Tensor) -> Tensor:
        return x.cumsum(1) * (net.low if x.shape[1] < 16 else net.high)

    table = torch.linspace(1, 2, WIDTH)
    net = Net(function, low=table, high=table * (1 + 2e-5))
    assert trace_module(net, features(2, 40, WIDTH).float(), length=100).lengths.fewest == 16
    net = Net(function, low=table, high=table.clone())
    assert trace_module(net, features(2, 40, WIDTH).float(), length=100).lengths.fewest == 1


def test_a_hole_beside_a_period():
    admitted = np.arange(257) % 2 == 1
    admitted[[1, 11]] = False
    spanned = np.arange(257) >= 2
    lengths = lengths_of(admitted, spanned)
    assert lengths is not None
    assert (lengths.period, lengths.left_out, lengths.holes) == (2, {0}, {11})
    assert list(lengths.upto(256)) == list(admitted.nonzero()[0])


def test_guards_of_which_a_part_follows_no_length():
    s, b = sympy.symbols("s b", integer=True)
    lengths = np.arange(1, 5)
    for guard, expected in (
        (sympy.Or(sympy.Eq(b, 1), sympy.Eq(s, 2)), [0, 1, 0, 0]),
        (sympy.And(b > 1, s > 2), [0, 0, 1, 1]),
    ):
        assert list(evaluate_at(guard, {s: lengths, b: 3}, lengths.shape)) == expected


def test_sizes_of_layers_are_no_branch():
    lengths = traced(
        Net(lambda net, x: torch.fft.irfft(torch.fft.rfft(x.mT, n=64), n=64).mT[:, : x.shape[1]]), 30
    )
    assert all(lengths.lengths.admits(n) for n in range(2, 31))


# -- one position ----------------------------------------------------------------------------------------------


def clamped_if(condition: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    return lambda net, x: x.clamp(-6, 6) if condition(x) else x * 1


ONE = [
    lambda x: x.shape[1] == 1, lambda x: not x.shape[1] - 1, lambda x: x.size(1) < 2, lambda x: not x.shape[1] // 2,
    lambda x: x[0, :, 0].numel() in (0, 1), lambda x: tuple(x.shape[1:]) == (1, WIDTH), lambda x: not x[:, 1:].shape[1],
]  # fmt: skip


@pytest.mark.parametrize("condition", by_speed(ONE, ONE[:2].__contains__))
def test_a_branch_for_one_position_that_matters_for_large_values_only(condition):
    assert traced(Net(clamped_if(condition)), None).lengths.fewest == 2


def test_a_branch_far_off_does_not_settle_one_position():
    def function(net: Net, x: Tensor) -> Tensor:
        if x.shape[1] == 3000:
            return x.clamp(-70, 70)
        return x.clamp(-60, 60) if x.shape[1] == 1 else x * 1

    assert traced(Net(function), None).lengths.fewest == 2


def test_one_position_is_not_decoded_by_the_graph_of_more():
    dec = decoder(Net(clamped_if(ONE[0])), features(2, 12, WIDTH), max_length=40)
    with pytest.raises(FlashinfError, match="give at least 2"):
        dec.prefill(9 * features(2, 1, WIDTH))


def attention(net: Net, x: Tensor, mask: Callable[[Tensor], Tensor]) -> Tensor:
    scores = x @ x.mT
    return (mask(scores) if x.shape[1] > 1 else scores).softmax(-1) @ x


def later(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-1], scores.shape[-1], dtype=torch.bool).triu(1)


NOTHING = [
    lambda net, x: attention(net, x, lambda s: s + torch.zeros_like(s).masked_fill(later(s), -torch.inf)),
    lambda net, x: attention(net, x, lambda s: s.masked_fill(later(s), -torch.inf)),
    lambda net, x: attention(net, x, lambda s: torch.where(later(s), -torch.inf, s)),
    lambda net, x: x if x.shape[1] == 1 else torch.cat([x[:, :1], x[:, 1:] + x[:, :-1]], 1),
    lambda net, x: x.cumsum(1) if x.shape[1] > 1 else x,
]


@pytest.mark.parametrize("function", by_speed(NOTHING, NOTHING[::3].__contains__))
def test_what_changes_nothing_of_one_position(function):
    lengths = traced(Net(function), None).lengths
    assert lengths.fewest == 1


SOMETHING = [
    lambda net, x: attention(net, x, lambda s: s.masked_fill(later(s).logical_not(), -torch.inf)),
    lambda net, x: attention(net, x, lambda s: s + 1e-12),
    lambda net, x: x * net.low if x.shape[1] == 1 else x * net.high,
    lambda net, x: x if x.shape[1] == 1 else x * net.ones,
    lambda net, x: x * (x < 9) if x.shape[1] == 1 else torch.cat([x[:, :1], x[:, 1:] + x[:, :-1]], 1),
    lambda net, x: x if x.shape[1] == 1 else torch.slice_scatter(x, x[:, :1].clamp(-6, 6), 1, 0, 1),
]


@pytest.mark.parametrize("function", by_speed(SOMETHING, SOMETHING[2:4].__contains__))
def test_what_may_change_something_of_one_position(function):
    net = Net(function, ones=torch.ones(WIDTH))
    net.low, net.high = (torch.nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
    assert traced(net, None).lengths.fewest == 2


# -- the batch -----------------------------------------------------------------------------------------------


def rows_where(condition: Callable[[int], bool]) -> Callable[[Any, Tensor], Tensor]:
    return lambda net, x: x.clamp(-6, 6) if condition(x.shape[0]) else x * 1


BATCHES = [
    lambda b: b == 7, lambda b: b > 5, lambda b: b % 4 == 3, lambda b: b in (1, 9), lambda b: b < 2, lambda b: b == 99,
]  # fmt: skip


@pytest.mark.parametrize("condition", BATCHES)
def test_branches_on_the_batch_that_matter_for_large_values_only(condition):
    program = traced(Net(rows_where(condition)), None)
    assert program.batch == 2


def test_one_row_may_take_another_way_to_the_same():
    def function(net: Net, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            x = x.contiguous()
        return x.cumsum(1)

    assert not isinstance(traced(Net(function), None).batch, int)


def by_index(net: Net, x: Tensor) -> Tensor:
    return [x * 1, x.clamp(-6, 6)][int(x.shape[0] == 1)]


def by_zero(net: Net, x: Tensor) -> Tensor:
    return x * 1 if x.shape[0] - 1 else x.clamp(-6, 6)


def by_len(net: Net, x: Tensor) -> Tensor:
    return x * 1 if len(x) > 1 else x.clamp(-6, 6)


@pytest.mark.parametrize("function", [by_index, by_zero, by_len], ids=lambda f: f.__name__)
def test_questions_in_other_words(function):
    assert traced(Net(function), None).batch == 2


def fails(call: Callable[[], Any]) -> bool:
    try:
        call()
    except (IndexError, RuntimeError):
        return True
    return False


UNASKED = {  # whether a dimension has one entry, and no size is compared
    "error": lambda x, dim: fails(lambda: x.select(dim, 1)),
    "broadcast": lambda x, dim: not fails(lambda: x.select(1 - dim, 0) + x.new_ones(x.shape[dim] + 1, 1)),
    "squeeze": lambda x, dim: x.squeeze(dim).dim() == 2,
    "same size": lambda x, dim: torch.is_same_size(x, x.narrow(dim, 0, 1)),
    "range": lambda x, dim: len(range(min(x.shape[dim], 2))) == 1,
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("is_one", UNASKED.values(), ids=UNASKED)
def test_questions_that_ask_no_size(is_one, dim):
    def function(net: Net, x: Tensor) -> Tensor:
        return x.clamp(-6, 6) * 1 if is_one(x, dim) else x * 1

    program = traced(Net(function), None)
    assert program.batch == 2 if dim == 0 else program.lengths.fewest == 2


FACTORS = {  # of the length: the same number at every length but 1
    "difference": lambda s: max(s, 2) - s,
    "quotient": lambda s: 1 - (s + 1000) // 1002,
    "cancelled": lambda s: s / max(s, 2),
}


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_a_number_that_is_another_at_one_position_only(factor):
    """A new row is no sequence of one position, and no random input is 0.25."""

    def function(net: Net, x: Tensor) -> Tensor:
        number = factor(x.shape[1])
        return x.cumsum(1) + (x == 0.25) * 3.0 * number + (x == 0.25).to(x.dtype).clamp(max=number)

    x = features(2, 12, WIDTH)
    dec = decoder(Net(function), x[:, :6], max_length=32)
    x[:, 6:] = 0.25
    dec.prefill(x[:, :6])
    for n in range(7, 13):
        assert gap(dec.step(x[:, n - 1]), function(None, x[:, :n])[:, -1]) < 1e-12
    with pytest.raises(FlashinfError):
        dec.prefill(x[:, 11:])


def test_one_row_beside_some_length():
    def function(net: Net, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 1 and x.shape[1] > 400 else x

    assert traced(Net(function), None).batch == 2
    assert traced(Net(function), 500).batch == 2


def test_rows_beside_lengths():
    def function(net: Net, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] * x.shape[1] == 36 else x

    assert traced(Net(function), None).batch == 2


def looks_ahead(x: Tensor) -> Tensor:
    return x.flip(1).cumsum(1).flip(1)


def by_an_unknown_operator(x: Tensor) -> Tensor:
    """Sums of eight positions each, by an operator without a rule."""
    return F.pad(x, (0, 0, 7, 0)).unfold(1, 8, 1).sum(-1)


@pytest.mark.parametrize(
    ("function", "kind"), [(looks_ahead, "non_causal"), (by_an_unknown_operator, "unknown_operator")]
)
def test_no_other_length_is_traced_for_what_is_refused_anyway(function, kind, monkeypatch):
    """A branch at some of every 8 lengths would take a trace for each; none of them could help."""

    def padded(net: Net, x: Tensor) -> Tensor:
        return function(padded_to_whole_chunks(net, x))

    made: list[Any] = []
    trace_like = capture._trace_like
    monkeypatch.setattr(capture, "_trace_like", lambda *a, **k: made.append(a) or trace_like(*a, **k))
    with pytest.raises(Unsupported) as refused:
        decoder(Net(padded), features(2, 12, WIDTH), max_length=60)
    assert refused.value.refusals[0].kind == kind
    assert not made


def test_a_forward_of_whole_chunks_only():
    def chunked(net: Net, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, 4, WIDTH).cumsum(2).view(x.shape)

    with pytest.raises(Unsupported, match="multiples of 4 positions only") as refused:
        traced(Net(chunked), None)
    assert refused.value.refusals[0].kind == "lengths"
