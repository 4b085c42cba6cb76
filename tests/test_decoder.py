"""The decoder's state and interface: whatever is done to it, it computes what the full forward computes."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fi_compile
from corpus import LAST_ONLY, FeatureModel, Output, scale_weights
from corpus.models import register_output
from decoding import VOCAB, decoded, decoder, features, gap, ids, lanes, language_model, module, stacked
from fi_compile.mixers.stack import FilterBank
from fi_compile.mixers.window import SLACK
from fi_compile.schedule import Schedule

TOLERANCE = 1e-10
BLOCK, FIRST, MOST = 8, 32, 256
# A stack of long filters, a window, a running sum and a history: every kind of state.
MIXED = ("fft_scale_on_filter", "short_conv1d_4", "cumsum", "attention_tril_mask")
STACK = ("fft_scale_on_filter", "series_gated")


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


@cache
def built(mixers: tuple[str, ...]):
    """A model and the engine behind its decoders; neither changes."""
    model = language_model(*mixers, width=4, l_max=MOST)
    return model, decoder(model, ids(2, 9), capacity=FIRST, block=BLOCK).engine


def fresh(mixers: tuple[str, ...] = MIXED, batch: int = 2):
    """A shared model and a decoder of our own at position 0."""
    model, engine = built(mixers)
    return model, fi_compile.Decoder(engine, model, batch)


def own(mixers: tuple[str, ...] = ("fft_scale_on_filter",), **style):
    """A model that a test may change, and its decoder."""
    model = language_model(*mixers, width=4, l_max=MOST, **style)
    return model, decoder(model, ids(2, 9), capacity=FIRST, block=BLOCK)


def check(found: Tensor, expected: Tensor) -> None:
    assert gap(found, expected) < TOLERANCE


def goes_on(dec, model, sequence: Tensor, many: int = 20, seed: int = 9) -> Tensor:
    """Step on by random ids from `sequence` [B, p], which is what the decoder must be at; the longer sequence."""
    assert dec.position.tolist() == [sequence.shape[1]] * sequence.shape[0]
    longer = torch.cat([sequence, ids(sequence.shape[0], many, seed)], 1)
    rows = [dec.step(longer[:, t]) for t in range(sequence.shape[1], longer.shape[1])]
    check(stacked(rows), model(longer)[:, sequence.shape[1] :])
    return longer


def test_steps_read_histories_up_to_a_few_sizes(monkeypatch):
    monkeypatch.setattr(fi_compile.engine, "_FIRST_REACH", 8)
    monkeypatch.setattr(fi_compile.engine, "_REACH_FACTOR", 3)
    model = language_model("attention_sdpa", "running_product", "attention_tril_mask", width=4, l_max=MOST)
    dec = decoder(model, ids(2, 9), capacity=128, block=BLOCK)
    sequence = ids(2, 100)
    check(decoded(dec, sequence, 3), model(sequence)[:, 2:])
    assert sorted(reach for _, reach in dec.engine._steps) == [8, 24, 72, 128]
    dec.rewind(5)
    goes_on(dec, model, sequence[:, :5])
    dec.prefill(sequence[:, :30])
    check(dec.extend(sequence[:, 30:80]), model(sequence[:, :80])[:, 30:])


class Calls:
    """How often a method was called, by its first argument's type."""

    def __init__(self, monkeypatch, owner, name: str):
        self.count = 0
        original = getattr(owner, name)

        def call(*args, **kwargs):
            self.count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)


@pytest.fixture
def forwards(monkeypatch):
    """Counts the passes over a whole sequence."""
    return Calls(monkeypatch, type(built(MIXED)[1]), "forward")


# Prefill, step, extend


def test_decoding_across_blocks_and_doublings():
    model, dec = fresh()
    sequence, expected = ids(2, MOST), model(ids(2, MOST))
    capacities, sizes = [], []
    rows = [dec.prefill(sequence[:, :3])]
    for t in range(3, MOST):
        rows.append(dec.step(sequence[:, t]))
        if not capacities or dec.capacity != capacities[-1]:
            capacities.append(dec.capacity)
            sizes.append(dec.state_bytes)
    check(stacked(rows), expected[:, 2:])
    assert capacities == [32, 64, 128, MOST]
    assert sizes == sorted(set(sizes))
    assert dec.position.tolist() == [MOST, MOST]
    assert torch.equal(dec.inputs, sequence)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_any_batch(batch):
    model, dec = fresh(batch=batch)
    assert (dec.batch, dec.position.tolist()) == (batch, [0] * batch)
    sequence = ids(batch, 45)
    check(stacked([dec.step(sequence[:, t]) for t in range(45)]), model(sequence))
    # A prefill may bring another batch.
    other = ids(batch + 1, 45)
    check(decoded(dec, other, 7), model(other)[:, 6:])


@pytest.mark.parametrize(("many", "forward"), [(1, 0), (63, 0), (64, 1), (100, 1)])
def test_extend_by_steps_and_by_forward(many, forward, forwards):
    model, dec = fresh()
    sequence = ids(2, 150)
    dec.prefill(sequence[:, :20])
    before = forwards.count
    check(dec.extend(sequence[:, 20 : 20 + many]), model(sequence[:, : 20 + many])[:, 20:])
    assert forwards.count - before == forward
    assert torch.equal(dec.inputs, sequence[:, : 20 + many])
    goes_on(dec, model, sequence[:, : 20 + many])


def test_a_short_extension_of_a_long_sequence_is_stepped(forwards):
    _, dec = fresh(STACK)
    dec.prefill(ids(2, 1))
    before = forwards.count
    for _ in range(3):
        dec.extend(ids(2, 63))
    assert forwards.count == before


def test_no_pass_over_the_sequence_while_stepping(forwards):
    _, dec = fresh()
    dec.prefill(ids(2, 5))
    before = forwards.count
    for token in ids(2, 200).T:
        dec.step(token)
    assert forwards.count == before


# Moving about


@pytest.mark.parametrize(
    ("start", "to", "forward"),
    [(45, 45, 0), (45, 43, 0), (45, 33, 0), (45, 10, 0), (45, 1, 0), (45, 0, 0), (200, 150, 0), (200, 60, 1)],
)
def test_rewind(start, to, forward, forwards):
    model, dec = fresh()
    sequence = ids(2, start)
    dec.prefill(sequence[:, :11])
    dec.extend(sequence[:, 11:])
    before = forwards.count
    dec.rewind(to)
    # The rings remember SLACK positions more than a step reads; beyond that the sequence is read again.
    assert (start - to > SLACK) == bool(forward)
    assert forwards.count - before == forward
    assert dec.position.tolist() == [to, to]
    goes_on(dec, model, sequence[:, :to], 50)


def test_rewind_again_and_again():
    model, dec = fresh()
    sequence = ids(2, 40)
    dec.prefill(sequence)
    for seed, back in enumerate((3, 1, 17, 30, 2, 60, 12)):
        sequence = sequence[:, : sequence.shape[1] - back]
        dec.rewind(sequence.shape[1])
        sequence = goes_on(dec, model, sequence, 25, seed)


def test_rewind_of_each_row():
    model, dec = fresh(batch=3)
    sequence = ids(3, 100)
    dec.prefill(sequence)
    dec.rewind([97, 5, 97])
    assert dec.position.tolist() == [97, 5, 97]
    tokens = ids(3, 30, seed=4)
    found = dec.extend(tokens)
    for row, p in enumerate((97, 5, 97)):
        whole = torch.cat([sequence[row, :p], tokens[row]])[None]
        check(found[row : row + 1], model(whole)[:, p:])
    dec.rewind(torch.tensor([5, 5, 5]))
    goes_on(dec, model, sequence[:, :5])


@pytest.mark.parametrize("first", ["original", "copy"])
def test_forks_do_not_disturb_each_other(first):
    model, dec = fresh()
    sequence = ids(2, 45)
    dec.prefill(sequence)
    copy = dec.fork()
    assert lanes(copy)[0] is lanes(dec)[0]
    pair = [dec, copy] if first == "original" else [copy, dec]
    longer = [goes_on(d, model, sequence, 21, seed) for seed, d in enumerate(pair)]
    assert lanes(copy)[0] is not lanes(dec)[0]
    # The last one to write needs no copy: it is the only owner.
    kept = lanes(pair[1])[0]
    goes_on(pair[1], model, longer[1], 2)
    assert lanes(pair[1])[0] is kept
    goes_on(pair[0], model, longer[0], 2)


def test_forks_that_rewind_grow_and_fork_again():
    model, dec = fresh()
    sequence = ids(2, 30)
    dec.prefill(sequence)
    forks = [dec.fork() for _ in range(3)]
    forks[0].rewind(12)
    deeper = forks[1].fork()
    goes_on(forks[1], model, sequence, 40, 1)
    goes_on(forks[0], model, sequence[:, :12], 40, 2)
    goes_on(deeper, model, sequence, 5, 3)
    forks[2].reorder([1, 0])
    goes_on(forks[2], model, sequence[[1, 0]], 5, 4)
    goes_on(dec, model, sequence, 5, 5)


def test_reorder_changes_order_and_batch():
    model, dec = fresh(batch=3)
    sequence = ids(3, 37)
    dec.prefill(sequence)
    for seed, index in enumerate(([2, 0, 1], [1, 1, 0, 2, 2], torch.tensor([4, 0]), [1], [0, 0])):
        dec.reorder(index)
        sequence = goes_on(dec, model, sequence[index], 9, seed)
        assert dec.batch == len(index)
        assert torch.equal(dec.inputs, sequence)


def test_reorder_of_ragged_rows():
    model, dec = fresh(batch=3)
    sequence, lengths, index = ids(3, 40), [40, 7, 22], [1, 0, 1, 2]
    dec.prefill(sequence, lengths)
    dec.reorder(index)
    assert dec.position.tolist() == [7, 40, 7, 22]
    tokens = ids(4, 20, seed=3)
    found = dec.extend(tokens)
    for row, old in enumerate(index):
        whole = torch.cat([sequence[old, : lengths[old]], tokens[row]])[None]
        check(found[row : row + 1], model(whole)[:, lengths[old] :])


def test_reset_and_prefill_forget_everything():
    model, dec = fresh()
    for _ in range(2):
        goes_on(dec, model, ids(2, 0), 70)
        dec.reset()
        assert dec.position.tolist() == [0, 0]
    dec.extend(ids(2, 100))
    check(dec.prefill(ids(2, 3)), model(ids(2, 3))[:, -1])
    goes_on(dec, model, ids(2, 3), 70)


class Positions(nn.Module):
    """A table that has one row for each row of the batch: positions spread over it."""

    def __init__(self):
        super().__init__()
        self.embedding, self.table = nn.Embedding(11, 4), nn.Embedding(MOST, 4)
        self.mixer = module(lambda width, l_max: language_model(*MIXED, width=4, l_max=MOST).body, 4, MOST)

    def forward(self, tokens: Tensor) -> Tensor:
        where = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.mixer(self.embedding(tokens) + self.table(where))


def test_ragged_prompts_with_tables_by_row():
    model = scale_weights(Positions(), 3).double()
    ragged_prompts(model, decoder(model, ids(2, 9), capacity=FIRST, block=BLOCK))


def test_ragged_prompts():
    ragged_prompts(*fresh())


def ragged_prompts(model: nn.Module, dec: fi_compile.Decoder) -> None:
    lengths = [50, 1, 33, 50]
    prompt, tokens = ids(4, 50), ids(4, 40, seed=5)
    found = [dec.prefill(prompt, torch.tensor(lengths))]
    assert dec.position.tolist() == lengths
    found += [dec.step(tokens[:, t]) for t in range(3)]
    found = torch.cat([stacked(found), dec.extend(tokens[:, 3:])], 1)
    for row, n in enumerate(lengths):
        whole = torch.cat([prompt[row, :n], tokens[row]])[None]
        check(found[row : row + 1], model(whole)[:, n - 1 :])
    assert dec.position.tolist() == [n + 40 for n in lengths]
    dec.rewind([20, 20, 2, 41])
    found = dec.extend(tokens)
    for row, n in enumerate((20, 20, 2, 41)):
        history = torch.cat([prompt[row, : lengths[row]], tokens[row]])[:n]
        check(found[row : row + 1], model(torch.cat([history, tokens[row]])[None])[:, n:])


class MixesRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = language_model(*STACK, width=4, l_max=MOST)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.body(tokens)
        return logits - logits.mean(0, keepdim=True)


def test_rows_that_meet_are_kept_together():
    model = MixesRows()
    dec = decoder(model, ids(2, 9), capacity=FIRST, block=BLOCK)
    sequence = ids(3, 40)
    check(decoded(dec, sequence, 7), model(sequence)[:, 6:])
    for refused in (
        lambda: dec.reorder([0, 1]),
        lambda: dec.rewind([3, 4, 5]),
        lambda: dec.prefill(sequence, [3, 4, 5]),
    ):
        with pytest.raises(fi_compile.InputError, match="mixes the rows"):
            refused()
    goes_on(dec, model, sequence)


# Growth


class Late(nn.Module):
    """A filter that changes at lag 100: zero until then beyond the first lags, or constant until then."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.filter = nn.Parameter(torch.randn(4, MOST, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        lag = torch.arange(length, device=x.device)
        if self.kind == "zero":
            k = torch.where((lag < 3) | (lag >= 100), self.filter[:, :length], 0.0)
        else:
            k = self.filter[:, :1] * torch.where(lag < 100, 1.0, 0.5)
        product = torch.fft.rfft(x.mT, n=2 * length) * torch.fft.rfft(k, n=2 * length)
        return torch.fft.irfft(product, n=2 * length)[..., :length].mT


@pytest.mark.parametrize("by", ["step", "extend", "ragged", "prefill"])
@pytest.mark.parametrize(("kind", "before"), [("zero", "short_conv"), ("constant", "scan")])
def test_a_filter_that_leaves_its_class_at_growth(kind, before, by):
    model, x = Late(kind), features(2, 250, 4)
    dec = decoder(model, x[:, :9], capacity=64, block=BLOCK)
    assert [m.kind for m in dec.report.mixers] == [before]
    expected = model(x)
    match by:
        case "step":
            check(decoded(dec, x, 5), expected[:, 4:])
        case "extend":
            dec.prefill(x[:, :60])
            found = torch.cat([dec.extend(x[:, i : i + 10]) for i in range(60, 250, 10)], 1)
            check(found, expected[:, 60:])
        case "ragged":
            dec.prefill(x[:, :60], [60, 31])
            found = [dec.step(torch.stack([x[0, t], x[1, t - 29]])) for t in range(60, 250)]
            check(stacked(found)[:1], expected[:1, 60:])
            check(stacked(found)[1:], expected[1:, 31:221])
        case "prefill":
            dec.prefill(x[:, :60])
            check(dec.prefill(x[:, :200]), expected[:, 199])
            check(dec.extend(x[:, 200:]), expected[:, 200:])


# Weights

CHANGES = {
    "in_place": lambda m: m.head.weight.mul_(1.5),
    "filter": lambda m: m.get_parameter("body.blocks.0.mixer.filter.taps").add_(0.1),
    "assigned": lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight * 1.5)),
    "module": lambda m: setattr(m.body, "norm", nn.LayerNorm(4, dtype=torch.float64, bias=True)),
    "loaded": lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("repair", ["prefill", "reset", "refresh"])
def test_changed_weights_are_noticed(change, repair):
    model, dec = own()
    sequence = ids(2, 45)
    dec.prefill(sequence)
    copy = dec.fork()
    CHANGES[change](model)
    for d in (dec, copy):
        for call in (
            lambda d=d: d.step(sequence[:, 0]),
            lambda d=d: d.extend(sequence),
            lambda d=d: d.rewind(3),
            lambda d=d: d.fork(),
            lambda d=d: d.reorder([0, 1]),
        ):
            with pytest.raises(fi_compile.WeightsChanged, match="changed"):
                call()
    for d in (dec, copy):
        if repair == "refresh":
            d.refresh()
        else:
            d.reset()
            sequence = sequence[:, :0]
        if repair == "prefill":
            sequence = ids(2, 40)
            check(d.prefill(sequence), model(sequence)[:, -1])
        goes_on(d, model, sequence, 30)


def test_the_report_after_new_weights_is_of_these():
    model, dec = own()
    sequence, before = ids(2, 20), dec.report
    model.body.blocks[0].mixer.filter.taps.add_(0.1)
    dec.reset()
    assert dec.report is not before
    for snapshot in dec.report.snapshots:
        check(snapshot.run(sequence), model(sequence))


@pytest.mark.parametrize("repair", ["prefill", "reset", "refresh"])
def test_writes_through_data_are_seen_when_a_sequence_starts(repair):
    model, dec = own()
    sequence = ids(2, 45)
    dec.prefill(sequence)
    model.body.blocks[0].mixer.filter.taps.data.mul_(1.1)
    dec.step(sequence[:, 0])
    sequence = torch.cat([sequence, sequence[:, :1]], 1)
    match repair:
        case "refresh":
            dec.refresh()
        case "reset":
            dec.reset()
            sequence = sequence[:, :0]
        case "prefill":
            check(dec.prefill(sequence), model(sequence)[:, -1])
    goes_on(dec, model, sequence)


def test_weights_that_cannot_be_decoded_leave_the_decoder_refusing():
    model, dec = own()
    sequence = ids(2, 20)
    dec.prefill(sequence)
    saved = model.body.blocks[0].mixer.filter.taps.clone()
    model.body.blocks[0].mixer.filter.taps.fill_(torch.nan)
    for _ in range(2):
        with pytest.raises(fi_compile.Unsupported, match="finite"):
            dec.prefill(sequence)
        with pytest.raises(fi_compile.WeightsChanged):
            dec.step(sequence[:, 0])
    model.body.blocks[0].mixer.filter.taps.copy_(saved)
    check(decoded(dec, sequence, 3), model(sequence)[:, 2:])


def test_an_exchanged_module_is_traced_again():
    model, dec = own()
    sequence = ids(2, 20)
    dec.prefill(sequence)
    model.head = nn.Linear(4, 5, dtype=torch.float64)
    with pytest.raises(fi_compile.WeightsChanged):
        dec.step(sequence[:, 0])
    check(dec.prefill(sequence), model(sequence)[:, -1])
    goes_on(dec, model, sequence)


def test_weights_of_another_dtype_need_another_decoder():
    model, dec = own()
    sequence = ids(2, 20)
    dec.prefill(sequence)
    model.float()
    with pytest.raises(fi_compile.InputError, match="make a new decoder"):
        dec.prefill(sequence)


def test_untied_weights_are_traced_again():
    model, dec = own()
    sequence = ids(2, 20)
    dec.prefill(sequence)
    model.second = nn.Linear(4, 7, bias=False, dtype=torch.float64)
    model.second.weight = model.head.weight
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)
    with pytest.raises(fi_compile.WeightsChanged):
        dec.step(sequence[:, 0])
    check(dec.prefill(sequence), model(sequence)[:, -1])
    goes_on(dec, model, sequence)


# What is returned


class Everything(nn.Module):
    """Returns its input, a parameter, a table, one value twice, and none."""

    def __init__(self):
        super().__init__()
        self.mixer = module(lambda width, l_max: FeatureModel([], 4), 4, MOST)
        self.body = FeatureModel([module(_conv, 4, MOST)], 4)
        self.scale, self.table = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(MOST, 4))

    def forward(self, x: Tensor):
        y = self.body(x)
        rows = self.table[: x.shape[1]]
        return {"x": x, "y": y, "again": y, "scale": self.scale, "rows": rows, "none": None, "flag": 3}


def _conv(width: int, l_max: int) -> nn.Module:
    from corpus import SPELLINGS

    return SPELLINGS["gated"](width, l_max)


@pytest.mark.parametrize("step", ["eager", "inductor", "aot"])
def test_outputs_are_the_callers_own(step):
    model = scale_weights(Everything(), 1).double()
    x = features(2, 80, 4)
    dec = decoder(model, x[:, :9], max_length=100, block=BLOCK, step=step)
    expected = model(x)
    returned: list[tuple[Tensor, Tensor]] = []

    def use(out, at: slice):
        assert (out["none"], out["flag"]) == (None, 3)
        for key in ("x", "y", "again"):
            check(out[key].reshape(2, -1, 4), expected[key][:, at])
        check(out["rows"].reshape(-1, 4), expected["rows"][at])
        check(out["scale"], model.scale)
        for key in ("x", "y", "again", "scale", "rows"):
            if len(returned) % 2:
                out[key].fill_(torch.nan)  # whatever a caller does to it
            else:
                returned.append((out[key], out[key].clone()))

    use(dec.prefill(x[:, :5].clone()), slice(4, 5))
    for t in range(5, 30):
        token = x[:, t].clone()
        use(dec.step(token), slice(t, t + 1))
        token.fill_(torch.nan)
    chunk = x[:, 30:37].clone()
    use(dec.extend(chunk), slice(30, 37))
    chunk.fill_(torch.nan)
    dec.rewind(33)
    use(dec.extend(x[:, 33:36]), slice(33, 36))
    dec.rewind(10)
    use(dec.extend(x[:, 10:]), slice(10, 80))
    assert all(torch.equal(now, then) for now, then in returned)


@pytest.mark.parametrize("output", ["tuple", "dict", "dataclass", "hidden"])
def test_outputs_keep_their_structure(output):
    if output == "dataclass":
        register_output()
    model = language_model("gated", "attention_tril_mask", width=4, l_max=64, output=output)
    sequence = ids(2, 50)
    dec = decoder(model, sequence[:, :9], max_length=60, block=BLOCK)
    plain = language_model("gated", "attention_tril_mask", width=4, l_max=64)
    expected, hidden = plain(sequence), plain.body.hidden(plain.embedding(sequence))

    def check_all(out, at):
        match output:
            case "tuple":
                assert isinstance(out, tuple)
                assert out[1] is None
                check(out[0], expected[:, at])
            case "dict":
                assert list(out) == ["logits", "last_hidden_state"]
                check(out["logits"], expected[:, at])
                check(out["last_hidden_state"], hidden[-1][:, at])
            case _:
                logits, states = (out.logits, out.hidden_states) if output == "dataclass" else out
                assert isinstance(out, Output if output == "dataclass" else tuple)
                assert len(states) == 3
                check(logits, expected[:, at])
                for state, wanted in zip(states, hidden, strict=True):
                    check(state, wanted[:, at])

    check_all(dec.prefill(sequence[:, :7]), 6)
    check_all(dec.step(sequence[:, 7]), 7)
    check_all(dec.extend(sequence[:, 8:50]), slice(8, 50))
    out = dec.prefill(sequence[:, :40], [40, 13])
    logits = out["logits"] if output == "dict" else out.logits if output == "dataclass" else out[0]
    check(logits, torch.stack([expected[0, 39], expected[1, 12]]))


def test_models_that_return_one_position():
    model, x = module(LAST_ONLY["select_before_head"], 4, 200).double(), features(3, 150, 4)
    dec = decoder(model, x[:, :9], max_length=160, block=BLOCK)
    every = model.every_position(x)
    check(dec.prefill(x[:, :50], [50, 3, 22]), torch.stack([every[0, 49], every[1, 2], every[2, 21]]))
    check(dec.prefill(x[:, :50]), every[:, 49])
    check(dec.extend(x[:, 50:54]), every[:, 53])
    check(dec.extend(x[:, 54:]), every[:, 149])
    dec.rewind(20)
    check(dec.step(x[:, 20]), every[:, 20])


def test_bfloat16():
    # torch has no bfloat16 transform on the CPU: the long filter is a direct sum.
    mixers = ("direct_conv1d_pad_flip", "attention_tril_mask")
    double = language_model(*mixers, width=4, l_max=MOST)
    model = language_model(*mixers, width=4, l_max=MOST).bfloat16()
    for rounded, exact in zip(model.parameters(), double.parameters(), strict=True):
        exact.copy_(rounded)
    sequence = ids(2, 100)
    dec = decoder(model, sequence[:, :9], max_length=120, block=BLOCK)
    found, truth = decoded(dec, sequence, 7), double(sequence)
    assert found.dtype == torch.bfloat16
    own_error = float((model(sequence) - truth).abs().max())
    assert float((found - truth[:, 6:]).abs().max()) <= 3 * own_error


@pytest.mark.parametrize("mixers", [MIXED, ("hyena_2",)])
def test_the_compiled_step_is_exact(mixers):
    model = language_model(*mixers, width=4, l_max=MOST)
    sequence = ids(2, 100)
    dec = decoder(model, sequence[:, :9], max_length=128, block=BLOCK, step="inductor")
    check(decoded(dec, sequence, 7), model(sequence)[:, 6:])
    dec.rewind(90)
    goes_on(dec, model, sequence[:, :90])


# Interruptions


def interrupt(*_):
    raise KeyboardInterrupt


def assert_broken(dec, token) -> None:
    for call in (
        lambda: dec.step(token),
        lambda: dec.extend(token[:, None]),
        lambda: dec.rewind(1),
        lambda: dec.fork(),
        lambda: dec.reorder([0]),
    ):
        with pytest.raises(fi_compile.DecoderBroken, match="prefill"):
            call()


@pytest.mark.parametrize("where", ["tile", "step", "after", "copy"])
@pytest.mark.parametrize("repair", ["prefill", "reset", "refresh"])
def test_an_interrupted_step_is_never_built_on(where, repair, monkeypatch):
    model, dec = fresh()
    sequence = ids(2, 15)
    dec.prefill(sequence[:, :7])
    for t in range(7, 14):
        dec.step(sequence[:, t])
    with monkeypatch.context() as patch:
        match where:
            case "tile":
                patch.setattr(FilterBank, "add_tile", interrupt)
            case "step":
                lanes(dec)[0].run = interrupt
            case "after":
                run = dec.engine.step(lanes(dec)[0])
                lanes(dec)[0].run = lambda: (run(), interrupt())
            case "copy":
                patch.setattr(type(lanes(dec)[0]), "_begin_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            dec.step(sequence[:, 14])
    assert_broken(dec, sequence[:, 0])
    if repair == "refresh":
        dec.refresh()
        sequence = sequence[:, : int(dec.position[0])]
        assert sequence.shape[1] in (14, 15)
    elif repair == "reset":
        dec.reset()
        sequence = sequence[:, :0]
    else:
        check(dec.prefill(sequence), model(sequence)[:, -1])
    goes_on(dec, model, sequence)


@pytest.mark.parametrize("what", ["growth", "fork"])
def test_an_interrupted_copy_loses_nothing(what, monkeypatch):
    model, dec = fresh()
    sequence = ids(2, FIRST if what == "growth" else 20)
    dec.prefill(sequence[:, :-1])
    dec.step(sequence[:, -1])
    copy = dec.fork() if what == "fork" else None
    lane = lanes(dec)[0]
    with monkeypatch.context() as patch:
        patch.setattr(type(lane), "_copied", interrupt)
        with pytest.raises(KeyboardInterrupt):
            dec.step(sequence[:, 0])
    assert lanes(dec)[0] is lane
    goes_on(dec, model, sequence, 10, 1)
    if copy is not None:
        goes_on(copy, model, sequence, 10, 2)


# Work


@pytest.mark.parametrize("prompt", [0, 13])
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("mixers", [("gated",), ("hyena_3", "series_gated", "short_conv1d_4")])
@pytest.mark.parametrize(
    ("options", "tiling"),
    [
        ({"radix": 2}, (BLOCK, 2, False)),
        ({"radix": 4}, (BLOCK, 4, False)),
        ({"radix": 4, "latency": "bounded"}, (BLOCK // 2, 4, True)),
    ],
    ids=["dyadic", "radix 4", "bounded"],
)
def test_tiles_follow_the_schedule_whatever_the_depth_and_width(prompt, width, mixers, options, tiling):
    model = language_model(*mixers, width=width, l_max=MOST)
    dec = decoder(model, ids(2, 9), max_length=200, block=BLOCK, **options)
    if prompt:
        dec.prefill(ids(2, prompt))
    (conv,) = [lane.conv for lane in lanes(dec)]
    conv.tiles_run.clear()
    counts = []
    for token in ids(2, 200 - prompt).T:
        dec.step(token)
        counts.append(dict(conv.tiles_run))
    block, radix, deferred = tiling
    schedule = Schedule(block, 200, prompt, radix, deferred)
    assert counts == [schedule.count_tiles(n + 1) for n in range(200 - prompt)]
    assert conv.positions_tiled == sum(side * n for side, n in counts[-1].items())


class Elements(TorchDispatchMode):
    """Counts the elements that operators write."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += sum(
                t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)
            )
        return out


def test_work_per_token_grows_as_log_squared():
    length = 1024
    model = language_model("gated", "hyena_2", width=4, l_max=length + 10)
    # Operators of torch are counted; compiled tiles, which are none, follow the same schedule.
    dec = decoder(model, ids(1, 9), max_length=length, block=BLOCK, kernels="torch")
    per_step = []
    for _ in range(2):  # the first time makes the filters' spectra
        dec.reset()
        per_step.clear()
        for token in ids(1, length).T:
            with Elements() as elements:
                dec.step(token)
            per_step.append(elements.count)
    # Between block ends a step is the same work at every position.
    assert len({n for t, n in enumerate(per_step) if (t + 1) % BLOCK}) == 1
    total = {n: sum(per_step[:n]) / n for n in (128, 256, 512, 1024)}
    # L log² L against L²: a doubling adds to the work per token, it does not double it.
    assert all(total[2 * n] - total[n] < 0.25 * total[n] for n in (128, 256, 512))
    steps = [total[2 * n] - total[n] for n in (128, 256, 512)]
    assert steps[-1] < 2 * steps[0]


class Places(nn.Module):
    """Learned position embeddings, as many as there are rows: no guard says where they end."""

    def __init__(self, rows: int):
        super().__init__()
        self.table, self.places = nn.Embedding(VOCAB, 4), nn.Embedding(rows, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.table(ids) + self.places(torch.arange(ids.shape[1]))).cumsum(1)


@pytest.mark.parametrize(("rows", "prompt"), [(40, 9), (1100, 1020)])
def test_a_table_of_positions_ends_the_sequence(rows: int, prompt: int):
    model, sequence = Places(rows).double().eval(), ids(2, rows + 1)
    dec = decoder(model, sequence[:, :9])
    with torch.no_grad():
        found = decoded(dec, sequence[:, :rows], prompt)
        assert gap(found, model(sequence[:, :rows])[:, prompt - 1 :]) < 1e-12
    with pytest.raises(fi_compile.CapacityError, match=f"exceed {rows}.*tables end there"):
        dec.step(sequence[:, rows])
    with pytest.raises(fi_compile.CapacityError, match=f"exceeds {rows}"):
        decoder(model, sequence[:, :9], max_length=rows + 1)
