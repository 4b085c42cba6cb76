"""Which rows of its inputs a unit reads: the order of the trials, and how few there are."""

import itertools

import pytest
import torch
from torch import nn

import fi_compile
from decoding import EAGER, decoded, features, gap
from fi_compile.passes import plan_demands
from fi_compile.passes.order_reads import order_reads, sufficient
from fi_compile.units import ALL, NEW


def test_the_order_is_that_of_a_stable_sort_of_all_of_them():
    one, two = [(NEW,), (ALL,)], [(NEW, ALL), (ALL, NEW), (NEW, NEW), (ALL, ALL)]
    choices = [one, two, [()], one]
    prices = [
        [(0, 0), (0, 1)],
        [(1, 1), (1, 1), (0, 0), (2, 2)],
        [(0, 0)],
        [(0, 0), (1, 1)],
    ]
    every = itertools.product(*(zip(c, p, strict=True) for c, p in zip(choices, prices, strict=True)))
    expected = sorted(every, key=lambda a: tuple(map(sum, zip(*(p for _, p in a), strict=True))))
    assert list(order_reads(choices, prices)) == [tuple(d for d, _ in a) for a in expected]


def test_of_very_many_the_dearest_is_still_there():
    choices = [[(NEW,), (ALL,)]] * 40
    found = list(order_reads(choices, [[(0,), (1,)]] * 40))
    assert len(found) < 1000
    assert found[0] == ((NEW,),) * 40
    assert found[-1] == ((ALL,),) * 40
    assert not list(order_reads([[(NEW,)], []], [[(0,)], []]))


def test_rows_that_count_must_be_read():
    choices = [(NEW, ALL), (ALL, NEW), (NEW, NEW)]
    assert sufficient(choices, (False, True)) == [(NEW, ALL)]
    assert sufficient(choices, (True, True)) == []
    assert sufficient(choices, (False, False)) == choices


class TurnedAttention(nn.Module):
    """[B, s, 8]: attention on turned queries and keys of two heads, the keys and values of one shared by both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(8) + 0.5)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    @staticmethod
    def turned(x, cos, sin):
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def forward(self, x):
        batch, n, _ = x.shape
        angles = torch.arange(n)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        cos, sin = angles.cos(), angles.sin()
        u = self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        query = self.query(u).view(batch, n, 2, 4).transpose(1, 2)
        key, value = (f(u).view(batch, n, 1, 4).transpose(1, 2) for f in (self.key, self.value))
        query, key = self.turned(query, cos, sin), self.turned(key, cos, sin)
        key, value = (a.expand(batch, 2, n, 4) for a in (key, value))
        seen = torch.arange(n)[None] <= torch.arange(n)[:, None]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return x + mixed.transpose(1, 2).reshape(batch, n, 8)


def test_trials_grow_with_the_inputs_not_with_their_subsets(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = TurnedAttention().double().eval()
    runs, original = [], plan_demands.run_unit

    def counted(*args, **how):
        runs.append(1)
        return original(*args, **how)

    monkeypatch.setattr(plan_demands, "run_unit", counted)
    x = features(2, 40, 8)
    dec = fi_compile.decoder(model, x, options=EAGER)
    assert len(runs) < 2000
    with torch.no_grad():
        assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-12
