"""The state of a stack under every tiling: radices, deferred tiles, shared memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import decoder, gap, ids, language_model
from fi_compile import costs
from fi_compile.kernels.block import block_sum
from fi_compile.mixers.stack import ConvState, FilterBank

BATCH, CHANNELS = 2, 5
# Channels one to one, which share memory; shared inputs and filters; pairs that are summed.
MAPS = {
    "identity": (CHANNELS, None, None, None),
    "shared": (3, [2, 0, 1, 1, 0], [0, 1, 1, 2, 0], None),
    "pairs": (3, [0, 1, 1, 2, 0, 2], [0, 1, 2, 2, 1, 0], [0, 0, 1, 1, 2, 2]),
}
TILINGS = [(2, False), (3, False), (4, False), (8, False), (2, True), (3, True), (4, True)]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_bank(maps, capacity, block, radix, deferred, **more):
    channels_in, *rows = MAPS[maps]
    source, index, target = (None if r is None else torch.tensor(r) for r in rows)
    filters = rand(CHANNELS if index is None else 3, 5000, seed=1)[:, :capacity]
    return FilterBank(
        filters,
        source,
        index,
        target,
        channels_in=channels_in,
        block=block,
        radix=radix,
        deferred=deferred,
        **more,
    )


def direct(bank, inputs):
    """The sums by their definition: [B, Cout, L]."""
    pairs = range(bank.skip.numel())
    source, index, target = (
        r if r is not None else pairs for r in (bank.source, bank.filter_index, bank.target)
    )
    out = np.zeros((inputs.shape[0], bank.channels_out, inputs.shape[2]))
    filters = torch.nn.functional.pad(bank.filters, (0, max(0, inputs.shape[2] - bank.capacity))).numpy()
    for i, f, o in zip(source, index, target, strict=True):
        for b in range(inputs.shape[0]):
            out[b, int(o)] += np.convolve(inputs[b, int(i)].numpy(), filters[int(f)])[: inputs.shape[2]]
    return torch.from_numpy(out)


def decode(state, inputs, stop, done=None):
    """The step in plain torch from the state's position on: [B, Cout, n]. `done` is called after each."""
    bank, outputs = state.bank, []
    while state.position + state.dropped < stop:
        j, u = torch.tensor([state.local]), inputs[:, :, state.position + state.dropped]
        pairs = block_sum(state.block_inputs, bank.block_table, j, bank.source)
        pairs = pairs + bank.skip * (u if bank.source is None else u[:, bank.source])
        z = state.block_pending.index_select(0, j)[0].clone()
        z = z + pairs if bank.target is None else z.index_add_(1, bank.target, pairs)
        state.block_inputs.index_copy_(0, j, u[None])
        state.advance()
        outputs.append(z)
        if done is not None:
            done()
    return torch.stack(outputs, -1) if outputs else inputs.new_zeros(inputs.shape[0], bank.channels_out, 0)


def assert_exact(bank, inputs, found, start=0):
    if found.numel():
        expected = direct(bank, inputs[:, :, : start + found.shape[-1]])[:, :, start:]
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize(("radix", "deferred"), TILINGS)
@pytest.mark.parametrize("transforms", [True, False], ids=["fft", "by cost"])
def test_every_tiling_equals_the_direct_sum(maps, radix, deferred, transforms, monkeypatch):
    if transforms:
        monkeypatch.setattr("fi_compile.mixers.tiles.tile_cost", lambda *_: {"direct": 1.0, "fft": 0.0})
    bank = make_bank(maps, 333, 4, radix, deferred)
    inputs = rand(BATCH, bank.channels_in, 333)
    state = ConvState(bank, BATCH)
    assert_exact(bank, inputs, decode(state, inputs, 333))
    assert state.tiles_run == bank.schedule(0).count_tiles()


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    st.sampled_from(list(MAPS)),
    st.sampled_from(TILINGS),
    st.sampled_from([2, 4, 6, 32]),
    st.integers(1, 170),
)
def test_any_history_of_operations_is_exact(data, maps, tiling, block, capacity):
    """Prompts, rewinds, restarts, copies and growth, wherever tiles are under way."""
    bank = make_bank(maps, capacity, block, *tiling)
    state, inputs = ConvState(bank, BATCH), rand(BATCH, bank.channels_in, 2 * capacity)
    for seed in range(2, data.draw(st.integers(3, 8))):
        kind = data.draw(
            st.sampled_from(["prompt", "rewind", "restart", "clone", "select", "flush", "grow", "step"])
        )
        to, position = data.draw(st.integers(0, state.capacity)), state.position
        if kind == "prompt":
            inputs = rand(state.batch, bank.channels_in, 2 * capacity, seed=seed)
            state.fill(inputs[:, :, :to])
        elif kind in ("rewind", "restart"):
            getattr(state, kind)(min(to, position))
            new = rand(state.batch, bank.channels_in, 2 * capacity, seed=seed)
            inputs = torch.cat([inputs[:, :, : state.position], new[:, :, state.position :]], 2)
        elif kind == "clone":
            left, state = state, state.clone()
            assert_exact(left.bank, inputs, decode(left, inputs, left.capacity), position)
        elif kind == "select":
            index = torch.tensor([1, 0, 1][: data.draw(st.integers(1, 3))]) % state.batch
            state, inputs = state.select_rows(index), inputs[index]
        elif kind == "flush":
            state.flush()
            assert torch.equal(state.history[:, :, :position], inputs[:, :, :position])
        elif kind == "grow" and state.capacity == capacity:
            bank = make_bank(maps, 2 * capacity, block, *tiling)
            state = state.grow(bank)
        start = state.position
        assert_exact(bank, inputs, decode(state, inputs, max(start, to)), start)


@pytest.mark.parametrize(("radix", "deferred"), TILINGS)
def test_sequences_without_an_end(radix, deferred):
    """Half of the inputs is dropped again and again, with tiles under way."""
    bank = make_bank("identity", 256, 8, radix, deferred, reach=60)
    bank.filters[:, 60:] = 0
    bank = FilterBank(bank.filters, channels_in=CHANNELS, block=8, reach=60, radix=radix, deferred=deferred)
    state, inputs = ConvState(bank, 1), rand(1, CHANNELS, 900)
    assert_exact(bank, inputs, decode(state, inputs, 900))
    assert state.dropped


@pytest.mark.parametrize("radix", [2, 4])
def test_work_is_spread_evenly_over_positions(radix, monkeypatch):
    """No position does more than 2.5 times the mean, where tiles at once would do hundreds of times as much."""
    monkeypatch.setattr(costs, "_SMALLEST_PIECE", 64)
    channels, length, block = 256, 4096, 32
    bank = FilterBank(
        rand(channels, length).float(), channels_in=channels, block=block, radix=radix, deferred=True
    )
    state, work = ConvState(bank, 1), [0.0]
    for _ in range(length - 1):
        state.advance()
        work.append(state.operations)
    steps = np.diff(work) + 2 * block * channels  # and what is summed in the step
    # Levels begin one after the other; from where the last one begins to where the first one ends.
    steady = steps[length // 4 : 3 * length // 4]
    assert steps.max() <= 2.5 * steady.mean()
    assert np.isclose(work[-1], sum(tile_operations(tile, channels) for tile in bank.schedule(0)), rtol=0.02)


def tile_operations(tile, channels):
    transforms = 2 * 5 * tile.side * np.log2(2 * tile.side)
    return channels * (transforms + (8 * len(tile.blocks) - 2) * (tile.side + 1))


def test_channels_one_to_one_share_memory():
    shared, apart = (make_bank(maps, 100, 8, 2, False) for maps in ("identity", "shared"))
    assert ConvState(shared, 1).nbytes == 8 * CHANNELS * (100 + 2 * 8)
    assert ConvState(apart, 1).nbytes == 8 * (3 + CHANNELS) * (100 + 8)


def test_spectra_of_inputs_are_forgotten_with_the_inputs(monkeypatch):
    """A rewind to within what a kept spectrum was made of must not use it again."""
    monkeypatch.setattr("fi_compile.mixers.tiles.tile_cost", lambda *_: {"direct": 1.0, "fft": 0.0})
    bank = make_bank("identity", 256, 4, 4, False)
    state, inputs = ConvState(bank, BATCH), rand(BATCH, CHANNELS, 256)
    decode(state, inputs, 40)
    assert state.nbytes > 8 * BATCH * CHANNELS * (256 + 8)
    state.restart(0)
    other = rand(BATCH, CHANNELS, 256, seed=7)
    assert_exact(bank, other, decode(state, other, 256))


def test_spectra_that_one_tile_meets_are_not_kept():
    bank = make_bank("identity", 1024, 32, 2, False)
    state, inputs = ConvState(bank, 1), rand(1, CHANNELS, 1024)
    decode(state, inputs, 1024)
    made = bank.tiles.nbytes
    assert made == sum(16 * CHANNELS * (side + 1) for side in (32, 64, 128, 256))
    decode(state.clone(), inputs, 1024)
    assert bank.tiles.nbytes == made


MIXED = ("fft_scale_on_filter", "short_conv1d_4")


def steps(dec, model, sequence, first):
    """Step through [B, L] from `first` on, which is where the decoder must be, against the model."""
    assert dec.position.tolist() == [first] * sequence.shape[0]
    with torch.no_grad():
        rows = [dec.step(sequence[:, t]) for t in range(first, sequence.shape[1])]
        assert gap(torch.stack(rows, 1), model(sequence)[:, first:]) < 1e-10


@pytest.mark.parametrize(
    ("options", "block"),
    [({"latency": "bounded"}, 6), ({"radix": 4}, 2), ({"latency": "bounded", "radix": 2}, 8)],
    ids=str,
)
def test_decoders_under_every_tiling(options, block):
    """Prompt, growth, rewind to everywhere, forks, reordered rows and ragged prompts."""
    model = language_model(*MIXED, width=4, l_max=256)
    dec, sequence = decoder(model, ids(2, 9), capacity=16, block=block, **options), ids(2, 110)
    dec.prefill(sequence[:, :5])
    steps(dec, model, sequence, 5)
    for position in (50, 65, 79):
        copy = dec.fork()
        dec.rewind(position)
        other = torch.cat([sequence[:, :position], ids(2, 90 - position, seed=position)], 1)
        steps(dec, model, other, position)
        steps(copy, model, torch.cat([sequence, ids(2, 5, seed=position)], 1), sequence.shape[1])
        sequence = other
    dec.reorder([1, 1, 0])
    sequence = torch.cat([sequence[[1, 1, 0]], ids(3, 30, seed=4)], 1)
    steps(dec, model, sequence, 90)
    dec.prefill(sequence[:, :40], lengths=[40, 7, 22])
    for _ in range(30):
        token = ids(3, 1, seed=int(dec.position[0]))[:, 0]
        found = dec.step(token)
    for row, length in enumerate((40, 7, 22)):
        with torch.no_grad():
            assert gap(found[row], model(dec.inputs[row : row + 1, : length + 30])[0, -1]) < 1e-10


def test_deferred_tiles_need_two_equal_blocks():
    with pytest.raises(ValueError, match="two equal blocks"):
        make_bank("identity", 64, 5, 4, True)
