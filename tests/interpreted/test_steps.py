"""Steps of the mixers that live beside long convolutions, a launch each."""

import pytest
import torch

import fi_compile
from decoding import EAGER, decoded, gap, ids, language_model
from fi_compile.kernels import linear_attention_step, short_conv_step
from fi_compile.kernels.linear_attention import Contraction, attention_reference, attention_step
from fi_compile.kernels.linear_attention_step import linear_attention_step_gpu, sizes
from fi_compile.kernels.short_conv import short_conv_step as by_torch
from fi_compile.kernels.short_conv import short_conv_step_reference
from fi_compile.kernels.short_conv_step import short_conv_step_gpu
from guarded import assert_close, rand

PAIRS = {"identity": (None, 1, 3), "shared": ([2, 0, 1, 1], 1, 4), "grouped": ([0, 1, 0, 2, 1, 2], 2, 3)}


def fenced(ring: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A ring between rows of sevens, and the memory around it."""
    around = torch.full((ring.shape[0] + 2, *ring.shape[1:]), 7.0, dtype=ring.dtype)
    around[1:-1] = ring
    return around[1:-1], around


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pairs", list(PAIRS))
@pytest.mark.parametrize(("taps", "batch"), [(1, 1), (3, 2), (4, 3)])
def test_short_conv(taps, batch, pairs, dtype):
    source, fan_in, channels = PAIRS[pairs]
    source = None if source is None else torch.tensor(source)
    kernel = rand(taps, channels * fan_in, dtype=dtype, seed=1)
    rows = max(taps, 5)
    ring = rand(rows, batch, 3, dtype=dtype)
    # Positions whose taps lie across the ring's end, at it, and before the first position.
    for position in (0, 1, rows - 1, rows, 17):
        x = rand(batch, 3, dtype=dtype, seed=position + 2)
        expected, after = short_conv_step_reference(
            ring.double(), position, x.double(), kernel.double(), source, fan_in
        )
        for form in (short_conv_step_gpu, by_torch):
            written, around = fenced(ring)
            found = form(written, torch.tensor([position]), x, kernel, source, fan_in)
            assert_close(found, expected, 10.0 * taps * fan_in, units=3)
            assert torch.equal(written.double(), after)
            assert bool((around[[0, -1]] == 7).all())


# Heads, D and E; the last has no values: what divides a normalised attention.
SHAPES = {
    "heads": (Contraction(("ab",), ("ab", "ac"), "ac", "a", {"a": 3, "b": 5, "c": 4}), (3, 5, 4)),
    "no decay": (Contraction(("ab",), ("ab", "ac"), "ac", "", {"a": 2, "b": 3, "c": 70}), (2, 3, 70)),
    "one head": (Contraction(("b",), ("b", "c"), "c", "", {"b": 70, "c": 2}), (1, 70, 2)),
    "sums": (Contraction(("ab",), ("ab",), "a", "a", {"a": 3, "b": 5}), (3, 5, 1)),
}
OTHERS = (
    Contraction(("ba",), ("ab", "ac"), "ac", "a", {"a": 3, "b": 5, "c": 4}),
    Contraction(("ab",), ("ac", "ab"), "ac", "a", {"a": 3, "b": 5, "c": 4}),
    Contraction(("ab",), ("ab", "ac"), "ca", "a", {"a": 3, "b": 5, "c": 4}),
    Contraction(("ab",), ("ab", "ac"), "ac", "ab", {"a": 3, "b": 5, "c": 4}),
    Contraction(("ab", "a"), ("ab", "ac"), "ac", "a", {"a": 3, "b": 5, "c": 4}),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(SHAPES))
def test_linear_attention(name, dtype):
    how, wanted = SHAPES[name]
    assert sizes(how) == wanted
    batch, length, rows = 2, 6, 4
    queries = [rand(batch, *how.shape(x), length, seed=i) for i, x in enumerate(how.queries)]
    keys = [rand(batch, *how.shape(x), length, seed=5 + i) for i, x in enumerate(how.keys)]
    size = [how.sizes[x] if x in how.coefficients else 1 for x in how.state]
    now, past = rand(*size, seed=11), rand(*size, seed=12)
    decay = rand(*size, seed=13).sigmoid()
    lag = torch.arange(1, length, dtype=torch.float64).reshape(-1, *[1] * len(size))
    d = torch.cat([now[None], past * decay ** (lag - 1)]).reshape(length, *how.shape(how.coefficients))
    expected = attention_reference(queries, keys, d, how)
    ring, around = fenced(torch.zeros(rows, batch, *how.shape(how.state), dtype=dtype))
    ring[:] = 3.0
    ring[-1] = 0.0  # the state before the first position; the other rows are not read
    state = torch.zeros(batch, *how.shape(how.state), dtype=torch.float64)
    for t in range(length):
        q, k = ([x[..., t].to(dtype) for x in factors] for factors in (queries, keys))
        found = linear_attention_step.linear_attention_step(
            ring, torch.tensor([t]), q, k, now.to(dtype), past.to(dtype), decay, how
        )
        assert_close(found, expected[..., t], 30.0 * how.summed, units=10)
        _, state = attention_step(
            state, [x[..., t] for x in queries], [x[..., t] for x in keys], now, past, decay, how
        )
        assert_close(ring[t % rows], state, 30.0, units=10)
    assert bool((around[[0, -1]] == 7).all())


def test_contractions_that_stay_with_torch():
    assert [sizes(how) for how in OTHERS] == [None] * len(OTHERS)


def test_operators():
    ring, kernel, x = rand(5, 2, 3), rand(3, 3), rand(2, 3)
    position, op = torch.tensor([4]), torch.ops.flashinf.short_conv_step.default
    torch.library.opcheck(op, (ring, position, x, kernel, None, 1))
    state, q, v = rand(4, 2, 3, 5, 4), rand(2, 3, 5), rand(2, 3, 4)
    op = torch.ops.flashinf.linear_attention_step.default
    torch.library.opcheck(op, (state, position, q, q, v, rand(3), rand(3), rand(3)))


def test_what_is_refused():
    with pytest.raises(ValueError, match="6 taps need a ring of as many rows, found 5"):
        short_conv_step_gpu(rand(5, 2, 3), torch.tensor([0]), rand(2, 3), rand(6, 3))
    with pytest.raises(ValueError, match="kernel must be contiguous"):
        short_conv_step_gpu(rand(5, 2, 3), torch.tensor([0]), rand(2, 3), rand(3, 4).t())
    state, q, v, one = rand(4, 2, 3, 5, 4), rand(2, 3, 5), rand(2, 3, 4), rand(1)
    with pytest.raises(ValueError, match="coefficients are one number or 3, the decay float64"):
        linear_attention_step_gpu(state, torch.tensor([0]), q, q, v, one, one, one.float())
    with pytest.raises(ValueError, match="two rows at least with 30 values each; found"):
        linear_attention_step_gpu(state, torch.tensor([0]), q, q, None, one, one, one)
    with pytest.raises(ValueError, match="two rows at least"):
        linear_attention_step_gpu(state[:1], torch.tensor([0]), q, q, v, one, one, one)


@pytest.mark.parametrize("step", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_decoder_takes_them(step, monkeypatch, without_gradients):
    """A model with short convolutions and linear attention: one launch a mixer and step, and the model's values."""
    model = language_model("hyena_2", "attention_retention", "attention_linear_quadratic").float()
    sequence = ids(2, 40)
    launched = []
    for module in (short_conv_step, linear_attention_step):
        name = f"{module.__name__.rpartition('.')[2]}_kernel"
        kernel = getattr(module, name)
        counted = type(
            "Counted", (), {"__getitem__": lambda _, grid, k=kernel, n=name: launched.append(n) or k[grid]}
        )
        monkeypatch.setattr(module, name, counted())
    options = {**EAGER, "kernels": "triton", "block": 8, "step": step}
    dec = fi_compile.decoder(model, sequence[:, :9], max_length=40, options=options)
    launched.clear()
    assert gap(decoded(dec, sequence, 20), model(sequence)[:, 19:]) < 1e-4
    # Filling a ring of linear attention takes its newest rows step by step.
    found = {name: launched.count(name) for name in set(launched)}
    mixers = dec.engine.derived(2).step.mixers
    kinds = [m.kind for m in mixers]
    if step == "eager":  # a compiler's check of its work launches them too
        assert found["short_conv_step_kernel"] == 20 * kinds.count("short_conv")
        assert found["linear_attention_step_kernel"] == (20 + 7) * kinds.count("linear_attention")
    assert kinds.count("short_conv")
    assert kinds.count("linear_attention") == 3
    dec.rewind(30)
    plain = fi_compile.decoder(model, sequence[:, :9], max_length=40, options={**EAGER, "block": 8})
    plain.prefill(sequence[:, :30])
    assert gap(dec.step(sequence[:, 30]), plain.step(sequence[:, 30])) < 1e-4
