"""Models and usage made to win a silently wrong number: each must be refused by name, or be exact.

Every model is a plain function of the module's tensors and the sequence. Many do nothing unusual within the first
30 positions, so that whatever was concluded from a short sample is wrong later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding import decoder, features, gap, ids
from fi_compile import FlashinfError

pytestmark = pytest.mark.usefixtures("without_gradients")

EXACT = 1e-9
Function = Callable[[Any, Tensor], Any]


class Model(nn.Module):
    """``function(self, x)`` with parameters, buffers (``buf_…``) and plain attributes."""

    def __init__(self, function: Function, **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            if isinstance(value, Tensor) and name.startswith("buf_"):
                self.register_buffer(name, value)
            elif isinstance(value, Tensor):
                setattr(self, name, nn.Parameter(value))
            else:
                setattr(self, name, value)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def small(model: nn.Module, x: Tensor, **options: Any) -> Any:
    return decoder(model, x[:, :10], **{"capacity": 64, "block": 8, **options})


def by_steps(model: nn.Module, x: Tensor, dec: Any = None, prompt: int = 1, **options: Any) -> float:
    """The gap between prefill and steps, and the model on the whole sequence."""
    dec = dec or small(model, x, **options)
    rows = [dec.prefill(x[:, :prompt])] + [dec.step(x[:, t]) for t in range(prompt, x.shape[1])]
    return gap(torch.stack(rows, 1), model(x)[:, prompt - 1 :])


def held(attack: Callable[[], float]) -> bool:
    """Whether an attack ended in an error raised on purpose, or in the right numbers."""
    try:
        return attack() <= EXACT
    except FlashinfError:
        return True


# -- models ------------------------------------------------------------------------------------------------


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(x.shape[1])
    return i[:, None], i[None, :]


def late(x: Tensor, start: int = 40) -> Tensor:
    """[1, L, 1]: 0 before ``start``, 1 from there on."""
    return (torch.arange(x.shape[1]) >= start).to(x.dtype)[None, :, None]


def delayed(x: Tensor, by: int) -> Tensor:
    return F.pad(x, (0, 0, by, 0))


def long_conv(x: Tensor, k: Tensor) -> Tensor:
    """x: [B, L, C], k: [C, ≥ L]."""
    n = 2 * x.shape[1]
    spectrum = torch.fft.rfft(x.transpose(1, 2), n=n) * torch.fft.rfft(k[..., : x.shape[1]], n=n)
    return torch.fft.irfft(spectrum, n=n)[..., : x.shape[1]].transpose(1, 2)


def attend(x: Tensor, scores: Tensor) -> Tensor:
    return scores.softmax(-1) @ x


def comb_filter(m: Any, x: Tensor) -> Tensor:
    return long_conv(x, m.k * m.buf_mask)


def late_filter(m: Any, x: Tensor) -> Tensor:
    return long_conv(x, m.buf_k)


def dilated_weights(m: Any, x: Tensor) -> Tensor:
    q, k = positions(x)
    return ((k <= q) & ((q - k) % 37 == 0)).to(x.dtype) @ x.exp()


def far_band(m: Any, x: Tensor) -> Tensor:
    q, k = positions(x)
    table = (q == k).to(x.dtype) + 0.5 * (q - k == 40).to(x.dtype)
    return (table * x.transpose(1, 2).unsqueeze(2)).sum(-1).transpose(1, 2)


def delayed_memory(m: Any, x: Tensor) -> Tensor:
    q, k = positions(x)
    memory = delayed(x, 48)[:, : x.shape[1]]
    scores = (x @ m.w @ memory.transpose(1, 2)).masked_fill(k > q, float("-inf"))
    return attend(memory, scores)


def far_nonlinear(m: Any, x: Tensor) -> Tensor:
    return x + delayed(x, 40).tanh()[:, : x.shape[1]]


def far_product(m: Any, x: Tensor) -> Tensor:
    return (delayed(x, 33) * delayed(x @ m.w, 33))[:, : x.shape[1]]


def first_row_sliced(m: Any, x: Tensor) -> Tensor:
    v = x.relu() * late(x)
    return x + v - v[:, :1]


def first_row_narrowed(m: Any, x: Tensor) -> Tensor:
    v = x.relu() * late(x)
    return x + v - v.narrow(1, 0, 1)


def clamped_lag(m: Any, x: Tensor) -> Tensor:
    index = (torch.arange(x.shape[1]) - 40).clamp(min=0)
    return x + (x.relu() * late(x)).index_select(1, index)


def masked_rows(m: Any, x: Tensor) -> Tensor:
    q, k = positions(x)
    low = torch.finfo(torch.float32).min
    scores = (x @ x.transpose(1, 2)).masked_fill(k > q, low).masked_fill((k <= q) & (q >= 40), low)
    return attend(x, scores)


def first_mask_row(m: Any, x: Tensor) -> Tensor:
    q, k = positions(x)
    low, zero = x.new_full((), -1e38), x.new_zeros(())
    causal, hidden = torch.where(k > q, low, zero), torch.where((k == 0) & (q >= 40), low, zero)
    return attend(x, x @ x.transpose(1, 2) + causal[:1] + hidden)


def sunken_scores(m: Any, x: Tensor) -> Tensor:
    q, k = positions(x)
    scores = x @ x.transpose(1, 2) - 1e33 * (q >= 40).to(x.dtype)
    return attend(x, scores.masked_fill(k > q, -1e32))


def masked_by(numbers: Callable[[Tensor], Tensor]) -> Function:
    """Attention whose causal mask compares ``numbers`` of the positions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        number = numbers(torch.arange(x.shape[1]))
        scores = x @ x.transpose(1, 2)
        return attend(x, scores.masked_fill(number[None, :] > number[:, None], float("-inf")))

    return forward


def divided_by_batch(m: Any, x: Tensor) -> Tensor:
    return x * (m.w / x.shape[0])


def offset_by_batch(m: Any, x: Tensor) -> Tensor:
    return (x + m.w / x.shape[0]).cumsum(1)


# name: (function, tensors, length, options)
STEPPED: dict[str, tuple[Function, dict[str, Any], int, dict[str, Any]]] = {
    "comb_filter": (
        comb_filter,
        {"k": randn(3, 400), "buf_mask": (torch.arange(400) % 32 == 0).double()},
        60,
        {"capacity": 1024, "block": 32},
    ),
    "late_filter": (
        late_filter,
        {"buf_k": randn(3, 400) * ((torch.arange(400) == 0) | (torch.arange(400) >= 100))},
        150,
        {},
    ),
    "dilated_weights": (dilated_weights, {}, 100, {}),
    "far_band": (far_band, {}, 60, {}),
    "delayed_memory": (delayed_memory, {"w": randn(3, 3)}, 100, {}),
    "clamped_lag": (clamped_lag, {}, 100, {}),
    "far_nonlinear": (far_nonlinear, {}, 60, {}),
    "far_product": (far_product, {"w": randn(3, 3)}, 60, {}),
    "first_row_sliced": (first_row_sliced, {}, 60, {}),
    "first_row_narrowed": (first_row_narrowed, {}, 60, {}),
    "masked_rows": (masked_rows, {}, 60, {}),
    "first_mask_row": (first_mask_row, {}, 60, {}),
    "sunken_scores": (sunken_scores, {}, 60, {}),
    "uint8_positions": (masked_by(lambda i: i.to(torch.uint8)), {}, 300, {"max_length": 400}),
    "int8_positions": (masked_by(lambda i: i.to(torch.int8)), {}, 200, {"max_length": 200}),
    "overflowing_positions": (masked_by(lambda i: i * 2**57), {}, 100, {"capacity": 128}),
    "truncated_positions": (
        masked_by(lambda i: ((i.double() + 0.5) * (127 / 128)).long()),
        {},
        100,
        {"capacity": 128},
    ),
    "rounded_positions": (masked_by(lambda i: i.float() + (2.0**24 - 40)), {}, 100, {"capacity": 128}),
    "divided_by_batch": (divided_by_batch, {"w": randn(3)}, 12, {}),
    "offset_by_batch": (offset_by_batch, {"w": randn(3)}, 12, {}),
}


@pytest.mark.parametrize("name", STEPPED)
def test_what_short_samples_do_not_show(name):
    function, tensors, length, options = STEPPED[name]
    model, x = Model(function, **tensors), features(2, length, 3)
    assert held(lambda: by_steps(model, x, **options))


# -- events no random sample shows --------------------------------------------------------------------------


def far_delay(m: Any, x: Tensor) -> Tensor:
    return x + delayed(x, 230).tanh()[:, : x.shape[1]]


def high_threshold(m: Any, x: Tensor) -> Tensor:
    return x + (delayed(x, 1) - 7).relu()[:, : x.shape[1]]


def test_a_delay_longer_than_what_is_tried():
    assert held(lambda: by_steps(Model(far_delay), features(1, 240, 2), capacity=512, block=32))


def test_a_threshold_above_all_samples():
    assert held(lambda: by_steps(Model(high_threshold), 10 * features(2, 30, 3)))


def test_one_id_in_many_changes_the_position_after_it():
    def after_the_last_id(m: Any, t: Tensor) -> Tensor:
        ended = (F.pad(t, (1, 0)) == 4999)[:, : t.shape[1]]
        return m.table[0] + m.table[ended.long() + 1] + F.embedding(t, m.table)

    model, t = Model(after_the_last_id, table=randn(5000, 3)), ids(2, 30)
    t[:, 20] = 4999
    assert held(lambda: by_steps(model, t))


def test_a_branch_on_the_length_that_matters_for_large_values_only():
    def forward(m: Any, x: Tensor) -> Tensor:
        return (x.clamp(-7, 7) if x.shape[1] < 16 else x).cumsum(1)

    model, x = Model(forward), 10 * features(2, 40, 3)

    def attack() -> float:
        dec = decoder(model, x[:, :30], capacity=64, block=8)
        dec.prefill(x[:, :5])
        return gap(dec.step(x[:, 5]), model(x[:, :6])[:, 5])

    assert held(attack)


# -- rewinding ---------------------------------------------------------------------------------------------


def short_conv(m: Any, x: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), m.w, groups=3).transpose(1, 2)


def running_sum(m: Any, x: Tensor) -> Tensor:
    return x.cumsum(1)


def rewound(model: nn.Module, *targets: int) -> float:
    x = features(2, 200, 3)
    dec = small(model, x, capacity=256)
    dec.prefill(x)
    for target in targets:
        dec.rewind(target)
    return gap(dec.step(x[:, targets[-1]]), model(x)[:, targets[-1]])


@pytest.mark.parametrize("function", [short_conv, running_sum])
def test_a_second_rewind_reaches_below_what_the_ring_still_has(function):
    assert held(lambda: rewound(Model(function, w=randn(3, 1, 4)), 140, 100))


@pytest.mark.parametrize("function", [short_conv, running_sum])
@pytest.mark.parametrize("target", [0, 1, 133, 134, 136, 137, 199])
def test_one_rewind_around_the_limits_of_a_ring(function, target):
    assert rewound(Model(function, w=randn(3, 1, 4)), target) <= EXACT


# -- weights, structure and attributes that change --------------------------------------------------------


def dead_filters(m: Any, x: Tensor) -> Tensor:
    k = m.gate.relu() * m.k
    n = 2 * x.shape[1]
    spectrum = torch.fft.rfft(x.transpose(1, 2).unsqueeze(1), n=n) * torch.fft.rfft(k[..., : x.shape[1]], n=n)
    return torch.fft.irfft(spectrum, n=n)[..., : x.shape[1]].flatten(1, 2).transpose(1, 2)


def dead_region(m: Any, x: Tensor) -> Tensor:
    return x + (delayed(x, 1) * m.gate.relu()).tanh()[:, : x.shape[1]]


def dead_branch(m: Any, x: Tensor) -> Tensor:
    return x.cumsum(1) + m.gate.relu() * x if x.shape[1] < 16 else x.cumsum(1)


def shifted_scores(m: Any, x: Tensor) -> Tensor:
    q, k = positions(x)
    shift = m.gate.clamp(min=0) * 1e31
    return attend(x, (x @ x.transpose(1, 2) - shift).masked_fill(k > q, -1e30))


DEAD = {
    "filters": (dead_filters, {"gate": torch.full((2, 3, 1), -9.0).double(), "k": randn(2, 3, 200)}),
    "region": (dead_region, {"gate": torch.full((), -9.0).double()}),
    "scores": (shifted_scores, {"gate": torch.full((), -9.0).double()}),
}


@pytest.mark.parametrize("name", DEAD)
def test_weights_that_come_alive_after_creation(name):
    function, tensors = DEAD[name]
    model, x = Model(function, **tensors), features(2, 40, 3)

    def attack() -> float:
        dec = small(model, x)
        model.get_parameter("gate").fill_(1.0)
        return by_steps(model, x, dec, prompt=5)

    assert held(attack)


def test_a_branch_on_the_length_that_comes_alive_after_creation():
    model, x = Model(dead_branch, gate=torch.full((), -9.0).double()), features(2, 40, 3)
    dec = decoder(model, x[:, :30], capacity=64, block=8)
    model.get_parameter("gate").fill_(1.0)

    def attack() -> float:
        dec.prefill(x[:, :5])
        return gap(dec.step(x[:, 5]), model(x[:, :6])[:, 5])

    assert held(attack)


def factor_below(m: Any, x: Tensor) -> Tensor:
    return x.cumsum(1) * (1 + m.gate.relu() if x.shape[1] < 16 else m.one)


def test_a_table_below_the_traced_range_that_comes_alive_after_creation():
    tensors = {"gate": torch.full((), -9.0).double(), "one": torch.ones(()).double()}
    model, x = Model(factor_below, **tensors), features(2, 40, 3)
    dec = decoder(model, x[:, :30], capacity=64, block=8)
    model.get_parameter("gate").fill_(1.0)

    def attack() -> float:
        dec.prefill(x[:, :5])
        return gap(dec.step(x[:, 5]), model(x[:, :6])[:, 5])

    assert held(attack)


def branch_below_another(m: Any, x: Tensor) -> Tensor:
    y = x.cumsum(1)
    if 70 <= x.shape[1] < 75:
        y = y * 2
    return y + 0.0 if x.shape[1] >= 100 else y


def test_a_branch_on_lengths_far_below_the_traced_range():
    model, x = Model(branch_below_another), features(2, 120, 3)

    def attack() -> float:
        dec = decoder(model, x, capacity=128, block=8)
        dec.prefill(x[:, :71])
        return gap(dec.step(x[:, 71]), model(x[:, :72])[:, 71])

    assert held(attack)


def scaled_sum(m: Any, x: Tensor) -> Tensor:
    return m.lin(x).cumsum(1) * m.scale * m.listed[0]


def change_attribute(m: Any) -> None:
    m.scale = 2.0


def change_hook(m: Any) -> None:
    m.lin.register_forward_hook(lambda module, args, out: out * 3)


def change_list(m: Any) -> None:
    m.listed[0] = m.listed[0] * 2


def change_weight(m: Any) -> None:
    m.lin.weight = nn.Parameter(randn(3, 3))


def change_data(m: Any) -> None:
    m.lin.weight.data.neg_()


def change_bias(m: Any) -> None:
    m.lin.bias = None


def change_module(m: Any) -> None:
    m.lin = nn.Sequential(m.lin, nn.Tanh())


CHANGES = [
    change_attribute,
    change_hook,
    change_list,
    change_weight,
    change_data,
    change_bias,
    change_module,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_prefill_after_the_model_was_changed(change):
    model, x = Model(scaled_sum, scale=1.0, listed=[randn(3)]), features(2, 12, 3)
    model.lin = nn.Linear(3, 3).double()
    dec = small(model, x)
    dec.prefill(x[:, :5])
    change(model)
    assert held(lambda: gap(dec.prefill(x[:, :6]), model(x[:, :6])[:, 5]))


def test_weights_tied_at_creation_and_untied_later():
    def head(m: Any, t: Tensor) -> Tensor:
        return m.out(m.emb(t).cumsum(1))

    model, t = Model(head), ids(2, 12)
    model.emb, model.out = nn.Embedding(11, 4).double(), nn.Linear(4, 11, bias=False).double()
    model.out.weight = model.emb.weight
    dec = small(model, t)
    dec.prefill(t[:, :5])
    model.out.weight = nn.Parameter(randn(11, 4))
    assert held(lambda: gap(dec.prefill(t[:, :6]), model(t[:, :6])[:, 5]))


# -- rows of a batch ---------------------------------------------------------------------------------------


def contracted_over_rows(m: Any, x: Tensor) -> Tensor:
    return (late(x, 20) * torch.einsum("bsd,csd,cse->bse", x, x, x)).cumsum(1)


def attention_over_rows(m: Any, x: Tensor) -> Tensor:
    h = x.transpose(0, 1)
    return (late(x, 20) * F.scaled_dot_product_attention(h, h, h).transpose(0, 1)).cumsum(1)


def dead_mixing_of_rows(m: Any, x: Tensor) -> Tensor:
    return (m.gate.relu() * torch.einsum("bsd,csd,cse->bse", x, x, x) + x).cumsum(1)


def numbered_rows(m: Any, x: Tensor) -> Tensor:
    return (x * (torch.arange(x.shape[0]).to(x.dtype) + 1)[:, None, None]).cumsum(1)


def counted_rows(m: Any, x: Tensor) -> Tensor:
    return (x * x.shape[0]).cumsum(1)


MIXED_ROWS = [contracted_over_rows, attention_over_rows, dead_mixing_of_rows, numbered_rows, counted_rows]


@pytest.mark.parametrize("function", MIXED_ROWS)
def test_reorder_of_rows_that_know_of_each_other(function):
    model, x = Model(function, gate=torch.full((), -9.0).double()), features(3, 40, 3)

    def attack() -> float:
        dec = small(model, x)
        model.get_parameter("gate").fill_(1.0)
        dec.prefill(x[:, :30])
        dec.reorder([2, 1])
        return gap(dec.step(x[[2, 1], 30]), model(x[[2, 1]])[:, 30])

    assert held(attack)


@pytest.mark.parametrize("function", MIXED_ROWS[:2] + MIXED_ROWS[3:])
def test_ragged_rows_that_know_of_each_other(function):
    model, x = Model(function, gate=torch.zeros(()).double()), features(3, 40, 3)

    def attack() -> float:
        dec = small(model, x)
        dec.prefill(x[:, :33], lengths=[31, 32, 33])
        token = torch.stack([x[i, n] for i, n in enumerate((31, 32, 33))])
        return gap(dec.step(token)[1], model(x)[1, 32])

    assert held(attack)


# -- usage -------------------------------------------------------------------------------------------------


def test_writing_to_the_inputs_that_were_handed_out():
    model, x = Model(running_sum), features(2, 30, 3)
    dec = small(model, x)
    dec.prefill(x[:, :20])
    dec.inputs.zero_()
    dec.refresh()
    assert gap(dec.step(x[:, 20]), model(x)[:, 20]) <= EXACT


def test_ragged_prompts_padded_beyond_the_capacity():
    model, x = Model(running_sum), features(2, 200, 3)
    dec = small(model, x)
    found = dec.prefill(x, lengths=[3, 5])
    assert gap(found, torch.stack([model(x)[0, 2], model(x)[1, 4]])) <= EXACT


def test_ragged_rows_beside_an_output_without_a_batch():
    model = Model(lambda m, x: (x.cumsum(1), m.w * 2), w=randn(3))
    x = features(2, 30, 3)
    dec = small(model, x)
    found, constant = dec.prefill(x, lengths=[20, 30])
    assert gap(found[0], x[0, :20].sum(0)) <= EXACT
    assert gap(constant, model(x)[1]) <= EXACT


def padded_spectrum(m: Any, x: Tensor) -> Tensor:
    n = 2 * x.shape[1]
    spectrum = F.pad(torch.fft.rfft(x.transpose(1, 2), n=n), (0, 4))
    return torch.fft.irfft(spectrum, n=n)[..., : x.shape[1]].transpose(1, 2)


def test_a_padded_spectrum():
    assert held(lambda: by_steps(Model(padded_spectrum), features(2, 30, 3)))


def test_complex_features():
    x = torch.complex(features(2, 30, 3), features(2, 30, 3, seed=2))
    assert held(lambda: by_steps(Model(running_sum), x))


def alibi(m: Any, x: Tensor) -> Tensor:
    q, k = positions(x)
    scores = x @ x.transpose(1, 2) - (0.3 * (q - k)).to(x.dtype)
    return attend(x, scores.masked_fill(k > q, float("-inf")))


def test_distances_in_single_precision_are_no_reason_to_refuse():
    assert by_steps(Model(alibi), features(2, 80, 3)) <= EXACT


# -- attacks that hold, and must go on holding exactly -----------------------------------------------------


def wrapped_positions(m: Any, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    hashed = m.table[(i * 2654435761 % 2**32) // 2**26]
    return x + m.table[i % 64] + hashed + m.table[i.clamp(max=63)] + (i**2 % 17).to(x.dtype)[:, None]


def running_extremes(m: Any, x: Tensor) -> Tensor:
    product = (1 + 0.01 * x).cumprod(1) + x.logcumsumexp(1)
    return product + x.cummax(1).values + x.cummin(1).values + x.square().cumsum(1).rsqrt()


def seen_before(m: Any, x: Tensor) -> Tensor:
    seen = (x > 1.5).cumsum(1) > 0
    return torch.where(seen, x, -x) + (x > 0).long().cumsum(1).to(x.dtype)


def late_switch(m: Any, x: Tensor) -> Tensor:
    early = (torch.arange(x.shape[1]) < 40)[None, :, None]
    return torch.where(early, x, x.cumsum(1))


def echo(m: Any, x: Tensor) -> Tensor:
    return x + m.w * delayed(x, 40)[:, : x.shape[1]]


def dilated_conv(m: Any, x: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (80, 0))
    return F.conv1d(padded, m.w, dilation=40).relu().transpose(1, 2)


def lag_gather(m: Any, x: Tensor) -> Tensor:
    return x.relu() - x.relu()[:, (torch.arange(x.shape[1]) - 40).clamp(min=0)]


def additive_lowest(m: Any, x: Tensor) -> Tensor:
    size = x.shape[1]
    mask = torch.full((size, size), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
    return attend(x, x @ x.transpose(1, 2) + mask)


def fixed_transform(m: Any, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x.transpose(1, 2), n=256) * torch.fft.rfft(m.k, n=256)
    return torch.fft.irfft(spectrum, n=256)[..., : x.shape[1]].transpose(1, 2)


HELD: dict[str, tuple[Function, dict[str, Any], int]] = {
    "wrapped_positions": (wrapped_positions, {"table": randn(64, 3)}, 150),
    "running_extremes": (running_extremes, {}, 150),
    "seen_before": (seen_before, {}, 150),
    "late_switch": (late_switch, {}, 100),
    "echo": (echo, {"w": randn(3)}, 100),
    "dilated_conv": (dilated_conv, {"w": randn(3, 3, 3)}, 100),
    "lag_gather": (lag_gather, {}, 100),
    "additive_lowest": (additive_lowest, {}, 70),
    "fixed_transform": (fixed_transform, {"k": randn(3, 128)}, 128),
    "truncated_lookup": (
        lambda m, x: x + m.table[(torch.arange(x.shape[1]).to(x.dtype) * (127 / 128) + 0.5).long()],
        {"table": randn(300, 3)},
        150,
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_attacks_that_held_stay_exact(name):
    function, tensors, length = HELD[name]
    assert by_steps(Model(function, **tensors), features(2, length, 3)) <= EXACT


def test_a_filter_that_grows_out_of_its_class_beyond_the_capacity():
    function, tensors, *_ = STEPPED["late_filter"]
    model, x = Model(function, **tensors), features(2, 200, 3)
    dec = small(model, x)
    dec.prefill(x[:, :40], lengths=[20, 40])
    found = dec.extend(torch.stack([x[0, 20:120], x[1, 40:140]]))
    expected = torch.stack([model(x)[0, 20:120], model(x)[1, 40:140]])
    assert gap(found, expected) <= EXACT


def test_forks_that_grow_reorder_and_extend_apart():
    model, x = Model(late_filter, buf_k=randn(3, 400)), features(3, 200, 3)
    dec = small(model, x)
    dec.prefill(x[:, :20])
    twin = dec.fork()
    assert gap(dec.extend(x[:, 20:150]), model(x)[:, 20:150]) <= EXACT
    twin.reorder([1, 0, 1, 2])
    y = x[[1, 0, 1, 2]]
    assert gap(twin.extend(y[:, 20:100]), model(y)[:, 20:100]) <= EXACT
    dec.rewind([0, 17, 64])
    token = torch.stack([x[0, 0], x[1, 17], x[2, 64]])
    expected = torch.stack([model(x)[0, 0], model(x)[1, 17], model(x)[2, 64]])
    assert gap(dec.step(token), expected) <= EXACT


def test_the_last_row_of_a_table_and_nothing_beyond():
    model = Model(lambda m, x: x.cumsum(1) + m.table[: x.shape[1]], table=randn(100, 3))
    x = features(2, 100, 3)
    dec = small(model, x)
    assert gap(dec.prefill(x), model(x)[:, -1]) <= EXACT
    with pytest.raises(FlashinfError):
        dec.step(x[:, 0])
    dec.rewind(99)
    assert gap(dec.step(x[:, 99]), model(x)[:, 99]) <= EXACT
    dec.rewind(0)
    assert gap(dec.extend(x), model(x)) <= EXACT


def test_outputs_that_are_inputs_or_parameters_are_copies():
    model = Model(lambda m, x: (x, m.w, x.cumsum(1)), w=randn(3))
    x = features(2, 20, 3)
    dec = small(model, x)
    dec.prefill(x[:, :5])
    row, weight, total = dec.step(x[:, 5])
    kept = total.clone()
    weight.zero_()
    dec.step(x[:, 6])
    assert gap(row, x[:, 5]) == 0
    assert gap(total, kept) == 0
    assert bool(model.get_parameter("w").any())
