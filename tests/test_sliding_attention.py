"""Attention over the newest positions: decoded with keys and values of these alone."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fi_compile
from corpus import scale_weights
from corpus.attention import Attention, alibi, lags, sliding_window
from decoding import decoded, decoder, features, forks_and_beams, gap, goes_back, lanes, module, rounding
from fi_compile.lane import Lane

WIDTH, WINDOW = 8, 9


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def near(q: Tensor, window: int = WINDOW) -> Tensor:
    lag = lags(q, q.shape[-2])
    return (lag >= 0) & (lag < window)


def by_hand(q, k, v):
    scores = torch.einsum("bhic,bhjc->bhij", q, k) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~near(q), -torch.inf).softmax(-1) @ v


def finite_minus_infinity(q, k, v):
    return torch.where(near(q), q @ k.mT, torch.finfo(q.dtype).min).softmax(-1) @ v


def two_triangles(q, k, v):
    """As in Mistral's code: one triangle of -inf above, one below."""
    later = torch.full((q.shape[-2], q.shape[-2]), -torch.inf, dtype=q.dtype)
    mask = later.triu(1) + later.tril(-WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def band(q, k, v):
    """A table of ones, cut on both sides, applied to the weights before they are normalised."""
    ones = torch.ones(q.shape[-2], q.shape[-2], dtype=q.dtype)
    weights = (q @ k.mT).sigmoid() * (ones.tril() * ones.triu(1 - WINDOW))
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def alibi_in_a_window(q, k, v):
    slope = 2.0 ** -torch.arange(1, q.shape[1] + 1, dtype=q.dtype)
    bias = (-slope[:, None, None] * lags(q, q.shape[-2])).masked_fill(~near(q), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def rotary_in_a_window(q, k, v):
    t = torch.arange(q.shape[-2], dtype=q.dtype)[:, None]
    cos, sin = (0.3 * t).cos(), (0.3 * t).sin()

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    return F.scaled_dot_product_attention(turn(q), turn(k), v, attn_mask=near(q))


def grouped_queries(q, k, v):
    k, v = (x[:, :2].repeat_interleave(q.shape[1] // 2, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near(q))


def grouped_by_flag(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], attn_mask=near(q), enable_gqa=True)


def weights_in_float32(q, k, v):
    scores = (q @ k.mT).masked_fill(~near(q), -torch.inf)
    return scores.softmax(-1, dtype=torch.float64).to(q.dtype) @ v


def bias_by_key_position(q, k, v):
    """As Bloom writes ALiBi: the bias is a function of the key alone."""
    bias = 0.1 * torch.arange(k.shape[-2], dtype=q.dtype)
    return (q @ k.mT + bias).masked_fill(~near(q), -torch.inf).softmax(-1) @ v


def decay_from_data(q, k, v):
    """The forget gates of a selective model, as differences of their running sums, in a window."""
    total = F.logsigmoid(k[..., 0]).cumsum(-1)
    kept = (total[..., :, None] - total[..., None, :]).masked_fill(~near(q), -torch.inf)
    return (q @ k.mT * kept.exp()) @ v


def buffered(q, k, v):
    """A mask computed for all positions, whose values are asked."""
    mask = torch.nn.functional.one_hot(lags(q, q.shape[-2]).clamp(-1, WINDOW) + 1, WINDOW + 2)[..., 1:-1].sum(
        -1
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask > 0)


SLIDING: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    sliding_window, by_hand, finite_minus_infinity, two_triangles, band, alibi_in_a_window, rotary_in_a_window,
    grouped_queries, grouped_by_flag, weights_in_float32, bias_by_key_position, decay_from_data, buffered,
]  # fmt: skip


# what looks like it and is not


def sink(q, k, v):
    """The first position stays in sight (Xiao et al. 2023, arXiv 2309.17453)."""
    mask = near(q) | ((torch.arange(q.shape[-2]) == 0) & (lags(q, q.shape[-2]) >= 0))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def far_lag(q, k, v):
    """One far lag is in sight."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near(q) | (lags(q, q.shape[-2]) == 131))


def growing_window(q, k, v):
    i = torch.arange(q.shape[-2])
    mask = (lags(q, q.shape[-2]) >= 0) & (lags(q, q.shape[-2]) <= i[:, None] // 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def blocks(q, k, v):
    """Each position sees its own block of 16: by the lag alone that is no window."""
    i = torch.arange(q.shape[-2])
    mask = (lags(q, q.shape[-2]) >= 0) & (i[:, None] // 16 == i[None, :] // 16)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def low_not_hidden(q, k, v):
    """Far keys are disfavoured, not hidden."""
    scores = (q @ k.mT + torch.where(near(q), 0.0, -5.0)).masked_fill(lags(q, q.shape[-2]) < 0, -torch.inf)
    return scores.softmax(-1) @ v


def one_head_sees_all(q, k, v):
    lag = lags(q, q.shape[-2])
    reach = torch.tensor([WINDOW, WINDOW, WINDOW, 10**6])[: q.shape[1], None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(lag >= 0) & (lag < reach))


def zeroed_scores(q, k, v):
    """Far scores are 0, and exp(0) counts."""
    scores = (q @ k.mT * near(q)).masked_fill(lags(q, q.shape[-2]) < 0, -torch.inf)
    return scores.softmax(-1) @ v


CACHED = [sink, far_lag, growing_window, blocks, low_not_hidden, one_head_sees_all, zeroed_scores, alibi]


def later_too(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=lags(q, q.shape[-2]).abs() < WINDOW)


def part_of_the_length(q, k, v):
    lag = lags(q, q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(lag >= 0) & (lag <= q.shape[-2] // 4))


def model(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float64
) -> nn.Module:
    return module(lambda width, l_max: Attention(width, l_max, attend), WIDTH, 0).to(dtype)


def lowerings(dec: fi_compile.Decoder) -> set[str]:
    return {mixer.lowering for mixer in dec.report.mixers}


@pytest.mark.parametrize("attend", SLIDING, ids=lambda f: f.__name__)
def test_only_the_window_is_kept(attend):
    net = model(attend)
    dec = decoder(net, features(2, 20, WIDTH), max_length=240)
    assert not dec.engine.plan.histories
    assert "kv_ring" in lowerings(dec)
    assert {m.filter_length for m in dec.report.mixers if m.lowering == "kv_ring"} == {WINDOW}
    sequence = features(2, 200, WIDTH)
    expected = net(sequence)
    for prompt in (1, 7, 100):
        assert gap(decoded(dec, sequence, prompt), expected[:, prompt - 1 :]) < 1e-12


@pytest.mark.parametrize("attend", CACHED, ids=lambda f: f.__name__)
def test_anything_else_keeps_all(attend):
    net = model(attend)
    dec = decoder(net, features(2, 20, WIDTH), max_length=240)
    assert lowerings(dec) == {"kv_cache"}
    sequence = features(2, 200, WIDTH)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12


@pytest.mark.parametrize("attend", [later_too, part_of_the_length], ids=lambda f: f.__name__)
def test_windows_that_are_not_causal_are_refused(attend):
    with pytest.raises(fi_compile.Unsupported):
        decoder(model(attend), features(2, 20, WIDTH), max_length=240)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 500])
def test_lengths(length):
    net = model(rotary_in_a_window)
    dec = decoder(net, features(2, 20, WIDTH), max_length=500)
    sequence = features(2, length, WIDTH)
    expected = net(sequence)
    for prompt in sorted({1, min(7, length), length}):
        assert gap(decoded(dec, sequence, prompt), expected[:, prompt - 1 :]) < 1e-12


@pytest.mark.parametrize("window", [2, 3, 40])
def test_windows_of_other_sizes(window):
    net = model(lambda q, k, v: sliding_window(q, k, v, window))
    dec = decoder(net, features(2, 20, WIDTH), max_length=240)
    assert not dec.engine.plan.histories
    sequence = features(2, 150, WIDTH)
    for prompt in (1, 39, 100):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-12


def test_the_state_does_not_grow_with_the_capacity():
    def held(attend, capacity: int) -> int:
        dec = decoder(model(attend), features(2, 20, WIDTH), max_length=capacity)
        return Lane(dec.engine.derived(2), 2).state_bytes

    assert held(sliding_window, 160) == held(sliding_window, 1024)
    assert held(sink, 1024) > 4 * held(sliding_window, 1024)


def test_float32_is_as_exact_as_the_forward():
    single, double = model(rotary_in_a_window, torch.float32), model(rotary_in_a_window)
    sequence = features(2, 200, WIDTH).float()
    dec = decoder(single, sequence[:, :20], max_length=240)
    assert lowerings(dec) == {"kv_ring"}
    assert rounding(dec, single, double, sequence, 7) < 3


def test_bfloat16_keeps_keys_as_the_model_has_them():
    net = model(sliding_window, torch.bfloat16)
    dec = decoder(net, features(2, 20, WIDTH).bfloat16(), max_length=240)
    sequence = features(2, 100, WIDTH).bfloat16()
    found = decoded(dec, sequence, 7)
    rings = [v for lane in lanes(dec) for name, v in lane.tensors.items() if name.startswith("ring:")]
    assert {ring.dtype for ring in rings} == {torch.bfloat16}
    truth = model(sliding_window, torch.bfloat16).double()(sequence.double())[:, 6:]
    own = (net(sequence)[:, 6:].double() - truth).abs().max()
    assert (found.double() - truth).abs().max() < 1.5 * own


def test_growth_and_windows_wider_than_the_capacity():
    net = model(lambda q, k, v: sliding_window(q, k, v, 100))
    dec = decoder(net, features(2, 20, WIDTH), capacity=64)
    sequence = features(2, 300, WIDTH)
    assert gap(decoded(dec, sequence, 20), net(sequence)[:, 19:]) < 1e-12
    dec = decoder(model(sliding_window), features(2, 20, WIDTH), capacity=150)
    assert gap(decoded(dec, sequence, 20), model(sliding_window)(sequence)[:, 19:]) < 1e-12
    assert lowerings(dec) == {"kv_ring"}


def test_a_far_lag_within_the_new_capacity_is_seen_when_it_grows():
    net = model(far_lag)
    dec = decoder(net, features(2, 20, WIDTH), capacity=150)
    sequence = features(2, 300, WIDTH)
    assert gap(decoded(dec, sequence, 20), net(sequence)[:, 19:]) < 1e-12


class LearnedMask(nn.Module):
    """The window is a buffer: other contents are another window."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(WIDTH, 0, self.attend)
        lag = torch.arange(300)[:, None] - torch.arange(300)[None, :]
        self.register_buffer("mask", (lag >= 0) & (lag < WINDOW))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:n, :n])

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def test_a_mask_that_changes_is_looked_at_again():
    net = scale_weights(LearnedMask(), 0).double().eval()
    dec = decoder(net, features(2, 20, WIDTH), max_length=240)
    assert lowerings(dec) == {"kv_ring"}
    sequence = features(2, 120, WIDTH)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12
    lag = torch.arange(300)[:, None] - torch.arange(300)[None, :]
    net.mask.copy_((lag >= 0) & (lag < 50))
    dec.reset()
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12


@pytest.fixture(scope="module")
def slid():
    with torch.no_grad():
        net = model(alibi_in_a_window)
        return net, decoder(net, features(2, 20, WIDTH), max_length=240)


def test_going_back_within_what_is_kept_is_free(slid):
    net, dec = slid
    sequence = features(2, 160, WIDTH)
    decoded(dec, sequence[:, :140], 20)
    (lane,) = lanes(dec)
    assert lane.rewind(100)
    assert not lane.rewind(60)
    goes_back(net, dec, sequence, (98, 40, 3, 0), 20)
    dec.reset()


def test_forks_beams_and_ragged_prompts(slid):
    net, dec = slid
    forks_and_beams(net, dec, WIDTH)
    one = features(2, 50, WIDTH, seed=3)
    found = dec.prefill(one[:, :30], lengths=torch.tensor([30, 5]))
    assert gap(found[1], net(one)[1, 4]) < 1e-12
    following = dec.step(torch.stack([one[0, 30], one[1, 5]]))
    assert gap(following[1], net(one)[1, 5]) < 1e-12
    dec.reset()


@pytest.mark.slow
def test_compiled():
    net = model(alibi_in_a_window, torch.float32)
    sequence = features(1, 60, WIDTH).float()
    dec = fi_compile.decoder(net, sequence[:, :20], max_length=240)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-5
