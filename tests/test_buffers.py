"""Keys and values in buffers of one fixed size, of which the positions so far are filled."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding import by_speed, decoded, decoder, features, gap
from fi_compile.capture import trace_module
from fi_compile.passes.prove_prefix import prove_prefix

WIDTH, MOST = 6, 48


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Buffered(nn.Module):
    """``attend(q, k, v, unseen)``: keys and values [B, MOST, WIDTH], and which of them a query must not see."""

    def __init__(self, fill, attend, ahead: int = 0):
        super().__init__()
        torch.manual_seed(0)
        self.fill, self.attend, self.ahead = fill, attend, ahead
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("empty", torch.zeros(1, MOST, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        places, positions = torch.arange(MOST), torch.arange(x.shape[1])
        unseen = places > positions[:, None] + self.ahead
        return self.attend(q, self.fill(self.empty, k), self.fill(self.empty, v), unseen)


def written(buffer: Tensor, rows: Tensor) -> Tensor:
    buffer = buffer.expand(rows.shape[0], -1, -1).clone()
    buffer[:, : rows.shape[1]] = rows
    return buffer


def padded(buffer: Tensor, rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, MOST - rows.shape[1]))


def joined(buffer: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(rows.shape[0], MOST - rows.shape[1], WIDTH)], 1)


def softmax(q: Tensor, k: Tensor, v: Tensor, unseen: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(unseen, -math.inf).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, unseen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~unseen)


def linear(q: Tensor, k: Tensor, v: Tensor, unseen: Tensor) -> Tensor:
    return ((q @ k.mT) * ~unseen) @ v


PAIRS = [
    (written, softmax),
    (padded, fused),
    (padded, linear),
    (written, fused),
    (written, linear),
    (joined, softmax),
]


@pytest.mark.parametrize("pair", by_speed(PAIRS, PAIRS[:3].__contains__))
def test_attention_over_a_buffer(pair):
    net, x = Buffered(*pair).double(), features(2, 40, WIDTH)
    dec = decoder(net, x[:, :9], max_length=MOST - 2)
    for prompt in (1, 7):
        assert gap(decoded(dec, x, prompt), net(x)[:, prompt - 1 :]) < 1e-12


def test_zeros_that_fill_a_buffer_up_end_the_sequences():
    lengths = trace_module(Buffered(joined, softmax).double(), features(2, 9, WIDTH)).lengths
    assert lengths.minimum <= 2
    assert MOST - 2 <= (lengths.maximum or 0) <= MOST


@pytest.mark.parametrize("attend", [softmax, fused, linear])
def test_a_mask_that_lets_the_next_one_through_is_refused(attend):
    """By the rules alone, which take the mask as it should be."""
    for ahead in (0, 1):
        program = trace_module(Buffered(written, attend, ahead).double(), features(2, 9, WIDTH))
        assert bool(prove_prefix(program, MOST).refusals) == bool(ahead)


def test_causal_by_a_question_about_the_length():
    """``is_causal=n > 1``: of one position there is no later one."""

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, 2 * x, x.sin(), is_causal=x.shape[1] > 1)

    x = features(2, 20, WIDTH)
    dec = decoder(Asking(), x[:, :9], max_length=30)
    assert {m.kind for m in dec.report.mixers} == {"attention"}
    for prompt in (1, 7):
        assert gap(decoded(dec, x, prompt), Asking()(x)[:, prompt - 1 :]) < 1e-12
