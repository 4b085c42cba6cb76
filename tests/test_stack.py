import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_compile.kernels.block import block_sum
from fi_compile.mixers.stack import ConvState, FilterBank, state_dtype
from fi_compile.schedule import Schedule

DTYPES = [torch.float32, torch.float64]
BATCH, CIN, FILTERS = 2, 3, 3
SOURCE = torch.tensor([2, 0, 1, 1, 0])
INDEX = torch.tensor([0, 1, 1, 2, 0])
BLOCK = 32


def rand(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_filters(capacity, dtype=torch.float64):
    decay = torch.exp(-torch.arange(capacity) / 300)
    return (rand(FILTERS, 5000, seed=1)[:, :capacity] * decay / 5).to(dtype)


def make_bank(capacity, dtype=torch.float64, block=BLOCK):
    filters = make_filters(capacity, dtype)
    return FilterBank(filters, SOURCE, INDEX, channels_in=CIN, block=block)


def direct(inputs, filters):
    """The O(L^2) sum in float64: inputs [B, Cin, L], filters [F, >= L] -> [B, Cout, L]."""
    length = inputs.shape[-1]
    u, k = inputs.double().numpy(), filters.double().numpy()
    out = [
        [np.convolve(row[i], k[f, :length])[:length] for i, f in zip(SOURCE, INDEX, strict=True)] for row in u
    ]
    return torch.from_numpy(np.array(out))


def decode(state, inputs, stop):
    """The step in plain torch: inputs [B, Cin, >= stop] -> outputs [B, Cout, stop - position]."""
    bank, outputs = state.bank, []
    while state.position < stop:
        j = torch.tensor([state.local])
        u = inputs[:, :, state.position]
        z = state.block_pending.index_select(0, j)[0] + bank.skip * u[:, SOURCE]
        z = z + block_sum(state.block_inputs, bank.block_table, j, bank.source)
        state.block_inputs.index_copy_(0, j, u[None])
        state.advance()
        outputs.append(z)
    return torch.stack(outputs, -1) if outputs else inputs.new_zeros(BATCH, len(SOURCE), 0)


def assert_exact(actual, inputs, filters, start=0):
    expected = direct(inputs, filters)[:, :, start : start + actual.shape[-1]]
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    scale = inputs.double().norm(dim=-1)[:, SOURCE] * filters.double().norm(dim=-1)[INDEX]
    if actual.dtype == torch.float64:
        assert (error <= 1e-12).all()
    assert (error <= 3 * torch.finfo(actual.dtype).eps * scale[:, :, None]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 500, 2049])
def test_decoding_equals_the_direct_sum(length, dtype):
    inputs, bank = rand(BATCH, CIN, length, dtype=dtype), make_bank(length, dtype)
    state = ConvState(bank, BATCH)
    assert_exact(decode(state, inputs, length), inputs, bank.filters)
    counts = Schedule(BLOCK, length).count_tiles()
    assert state.tiles_run == counts
    assert state.positions_tiled == sum(side * count for side, count in counts.items())
    with pytest.raises(IndexError, match=f"capacity of {length} positions"):
        state.advance()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prompt", [0, 1, 7, 1000])
def test_prefill_then_decode(prompt, dtype):
    length = 1200
    inputs, bank = rand(BATCH, CIN, length, dtype=dtype), make_bank(length, dtype)
    state = ConvState(bank, BATCH)
    # What an earlier sequence left behind must not matter.
    decode(state, inputs * 3 + 1, 77)
    state.write_history(inputs[:, :, :prompt])
    state.restart(prompt)
    state.tiles_run.clear()
    assert (state.position, state.origin, state.local) == (prompt, prompt, 0)
    assert not state.history[:, :, prompt:].any()
    assert_exact(decode(state, inputs, length), inputs, bank.filters, prompt)
    assert state.tiles_run == Schedule(BLOCK, length, prompt).count_tiles()


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([1, 3, 8, 32]), st.integers(1, 150))
def test_any_history_of_operations_is_exact(data, block, capacity):
    """Steps, rewinds, restarts, appended chunks, copies: the state is a function of the inputs."""
    bank = make_bank(capacity, block=block)
    state = ConvState(bank, BATCH)
    inputs = rand(BATCH, CIN, capacity)
    for seed in range(2, data.draw(st.integers(3, 8))):
        to = data.draw(st.integers(0, capacity))
        kind = data.draw(st.sampled_from(["rewind", "restart", "chunk", "clone", "flush", "step"]))
        position = state.position
        if kind == "chunk":
            start = min(to, position)
            chunk = rand(BATCH, CIN, capacity, seed=seed)[:, :, : (capacity - start) // 2]
            inputs[:, :, start : start + chunk.shape[-1]] = chunk
            state.write_history(chunk, start)
            state.restart(start + chunk.shape[-1])
        elif kind in ("rewind", "restart"):
            getattr(state, kind)(min(to, position))
            # Another continuation than the one that was rewound.
            inputs[:, :, state.position :] = rand(BATCH, CIN, capacity, seed=seed)[:, :, state.position :]
        elif kind == "clone":
            state = state.clone()
        elif kind == "flush":
            state.flush()
            assert torch.equal(state.history[:, :, :position], inputs[:, :, :position])
        start = state.position
        outputs = decode(state, inputs, max(start, to))
        assert_exact(outputs, inputs, bank.filters, start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", [0, 1, 63, 64, 65, 70, 77])
@pytest.mark.parametrize("how", ["restart", "rewind"])
@pytest.mark.parametrize("flushed", [False, True])
def test_rewind_in_mid_block(to, how, flushed, dtype):
    inputs, bank = rand(BATCH, CIN, 300, dtype=dtype), make_bank(300, dtype)
    state = ConvState(bank, BATCH)
    decode(state, inputs, 77)
    if flushed:
        state.flush()
    getattr(state, how)(to)
    assert state.position == to
    # Inside the block [64, 96) a rewind keeps the schedule; everywhere else it begins anew.
    assert state.origin == (0 if how == "rewind" and to >= 64 else to)
    inputs[:, :, to:] = rand(BATCH, CIN, 300, dtype=dtype, seed=5)[:, :, to:]
    assert_exact(decode(state, inputs, 300), inputs, bank.filters, to)


@pytest.mark.parametrize("how", ["restart", "rewind"])
@pytest.mark.parametrize("to", [20, 65])
def test_a_rewind_forgets_infinities(to, how):
    inputs, bank = rand(BATCH, CIN, 100), make_bank(100)
    state = ConvState(bank, BATCH)
    poisoned = inputs.clone()
    poisoned[:, :, to:] = torch.inf
    decode(state, poisoned, 77)
    getattr(state, how)(to)
    assert_exact(decode(state, inputs, 100), inputs, bank.filters, to)


def test_an_interrupted_write_forgets_what_it_may_have_overwritten():
    inputs, bank = rand(BATCH, CIN, 100), make_bank(100)
    state = ConvState(bank, BATCH)
    decode(state, inputs, 77)
    with pytest.raises(NotImplementedError):
        state.write_history(torch.empty(BATCH, CIN, 30, device="meta"), 10)
    assert not state.consistent
    with pytest.raises(ValueError, match=r"outside 0 \.\.\. 10"):
        state.restart(77)
    state.restart(10)
    assert_exact(decode(state, inputs, 100), inputs, bank.filters, 10)


def test_positions_not_reached_are_refused():
    state = ConvState(make_bank(100), BATCH)
    decode(state, rand(BATCH, CIN, 100), 40)
    for call in (lambda: state.restart(41), lambda: state.rewind(41), lambda: state.restart(-1)):
        with pytest.raises(ValueError, match=r"outside 0 \.\.\. 40"):
            call()
    with pytest.raises(ValueError, match=r"outside 0 \.\.\. 40"):
        state.write_history(rand(BATCH, CIN, 3), 41)
    with pytest.raises(ValueError, match="do not fit a history"):
        state.write_history(rand(BATCH, CIN, 61), 40)
    assert state.consistent


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 32, 45])
def test_growth(position, dtype):
    inputs = rand(BATCH, CIN, 200, dtype=dtype)
    small, large = make_bank(50, dtype), make_bank(200, dtype)
    state = ConvState(small, BATCH)
    decode(state, inputs, position)
    grown = state.grow(large)
    assert (grown.position, grown.capacity) == (position, 200)
    assert_exact(decode(grown, inputs, 200), inputs, large.filters, position)
    # The one it grew from goes on undisturbed.
    assert_exact(decode(state, inputs, 50), inputs[:, :, :50], small.filters, position)
    with pytest.raises(ValueError, match="cannot take over"):
        state.grow(make_bank(200, torch.float64 if dtype == torch.float32 else torch.float32))


def test_select_rows_and_clone_are_independent():
    inputs, bank = rand(BATCH, CIN, 150), make_bank(150)
    state = ConvState(bank, BATCH)
    decode(state, inputs, 75)
    index = torch.tensor([1, 1, 0])
    rows, copy = state.select_rows(index), state.clone()
    assert (rows.batch, rows.position, rows.local) == (3, 75, 11)
    other = rand(3, CIN, 150, seed=9)
    other[:, :, :75] = inputs[index, :, :75]
    assert_exact(decode(rows, other, 150), other, bank.filters, 75)
    # The counters of a copy are its own: from 75 on, blocks end at 96 and 128.
    assert rows.tiles_run == {32: 1, 128: 1}
    assert_exact(decode(state, inputs, 150), inputs, bank.filters, 75)
    assert_exact(decode(copy, inputs, 150), inputs, bank.filters, 75)


class InterruptedBank(FilterBank):
    """Raises KeyboardInterrupt before or after a tile, or before the prefix's work."""

    interrupt: str | None = None

    def add_tile(self, tile, history, pending, kept):
        if self.interrupt == "before":
            raise KeyboardInterrupt
        super().add_tile(tile, history, pending, kept)
        if self.interrupt == "after":
            raise KeyboardInterrupt

    def write_prefix(self, history, pending, length):
        if self.interrupt == "prefix":
            raise KeyboardInterrupt
        super().write_prefix(history, pending, length)


def zero_then_interrupt(state):
    state.block_inputs.zero_()
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before", "after", "prefix", "load"])
def test_an_interrupted_change_is_detected_and_repaired(when, monkeypatch):
    inputs = rand(BATCH, CIN, 200)
    bank = InterruptedBank(make_filters(200), SOURCE, INDEX, channels_in=CIN, block=BLOCK)
    state = ConvState(bank, BATCH)
    decode(state, inputs, 63)
    bank.interrupt = when
    with monkeypatch.context() as patch:
        if when == "load":
            patch.setattr(ConvState, "_load_block", zero_then_interrupt)
        change = (lambda: state.restart(50)) if when == "prefix" else lambda: decode(state, inputs, 64)
        with pytest.raises(KeyboardInterrupt):
            change()
    bank.interrupt = None
    assert not state.consistent
    with pytest.raises(RuntimeError, match="repairs it"):
        state.advance()
    with pytest.raises(RuntimeError, match="repairs it"):
        state.clone()
    with pytest.raises(RuntimeError, match="repairs it"):
        state.grow(bank)
    position = state.position
    state.restart(position)
    assert state.consistent
    assert_exact(decode(state, inputs, 200), inputs, bank.filters, position)


def test_advance_in_mid_block_touches_no_tensor(monkeypatch):
    state = ConvState(make_bank(100), BATCH)
    monkeypatch.setattr(ConvState, "_end_block", lambda *_: pytest.fail("a block ended"))
    before = [t._version for t in state._tensors()]
    for _ in range(BLOCK - 1):
        state.advance()
    assert [t._version for t in state._tensors()] == before
    assert state.position == state.local == BLOCK - 1


def test_bank_is_a_copy_of_its_filters():
    filters = make_filters(100)
    bank = FilterBank(filters, SOURCE, INDEX, channels_in=CIN, block=8)
    expected = [bank.filters.clone(), bank.skip.clone(), bank.block_table.clone()]
    spectrum = bank.tiles.spectrum(16)
    filters.zero_()
    for tensor, value in zip((bank.filters, bank.skip, bank.block_table), expected, strict=True):
        assert torch.equal(tensor, value)
    assert bank.tiles.spectrum(16) is spectrum
    assert bank.nbytes > bank.filters.nbytes + spectrum.nbytes


def test_identity_map_and_gradients():
    filters = torch.nn.Parameter(rand(4, 70, seed=1))
    bank = FilterBank(filters, channels_in=4, block=8)
    assert not bank.filters.requires_grad
    state = ConvState(bank, 1)
    inputs = rand(1, 4, 70)
    out = []
    for t in range(70):
        j = torch.tensor([state.local])
        u = inputs[:, :, t]
        z = state.block_pending[j][0] + bank.skip * u + block_sum(state.block_inputs, bank.block_table, j)
        state.block_inputs.index_copy_(0, j, u[None])
        state.advance()
        out.append(z)
    for c in range(4):
        expected = np.convolve(inputs[0, c], filters[c].detach())[:70]
        assert np.abs(torch.stack(out, -1)[0, c].numpy() - expected).max() <= 1e-12


def test_state_made_under_inference_mode_works_outside():
    with torch.inference_mode():
        bank = make_bank(100)
        state = ConvState(bank, BATCH)
        inputs = rand(BATCH, CIN, 100)
        decode(state, inputs, 70)
        copy = state.clone()
    inputs = inputs.clone()
    assert not any(t.is_inference() for t in (*state._tensors(), *copy._tensors(), bank.filters))
    assert_exact(decode(copy, inputs, 100), inputs, bank.filters, 70)
    state.rewind(66)
    assert_exact(decode(state, inputs, 100), inputs, bank.filters, 66)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filters": torch.zeros(3, 8, dtype=torch.bfloat16)}, "float32 or float64"),
        ({"filters": torch.zeros(3)}, r"\[F, capacity\]"),
        ({"block": 0}, "at least one position"),
        ({"source": torch.tensor([0, 1, 3, 0, 0])}, "source has values outside"),
        ({"filter_index": torch.tensor([0, -1, 0, 0, 0])}, "filter_index has values outside"),
        ({"filter_index": torch.tensor([0, 1])}, "different numbers of output channels"),
        ({"filter_index": None}, "different numbers of output channels"),
        ({"source": SOURCE.int()}, "source is int64"),
    ],
)
def test_a_bank_that_does_not_fit_is_refused(change, message):
    arguments = {
        "filters": torch.zeros(3, 8), "source": SOURCE, "filter_index": INDEX,
        "channels_in": CIN, "block": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        FilterBank(**(arguments | change))


def test_sizes():
    state = ConvState(make_bank(100, torch.float32), BATCH)
    assert state.nbytes == 4 * BATCH * (CIN + len(SOURCE)) * (100 + BLOCK)
    assert [state_dtype(d) for d in (torch.bfloat16, torch.float32, torch.float64)] == [
        torch.float32, torch.float32, torch.float64,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="at least one row"):
        ConvState(make_bank(10), 0)
