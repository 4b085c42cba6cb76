"""Masks of -10000 and -1e9: as good as -inf where the weights bound the scores, and only there."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fi_compile
from corpus import scale_weights
from decoding import decoded, decoder, features, gap
from fi_compile.capture import trace_module
from fi_compile.facts import Fact
from fi_compile.passes.prove_prefix import Walker, prove_prefix
from fi_compile.program import is_tensor

WIDTH, HEADS = 16, 2


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def later(q: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    return i[:, None] < i


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


def added(q, k, v):
    mask = torch.full((q.shape[-2], q.shape[-2]), -10000.0, dtype=q.dtype).triu(1)
    return (scores_of(q, k) + mask).softmax(-1) @ v


def selected(q, k, v):
    return torch.where(later(q), -1e4, scores_of(q, k)).softmax(-1) @ v


def filled(q, k, v):
    return scores_of(q, k).masked_fill(later(q), -1e9).softmax(-1) @ v


def given_to_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=later(q).to(q.dtype) * -1e4)


def rotated(q, k, v):
    t = torch.arange(q.shape[-2], dtype=q.dtype)[:, None]
    cos, sin = (0.3 * t).cos(), (0.3 * t).sin()

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    return selected(turn(q), turn(k), v)


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    def __init__(self, attend, norm):
        super().__init__()
        self.attend, self.norm = attend, norm()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = self.attend(*qkv.unbind(0)).transpose(1, 2).reshape(batch, length, WIDTH)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm(x))))


def model(attend, norm=lambda: nn.LayerNorm(WIDTH), layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(attend, norm) for _ in range(layers)))
    return scale_weights(net, 0).double().eval()


def accepted(net: nn.Module) -> bool:
    program = trace_module(net, features(2, 9, WIDTH))
    proof = prove_prefix(program, 90)
    return all(proof.proved(o) for o in program.outputs)


@pytest.mark.parametrize(
    "attend", [added, selected, filled, given_to_sdpa, rotated], ids=lambda f: f.__name__
)
def test_bounded_scores_need_no_infinity(attend):
    assert accepted(model(attend))


def test_a_norm_spelled_out_bounds_too():
    assert accepted(model(selected, RMSNorm))


@pytest.mark.parametrize("attend", [added, filled, given_to_sdpa], ids=lambda f: f.__name__)
def test_unbounded_scores_do(attend):
    """Features of any size: scores of any size."""
    net = model(attend, nn.Identity)
    assert not accepted(net)
    huge = 1e7 * features(2, 9, WIDTH)
    huge[:, 6:] *= 1e3
    assert gap(net(huge)[:, :6], net(huge[:, :6])) > 1e-3  # and a later position is seen


class FromTable(nn.Module):
    """Scores of rows of a table, no norm between; the matrix stands on the right of rows that are merged."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, WIDTH)
        self.weight, self.bias = (
            nn.Parameter(torch.randn(WIDTH, 3 * WIDTH)),
            nn.Parameter(torch.randn(3 * WIDTH)),
        )

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        rows = self.table(ids).view(-1, WIDTH)
        qkv = torch.addmm(self.bias, rows, self.weight).view(batch, length, 3, HEADS, -1)
        return added(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).flatten(2)


def test_rows_of_a_table_are_bounded():
    torch.manual_seed(0)
    net, read = FromTable().double().eval(), torch.randint(0, 11, (2, 9))

    def proved() -> bool:
        program = trace_module(net, read)
        proof = prove_prefix(program, 90)
        return all(proof.proved(o) for o in program.outputs)

    assert proved()
    net.table.weight[7] *= 60
    assert not proved()


def floored(q, k, v):
    """The lowest number, plus scores, may be infinite in half precision: it is cut off again."""
    scores = scores_of(q, k) + later(q) * torch.finfo(torch.float32).min
    return torch.max(scores, torch.full((), torch.finfo(torch.float32).min, dtype=q.dtype)).softmax(-1) @ v


def floored_high(q, k, v):
    return torch.max(scores_of(q, k) - 1e4 * later(q), torch.full((), -1e2, dtype=q.dtype)).softmax(-1) @ v


def test_scores_cut_off_at_the_lowest_number():
    assert accepted(model(floored, nn.Identity))
    assert not accepted(model(floored_high, nn.Identity))


def test_a_refusal_says_what_to_write():
    with pytest.raises(fi_compile.Unsupported) as refused:
        decoder(model(added, nn.Identity), features(2, 9, WIDTH), max_length=90)
    assert "10000" in refused.value.refusals[0].reason
    assert "-inf" in refused.value.refusals[0].reason


def test_large_weights_are_not_bounded_enough():
    net = model(selected)
    assert accepted(net)
    net[0].qkv.weight.mul_(60)
    assert not accepted(net)


@pytest.mark.parametrize("attend", [added, given_to_sdpa], ids=lambda f: f.__name__)
def test_decoding(attend):
    net = model(attend)
    dec = decoder(net, features(2, 9, WIDTH), max_length=120)
    assert dec.report.verdict == "proved"
    sequence = features(2, 120, WIDTH)
    for prompt in (1, 7):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-10


def test_new_weights_are_bounded_anew():
    net = model(selected)
    dec = decoder(net, features(2, 9, WIDTH), max_length=90)
    sequence = features(2, 40, WIDTH)
    net[0].qkv.weight.mul_(1.1)
    dec.reset()
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-10
    net[0].qkv.weight.mul_(100)
    with pytest.raises(fi_compile.Unsupported):
        prefilled_again(dec, sequence)


def prefilled_again(dec: fi_compile.Decoder, sequence: Tensor) -> None:
    dec.reset()
    dec.prefill(sequence)


class Everything(nn.Module):
    """Each operator that has a bound, on values of every shape."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.rms, self.scale = RMSNorm(), nn.Parameter(torch.randn(WIDTH))
        self.table = nn.Parameter(torch.randn(90, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        a, b = self.linear(self.norm(x)).chunk(2, -1)
        c = torch.cat([F.silu(a), F.gelu(b)], -1).view(*x.shape[:2], 4, -1).transpose(1, 2)
        d = self.rms(3 * x) * self.scale - 2 * self.table[:n]
        e = d.view(*x.shape[:2], 4, -1).permute(0, 2, 1, 3)
        weights = (c[..., :4] @ e.transpose(-1, -2)).masked_fill(later(e), -torch.inf).softmax(-1)
        f = (weights @ e).relu() / 3 + e[:, :1].expand(-1, 4, -1, -1)
        g = F.scaled_dot_product_attention(c[..., :4], -e, f, is_causal=True)
        h = torch.stack([a.tanh(), torch.sigmoid(b), a.unsqueeze(2).squeeze(2)], 2).unbind(2)[2]
        return g.transpose(1, 2).flatten(2) + h + self.linear(d).split(WIDTH, -1)[1]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_bounds_are_bounds(scale):
    torch.manual_seed(0)
    net = scale_weights(Everything(), 0).double().eval()
    program = trace_module(net, features(2, 9, WIDTH), length=60)
    walker = Walker(program, 60, {})
    for node in program.graph.nodes:
        walker.visit(node)
    data = [n for n in program.graph.nodes if n in program.input_dependent and is_tensor(n)]
    bounded = {n: size for n in data if (size := walker.entry_sizes.of(n)) is not None}
    assert len(bounded) > 0.6 * len([n for n in data if isinstance(walker.results.get(n), Fact)])
    one = torch.zeros(2, 60, WIDTH, dtype=torch.float64)
    one[..., 3] = scale  # a norm's largest entry
    for sequence in (scale * features(2, 60, WIDTH), one):
        values = program.evaluate(sequence, keep=list(bounded))
        for node, size in bounded.items():
            value = values[node].abs()
            assert float(value.max()) <= size.each * (1 + 1e-9), node.name
            for dim, row in size.rows.items():
                assert float(value.norm(dim=dim).max()) <= row * (1 + 1e-9), (node.name, dim)
            if size.convex:
                assert float(values[node].sum(-1).max()) <= 1 + 1e-9
