"""Heads folded into the batch: what is known of attention holds for one dimension of batch · heads, in any spelling."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus import scale_weights
from decoding import Net, by_speed, decoded, decoder, features, gap
from fi_compile.capture import trace_module
from fi_compile.heads import with_heads_apart
from fi_compile.program import operator_name

WIDTH, HEADS = 8, 2
SMALL = WIDTH // HEADS


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def later(x: Tensor, length: int) -> Tensor:
    return torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)


def bias_added_to_products(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    """The bias is the first argument of the product, in a shape that knows nothing of queries."""
    length = q.shape[1]
    slopes = torch.tensor([0.5, 0.25], dtype=q.dtype)
    bias = (slopes[:, None, None] * torch.arange(length, dtype=q.dtype)).repeat(batch, 1, 1)
    scores = bias.baddbmm(q, k.transpose(1, 2), beta=0.5, alpha=0.7).view(batch, HEADS, length, length)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, torch.finfo(q.dtype).min)
    return torch.bmm(scores.softmax(-1).view(batch * HEADS, length, length), v)


def mask_of_every_head(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    """One mask a row of the batch, repeated for its heads."""
    mask = later(q, q.shape[1]).expand(batch, -1, -1).repeat_interleave(HEADS, 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_letters(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    weights = torch.einsum("nid,njd->nij", q, k) + later(q, q.shape[1]).unsqueeze(0)
    return torch.einsum("nij,njd->nid", F.softmax(weights, -1).type_as(weights), v)


def in_a_window(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    i = torch.arange(q.shape[1])
    near = (i[:, None] >= i) & (i[:, None] - i < 5)
    return torch.bmm(torch.bmm(q, k.mT).masked_fill(~near, -math.inf).softmax(-1), v)


def without_softmax(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = torch.bmm(q, k.mT).tril()
    return torch.bmm(weights, v) / weights.sum(-1, keepdim=True)


def with_running_sums(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    kv = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1)
    return torch.einsum("nsd,nsde->nse", q, kv) / (q * k.cumsum(1)).sum(-1, keepdim=True)


def rotated(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    """Cut in halves, joined, turned round."""
    angles = 0.3 * torch.arange(q.shape[1], dtype=q.dtype)[:, None]

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., : SMALL // 2], x[..., SMALL // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)

    return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)


class Folded(nn.Module):
    """[B, s, D] → [B · heads, s, D / heads] → attend → [B, s, D]; or with the heads before the batch, or s first."""

    def __init__(self, attend: Callable[..., Tensor], order: str = "batch"):
        super().__init__()
        self.attend, self.order = attend, order
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(x).chunk(3, -1)
        if self.order == "sequence":
            parts = [p.transpose(0, 1).contiguous().view(length, -1, SMALL).transpose(0, 1) for p in parts]
            y = self.attend(*parts, batch).transpose(0, 1).reshape(length, batch, WIDTH).transpose(0, 1)
            return self.out(y)
        axes = (0, 2, 1, 3) if self.order == "batch" else (2, 0, 1, 3)
        split = [p.view(batch, length, HEADS, SMALL).permute(axes) for p in parts]
        y = self.attend(*(p.reshape(-1, length, SMALL) for p in split), batch).view(split[0].shape)
        back = (0, 2, 1, 3) if self.order == "batch" else (1, 2, 0, 3)
        return self.out(y.permute(back).reshape(batch, length, WIDTH))


class TorchsOwn(nn.Module):
    """Torch's module folds heads itself."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=later(x, x.shape[1]), need_weights=True)[0]


MODELS = {
    "bias added to products": (lambda: Folded(bias_added_to_products), "kv_cache"),
    "mask of every head": (lambda: Folded(mask_of_every_head), "kv_cache"),
    "by letters": (lambda: Folded(by_letters, "sequence"), "kv_cache"),
    "in a window": (lambda: Folded(in_a_window), "kv_ring"),
    "heads first": (lambda: Folded(in_a_window, "heads"), "kv_ring"),
    "without softmax": (lambda: Folded(without_softmax, "sequence"), "recurrence"),
    "with running sums": (lambda: Folded(with_running_sums), "running_sum"),
    "rotated": (lambda: Folded(rotated, "heads"), "kv_cache"),
    "torch's own": (TorchsOwn, "kv_cache"),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return scale_weights(MODELS[name][0](), 0).double().eval()


QUICK = ("bias added to products", "by letters", "without softmax")


@pytest.mark.parametrize("name", by_speed(MODELS, QUICK.__contains__))
def test_folded_heads_are_kept_row_by_row(name: str):
    net = made(name)
    dec = decoder(net, features(2, 9, WIDTH), max_length=150)
    assert {m.lowering for m in dec.report.mixers} == {MODELS[name][1]}
    assert dec.engine.rows_independent
    sequence = features(3, 40, WIDTH)
    for prompt in (1, 17):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-12


def test_rows_that_are_folded_go_apart_again():
    net = made("bias added to products")
    dec = decoder(net, features(2, 9, WIDTH), max_length=64)
    one, two = features(2, 20, WIDTH), features(2, 20, WIDTH, seed=5)
    dec.prefill(one[:, :10])
    dec.reorder(torch.tensor([1, 0]))
    swapped = torch.cat([one[[1, 0], :10], two[:, 10:]], 1)
    found = torch.stack([dec.step(two[:, t]) for t in range(10, 20)], 1)
    assert gap(found, net(swapped)[:, 10:]) < 1e-12


class MixesHeadsOfRows(nn.Module):
    """Neighbours on the folded dimension are added, the last head of a row to the first of the next."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        folded = x.view(batch, length, HEADS, SMALL).transpose(1, 2).reshape(-1, length, SMALL)
        mixed = folded + folded.roll(1, 0)
        return mixed.view(batch, HEADS, length, SMALL).transpose(1, 2).reshape(batch, length, WIDTH)


def test_what_works_along_the_folded_dimension_gets_it_folded():
    net = MixesHeadsOfRows()
    program = trace_module(net, features(2, 9, WIDTH))
    apart = with_heads_apart(program)
    rolls = [n for n in apart.graph.nodes if operator_name(n.target) == "roll"]
    assert [n.meta["val"].dim() for n in rolls] == [3]
    sequence = features(3, 11, WIDTH)
    assert torch.equal(apart.run(sequence), net(sequence))


def test_nothing_is_changed_without_folded_heads():
    program = trace_module(nn.Linear(WIDTH, WIDTH).double(), features(2, 9, WIDTH))
    assert with_heads_apart(program) is program


def attends_to_itself(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def masked_attention_to_itself(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(x, x, x.sin(), attn_mask=mask)


def queries_are_values(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x.cos(), x, is_causal=True)


def scores_by_letters(x: Tensor) -> Tensor:
    scores = torch.einsum("bid,bjd->bij", x, x)
    above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return scores.masked_fill(above, -torch.inf).softmax(-1) @ x


ITSELF = {attends_to_itself: 1, masked_attention_to_itself: 1, queries_are_values: 1, scores_by_letters: 2}


@pytest.mark.parametrize("attend", ITSELF, ids=lambda f: f.__name__)
def test_a_query_that_is_a_key_too(attend: Callable[[Tensor], Tensor]):
    net, sequence = Net(lambda _, x: attend(2 * x)).eval(), features(2, 30, WIDTH)
    dec = decoder(net, features(2, 9, WIDTH), max_length=48)
    # What makes the copy, of new rows alone, is not among those that look back.
    assert [m.lowering for m in dec.report.mixers] == ["kv_cache"] * ITSELF[attend]
    assert gap(decoded(dec, sequence, 3), net(sequence)[:, 2:]) < 1e-13
