"""Factors inside of sums: as products they say what they are."""

import math

import pytest
import torch
from torch import Tensor, nn

import fi_compile
from decoding import decoded, decoder, features, gap
from fi_compile.capture import trace_module
from fi_compile.sums import with_sums_plain

WIDTH = 6


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class Sum(nn.Module):
    """``mix(x, z, n)`` of two projections, [B, n, WIDTH]."""

    def __init__(self, mix):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.x, self.z = mix, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, u: Tensor) -> Tensor:
        return self.mix(self.x(u), self.z(u), u.shape[1])


def later(n: int) -> Tensor:
    return torch.full((n, n), math.inf, dtype=torch.float64).triu(1)


def double(x: Tensor) -> Tensor:
    return 2 * torch.eye(WIDTH, dtype=x.dtype).expand(x.shape[0], WIDTH, WIDTH)


SUMS = {
    "add": lambda x, z, n: x.add(z, alpha=2),
    "sub": lambda x, z, n: torch.sub(x, z, alpha=0.3),
    "rsub": lambda x, z, n: torch.rsub(x, z, alpha=3),
    "numbers": lambda x, z, n: torch.sub(x, 1.5, alpha=2) + torch.rsub(z, 2, alpha=0.7),
    "integers": lambda x, z, n: x.add(z > 0, alpha=0.1),
    "cancels": lambda x, z, n: x.add(z.cumsum(1) / n, alpha=n),
    "baddbmm": lambda x, z, n: torch.baddbmm(x, z, double(x), beta=0.5, alpha=2),
}


@pytest.mark.parametrize("name", SUMS)
def test_factors_are_products(name):
    net, u = Sum(SUMS[name]).double(), features(2, 9, WIDTH)
    program = trace_module(net, u)
    made = with_sums_plain(program)
    assert not any("alpha" in n.kwargs for n in made.graph.nodes)
    assert gap(made.run(u), net(u)) < 1e-13


def test_a_length_that_cancels_is_no_value():
    """A mean times the length is a sum."""
    net, u = Sum(SUMS["cancels"]).double(), features(2, 20, WIDTH)
    assert gap(decoded(decoder(net, u, max_length=40), u, 7), net(u)[:, 6:]) < 1e-12


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, z, n: x.add(z, alpha=n),
        lambda x, z, n: x.add(z, alpha=1 / n),
        lambda x, z, n: torch.rsub(x, z, alpha=n),
        lambda x, z, n: torch.baddbmm(x, z, double(x), beta=n),
    ],
    ids=["add", "quotient", "rsub", "beta"],
)
def test_a_length_as_factor_is_refused_as_one(mix):
    report = fi_compile.explain(Sum(mix).double(), features(2, 9, WIDTH))
    kinds = {refusal.kind for refusal in report.refusals}
    assert "length_as_value" in kinds
    assert "internal" not in kinds


@pytest.mark.parametrize("sign", [1, -1])
def test_masks_with_a_factor(sign):
    """The sign of the factor decides whether later keys are hidden or alone in sight."""

    def attention(x: Tensor, z: Tensor, n: int) -> Tensor:
        scores = torch.sub(x @ z.mT, later(n), alpha=2 * sign)
        return scores.softmax(-1) @ z

    net, u = Sum(attention).double(), features(2, 20, WIDTH)
    if sign < 0:
        with pytest.raises(fi_compile.Unsupported):
            decoder(net, u, max_length=40)
    else:
        assert gap(decoded(decoder(net, u, max_length=40), u, 7), net(u)[:, 6:]) < 1e-12


def test_products_too_large_for_half_precision():
    """What the factor brings back into reach is scaled before it is rounded."""

    def attention(x: Tensor, z: Tensor, n: int) -> Tensor:
        x, z = 400 * x.tanh(), 400 * z.tanh()
        scores = torch.baddbmm(-later(n).half().nan_to_num(0).expand(1, n, n), x, z.mT, alpha=1e-4)
        return scores.softmax(-1) @ z

    net, u = Sum(attention).half(), features(2, 9, WIDTH).half()
    products = (400 * net.x(u).tanh()).float() @ (400 * net.z(u).tanh()).float().mT
    assert products.abs().max() > torch.finfo(torch.float16).max
    made = with_sums_plain(trace_module(net, u)).run(u)
    assert gap(made.double(), net(u).double()) < 1e-2
