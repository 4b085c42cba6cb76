"""Convolutions of two sequences that both grow: filters computed from the data."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fft import irfft, rfft

import fi_compile
from decoding import decoded, decoder, features, gap
from fi_compile.mixers.relaxed import RelaxedProduct

WIDTH, LENGTH = 4, 150


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


class FromData(nn.Module):
    """A convolution of two projections of the input, spelled by ``mix(a, b, weight)``; a, b: [B, WIDTH, n]."""

    def __init__(self, mix: Callable[..., Tensor]):
        super().__init__()
        self.project, self.head = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.rand(WIDTH, 1) + 0.5)
        self.mix = mix
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.project(x).mT.chunk(2, 1)
        return x + self.head(self.mix(a, b.tanh(), self.weight).mT)


def by_transforms(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    n = a.shape[-1]
    return irfft(rfft(a, n=2 * n) * rfft(b, n=2 * n), n=2 * n)[..., :n]


def scaled(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    n = a.shape[-1]
    spectrum = torch.fft.fft(a * weight, n=2 * n) * torch.fft.fft(b, n=2 * n) / 3
    return torch.fft.ifft(spectrum, n=2 * n).real[..., :n] * weight


def per_head(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    n, heads = a.shape[-1], WIDTH // 2
    a_f = rfft(a.unflatten(1, (heads, 2)), n=2 * n)
    b_f = rfft(b[:, :heads], n=2 * n).unsqueeze(2)
    return irfft(a_f * b_f, n=2 * n)[..., :n].flatten(1, 2)


def by_rows(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Read by a table of row numbers: the last n of 2 n rows, after n rows of zeros."""
    n = a.shape[-1]
    y = irfft(rfft(torch.nn.functional.pad(a, (n, 0)), n=3 * n) * rfft(b, n=3 * n), n=3 * n)
    return y.index_select(-1, torch.arange(n, 2 * n))


def with_itself(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return by_transforms(a, a, weight)


def smoothed(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Three factors: no convolution of two."""
    n = a.shape[-1]
    spectra = rfft(a, n=4 * n) * rfft(b, n=4 * n) * rfft(torch.cat([weight, weight / 2], -1), n=4 * n)
    return irfft(spectra, n=4 * n)[..., :n]


@pytest.mark.parametrize(
    ("mix", "lowering"),
    [
        (by_transforms, "two_tiles"),
        (scaled, "two_tiles"),
        (per_head, "two_tiles"),
        (by_rows, "two_tiles"),
        (with_itself, "history"),
        (smoothed, "history"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_filters_from_the_data_decode_exactly(mix, lowering):
    model, x = FromData(mix), features(2, LENGTH, WIDTH)
    dec = decoder(model, x[:, :9], capacity=40)
    assert [m.lowering for m in dec.report.mixers] == [lowering]
    expected = model(x)
    for prompt in (1, 7, 33, 100):
        assert gap(decoded(dec, x, prompt), expected[:, prompt - 1 :]) < 1e-10
    dec.rewind(70)
    branch = dec.fork()
    assert gap(dec.extend(x[:, 70:]), expected[:, 70:]) < 1e-10
    branch.reorder([1, 1, 0])
    assert gap(branch.extend(x[[1, 1, 0], 70:]), expected[[1, 1, 0], 70:]) < 1e-10


@pytest.mark.parametrize("small", [0, 1])
def test_what_is_added_to_a_product_counts_where_the_product_is_small(small):
    """1e-11 in the spectrum of one factor: nothing beside random numbers, all there is beside 1e-13."""

    def guarded(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        n = a.shape[-1]
        spectra = [rfft(a, n=2 * n), rfft(b, n=2 * n)]
        spectra[small] = spectra[small] + 1e-11
        return 1e13 * irfft(spectra[0] * spectra[1], n=2 * n)[..., :n]

    model, x = FromData(guarded), features(1, 40, WIDTH)
    dec = decoder(model, x[:, :9], max_length=40)
    with torch.no_grad():
        model.project.weight.unflatten(0, (2, WIDTH))[small].mul_(1e-13)
        model.project.bias.unflatten(0, (2, WIDTH))[small].mul_(1e-13)
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-10


def test_changed_weights_are_read_anew():
    model, x = FromData(scaled), features(1, LENGTH, WIDTH)
    dec = decoder(model, x[:, :9])
    model.weight.mul_(-2)
    dec.refresh()
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-10


def test_the_compiled_step_is_the_step():
    model, x = FromData(by_transforms).float(), features(1, 70, WIDTH).float()
    dec = fi_compile.decoder(model, x[:, :9])
    assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-5


def wraps_around(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    n = a.shape[-1]
    return irfft(rfft(a, n=n) * rfft(b, n=n), n=n)


def reversed_filter(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return by_transforms(a, b.flip(-1), weight)


@pytest.mark.parametrize("mix", [wraps_around, reversed_filter], ids=lambda f: f.__name__)
def test_filters_that_see_the_future_are_refused(mix):
    with pytest.raises(fi_compile.Unsupported):
        decoder(FromData(mix), features(1, 9, WIDTH))


def direct(a: Tensor, b: Tensor) -> Tensor:
    """Σ_{i≤t} a[i]·b[t-i] for a, b [B, C, n]."""
    n = a.shape[-1]
    return torch.stack([(a[..., : t + 1] * b[..., : t + 1].flip(-1)).sum(-1) for t in range(n)], -1)


def weights_of(product: RelaxedProduct) -> dict[str, Tensor]:
    ones = torch.ones(product.channels, dtype=torch.float64)
    return product.weights(ones, torch.arange(2 * product.channels), torch.float64)


def run(product: RelaxedProduct, ring: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
    """Outputs of positions start … stop - 1."""
    weights = weights_of(product)
    rows = []
    for t in range(start, stop):
        rows.append(product.step(ring, torch.tensor([t]), x[..., t], weights))
        product.advance(ring, t + 1)
    return torch.stack(rows, -1)


@settings(deadline=None, max_examples=60)
@given(
    block=st.integers(1, 9),
    capacity=st.integers(1, 90),
    prompt=st.integers(0, 90),
    back=st.integers(0, 90),
    seed=st.integers(0, 99),
)
def test_outputs_are_the_direct_sums(block, capacity, prompt, back, seed):
    product = RelaxedProduct(3, capacity, block)
    x = torch.randn(2, 6, capacity, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = direct(x[:, :3], x[:, 3:])
    prompt, back = min(prompt, capacity), min(back, capacity)
    weights = weights_of(product)
    ring = product.ring(2, weights)
    if prompt:
        product.fill(ring, x[..., :prompt], weights)
    if prompt < capacity:
        torch.testing.assert_close(run(product, ring, x, prompt, capacity), expected[..., prompt:])
    product.restart(ring, back)
    if back < capacity:
        torch.testing.assert_close(run(product, ring, x, back, capacity), expected[..., back:])


@pytest.mark.parametrize("capacity", [500, 2049])
def test_tiles_stay_quasi_linear(capacity, monkeypatch):
    product, sides = RelaxedProduct(1, capacity, 8), []
    add = RelaxedProduct._add_tiles

    def counted(self, ring, done, start):
        sides.append(min(done & -done, capacity - done))
        add(self, ring, done, start)

    monkeypatch.setattr(RelaxedProduct, "_add_tiles", counted)
    x = torch.randn(1, 2, capacity, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ring = product.ring(1, weights_of(product))
    torch.testing.assert_close(run(product, ring, x, 0, capacity), direct(x[:, :1], x[:, 1:]))
    assert len(sides) == (capacity - 1) // 8
    assert sum(sides) <= capacity * capacity.bit_length() / 2
