"""The extension does what Python does, and is never needed."""

import gc
import sys
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import fi_compile
from decoding import decoded, gap, ids, lanes, language_model
from fi_compile import chain, extension, kept
from fi_compile.errors import DecoderBroken, InputError, WeightsChanged
from fi_compile.weights import WeightWatch

LAYER = "fft_scale_on_filter"
MOST = 64

pytestmark = pytest.mark.skipif(extension.between() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHINF_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("chain", "decoder", "weights"):
        monkeypatch.setattr(sys.modules[f"fi_compile.{module}"], "between", lambda: None)


def native_decoder(model: nn.Module, batch: int = 1, **options) -> fi_compile.Decoder:
    return fi_compile.decoder(model, ids(batch, 9), max_length=MOST, options={"block": 8, **options})


# Watching weights


def bump(model):
    model.head.weight.add_(0)


def replace_parameter(model):
    model.head.weight = nn.Parameter(model.head.weight.clone())


def delete(model):
    del model.head._parameters["weight"]


def exchange_module(model):
    model.head = nn.Linear(*model.head.weight.shape[::-1])


def exchange_table(model):
    model.head._parameters = dict(model.head._parameters)
    model.head._parameters["weight"] = nn.Parameter(model.head.weight.clone())


def set_data(model):
    model.head.weight.data = model.head.weight.data.clone()


def nothing(model):
    model.a_new_setting = 3


@pytest.mark.parametrize(
    "change",
    [bump, replace_parameter, delete, exchange_module, exchange_table, set_data, nothing],
)
def test_the_watch_sees_what_python_sees(change):
    model = language_model(LAYER, width=4, l_max=MOST)
    program = fi_compile.decoder(model, ids(1, 9), max_length=MOST, options={"step": "eager"}).engine.program
    watches = [WeightWatch(program, model, native=native) for native in (False, True)]
    assert all(watch.unchanged() for watch in watches)
    change(model)
    one, two = (watch.unchanged() for watch in watches)
    assert one is two
    assert two is (change is nothing)


def test_a_table_is_looked_through_again_after_it_changed():
    table, other = {"a": 1, "b": 2}, {"a": 1}
    watch = extension.between().Watch((table, table, other), ("a", "b", "a"), (1, 2, 1), (), (), ())
    assert watch()
    assert watch()
    table["c"] = 3
    assert watch()
    assert watch()
    table["b"] = 3
    assert not watch()
    assert not watch()
    table["b"] = 2
    assert watch()
    del other["a"]
    assert not watch()


def test_tensors_that_were_swapped_are_seen():
    one, two = torch.zeros(3), torch.zeros(3)
    watch = extension.between().Watch(
        (), (), (), (one, two), (0, 0), tuple((t.data_ptr(), 3, 1) for t in (one, two))
    )
    assert watch()
    torch.utils.swap_tensors(one, two)
    assert not watch()


def test_each_weight_and_module_is_watched():
    model = language_model(LAYER, "short_conv1d_4", width=4, l_max=MOST)
    program = fi_compile.decoder(model, ids(1, 9), max_length=MOST, options={"step": "eager"}).engine.program
    for parameter in model.parameters():
        watch = WeightWatch(program, model, native=True)
        parameter.add_(0)
        assert not watch.unchanged()


def test_tensors_of_a_subclass_are_watched():
    class Own(torch.Tensor):
        pass

    model = language_model(LAYER, width=4, l_max=MOST)
    model.head.weight = nn.Parameter(model.head.weight.as_subclass(Own))
    program = fi_compile.decoder(
        language_model(LAYER, width=4, l_max=MOST), ids(1, 9), max_length=MOST, options={"step": "eager"}
    ).engine.program
    watch = WeightWatch(program, model, native=True)
    assert watch.unchanged()
    model.head.weight.add_(0)
    assert not watch.unchanged()


def test_places_tell_tensors_and_their_memory_apart():
    def places(*weights):
        return extension.places(("other", *weights), tuple(range(1, 1 + len(weights))))

    weights = [nn.Parameter(torch.randn(4)), torch.randn(3)[1:], torch.zeros(0)]
    here = places(*weights)
    assert here is not None
    weights[0].add_(1)
    assert places(*weights) == here
    weights[0].data = weights[0].data.clone()
    moved = places(*weights)
    assert moved != here
    weights[1].data = weights[1].data.view(torch.int32)
    assert places(*weights) != moved
    twin = weights[1].view_as(weights[1])
    assert places(weights[0], twin, weights[2]) != places(*weights)
    assert places(torch.zeros(2, device="meta")) is None
    assert extension.places((twin,), (1,)) is None


def test_places_tell_numbers_apart_bit_by_bit():
    def numbers(*values):
        return extension.places(values, (), tuple(range(len(values))))

    def number(value, dtype=torch.float64):
        return torch.tensor(value, dtype=dtype)

    assert numbers(number(0.5), number(2.0)) == numbers(number(0.5), number(2.0)) is not None
    assert numbers(number(0.0)) != numbers(number(-0.0))
    assert numbers(number(float("nan"))) == numbers(number(float("nan")))
    assert numbers(number(1.0)) != numbers(number(1.0, torch.float32))
    assert numbers(number(1.0), number(2.0)) != numbers(number(2.0), number(1.0))
    assert numbers(torch.zeros(2)) is None


def test_errors_of_keys_are_raised():
    class Odd:
        def __hash__(self):
            raise KeyError("odd")

    with pytest.raises(KeyError, match="odd"):
        extension.between().Watch(({},), (Odd(),), (None,), (), (), ())()
    with pytest.raises(RuntimeError):
        extension.between().Watch(({},), (), (None,), (), (), ())


# Taking a token in


def place(token, *, batch=2, position=3, ids=11, dtype=torch.int64, more=()):
    row, sequence = torch.zeros(batch, 1, *more, dtype=dtype), torch.zeros(batch, 8, *more, dtype=dtype)
    taken = extension.between().place(token, row, sequence, position, ids)
    return taken, row, sequence


@pytest.mark.parametrize("more", [(), (3,)])
def test_a_token_is_placed(more):
    dtype = torch.float32 if more else torch.int64
    token = torch.arange(2 * (3 if more else 1)).reshape(2, *more).to(dtype)
    taken, row, sequence = place(token, dtype=dtype, more=more, ids=-1 if more else 11)
    assert taken
    assert torch.equal(row[:, 0], token)
    assert torch.equal(sequence[:, 3], token)
    sequence[:, 3] = 0
    assert not sequence.any()


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "token",
    [
        torch.tensor([1, 11]),
        torch.tensor([-1, 1]),
        torch.tensor([1, 2, 3]),
        torch.tensor([[1], [2]]),
        torch.tensor(1),
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1, 9, 2])[::2],
        torch.tensor([1, 2]).as_subclass(Sub),
        torch.tensor([1, 2], device="meta"),
        torch.tensor([1, 2]).to_sparse(),
        [1, 2],
        None,
    ],
)
def test_any_other_token_is_left_alone(token):
    taken, row, sequence = place(token)
    assert not taken
    assert not row.any()
    assert not sequence.any()


@pytest.mark.parametrize("position", [-1, 8, 1 << 40])
def test_no_token_is_placed_outside(position):
    assert not place(torch.tensor([1, 2]), position=position)[0]


@pytest.mark.parametrize(
    "token", [[0, 1], torch.tensor([5, 99]), torch.tensor([5]), torch.tensor([5.0, 1.0])]
)
def test_bad_tokens_are_refused_as_before(token):
    dec = native_decoder(language_model(LAYER, width=4, l_max=MOST), 2)
    dec.prefill(ids(2, 9))
    before = dec.inputs
    with pytest.raises(InputError, match="token"):
        dec.step(token)
    assert torch.equal(dec.inputs, before)


def test_a_token_that_is_no_row_of_memory_is_converted():
    model, sequence = language_model(LAYER, width=4, l_max=MOST), ids(2, 20)
    dec = native_decoder(model, 2)
    dec.prefill(sequence[:, :9])
    strided = sequence.T.contiguous().T
    for t in range(9, 20):
        assert gap(dec.step(strided[:, t]), model(sequence[:, : t + 1])[:, -1]) < 1e-10
    assert torch.equal(dec.inputs, sequence)


# Steps


@pytest.mark.parametrize(
    ("mixers", "batch"),
    [
        (3 * (LAYER,), 1),
        pytest.param((LAYER, "short_conv1d_4", "cumsum", "attention_tril_mask"), 3, marks=pytest.mark.slow),
    ],
)
def test_linked_parts_do_what_they_do_one_by_one(monkeypatch, mixers, batch):
    model, sequence = language_model(*mixers, width=4, l_max=MOST), ids(batch, 60)
    one = native_decoder(model, batch)
    found = decoded(one, sequence, 7)
    without_extension(monkeypatch)
    two = native_decoder(model, batch)
    expected = decoded(two, sequence, 7)
    assert gap(found, expected) < 1e-12
    assert gap(found, model(sequence)[:, 6:]) < 1e-10
    for name, tensor in lanes(one)[0].tensors.items():
        assert torch.equal(tensor, lanes(two)[0].tensors[name]), name
    assert torch.equal(one.inputs, two.inputs)


def test_the_parts_of_a_step_are_linked():
    dec = native_decoder(language_model(*3 * [LAYER], width=4, l_max=MOST))
    dec.step(ids(1, 1)[:, 0])
    assert type(lanes(dec)[0].run).__name__ == "Chain"


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_part_that_is_not_native_runs_between_them(monkeypatch, odd):
    model, sequence = language_model(*3 * [LAYER], width=4, l_max=MOST), ids(1, 40)
    bind = chain.bind_linked

    def one_by_hand(layers, runs, inputs):
        runs = list(runs)
        place = min(odd, len(runs) - 1)
        part = layers.parts[place]
        runs[place] = lambda args: part(*args)
        return bind(layers, runs, inputs)

    monkeypatch.setattr("fi_compile.lower.bind_linked", one_by_hand)
    dec = native_decoder(model)
    assert gap(decoded(dec, sequence, 7), model(sequence)[:, 6:]) < 1e-10
    assert type(lanes(dec)[0].run).__name__ != "Chain"


def test_links_that_are_wrong_are_not_used(monkeypatch, caplog):
    bind = chain.bind_linked

    def crossed(layers, runs, inputs):
        run = bind(layers, runs, inputs)
        return lambda: [2 * value for value in run()]

    monkeypatch.setattr("fi_compile.lower.bind_linked", crossed)
    model, sequence = language_model(LAYER, width=4, l_max=MOST), ids(1, 40)
    dec = native_decoder(model)
    assert gap(decoded(dec, sequence, 7), model(sequence)[:, 6:]) < 1e-10
    assert "one by one" in caplog.text


def test_a_returned_tensor_never_changes():
    dec = native_decoder(language_model(*3 * [LAYER], width=4, l_max=MOST))
    rows = [dec.step(token) for token in ids(1, 20).T]
    kept = [row.clone() for row in rows]
    rows[3].zero_()
    for token in ids(1, 10).T:
        dec.step(token)
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(rows, kept, strict=True)) if i != 3)


def test_steps_with_gradients_and_without():
    model, sequence = language_model(LAYER, width=4, l_max=MOST), ids(1, 30)
    dec = native_decoder(model)
    dec.prefill(sequence[:, :9])
    with torch.enable_grad():
        rows = [dec.step(sequence[:, t]) for t in range(9, 15)]
    with torch.inference_mode():
        rows += [dec.step(sequence[:, t]) for t in range(15, 20)]
    rows += [dec.step(sequence[:, t]) for t in range(20, 30)]
    assert not any(row.requires_grad for row in rows)
    assert [row.is_inference() for row in rows] == 6 * [False] + 5 * [True] + 10 * [False]
    assert gap(torch.stack([r.clone() for r in rows], 1), model(sequence)[:, 9:]) < 1e-10


def test_tensors_that_moved_are_found():
    model, sequence = language_model(LAYER, width=4, l_max=MOST), ids(1, 20)
    dec = native_decoder(model)
    dec.prefill(sequence[:, :9])
    for t in range(9, 20):
        for name in ("row", "position", "local"):
            lanes(dec)[0].tensors[name].data = lanes(dec)[0].tensors[name].data.clone()
        gc.collect()
        position = lanes(dec)[0].tensors["position"]
        assert gap(dec.step(sequence[:, t]), model(sequence[:, : t + 1])[:, -1]) < 1e-10
        assert int(position) == t + 1


def test_tensors_of_another_form_are_refused():
    dec = native_decoder(language_model(LAYER, width=4, l_max=MOST))
    dec.step(ids(1, 1)[:, 0])
    lanes(dec)[0].tensors["position"].data = torch.ones(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="another shape"):
        dec.step(ids(1, 1)[:, 0])
    with pytest.raises(DecoderBroken):
        dec.step(ids(1, 1)[:, 0])


def test_changed_weights_stop_a_step():
    model, sequence = language_model(LAYER, width=4, l_max=MOST), ids(1, 12)
    dec = native_decoder(model)
    dec.prefill(sequence[:, :9])
    model.head.weight.mul_(2)
    with pytest.raises(WeightsChanged):
        dec.step(sequence[:, 9])
    dec.refresh()
    assert gap(dec.step(sequence[:, 9]), model(sequence[:, :10])[:, -1]) < 1e-10


def test_decoders_in_threads():
    model, sequence = language_model(*3 * [LAYER], width=4, l_max=MOST), ids(1, 50)
    first = native_decoder(model)
    first.prefill(sequence[:, :7])
    decoders, found = [first, first.fork(), first.fork()], {}
    for dec in decoders:
        dec.step(sequence[:, 7])

    def work(i):
        with torch.no_grad():
            found[i] = torch.stack([decoders[i].step(sequence[:, t]) for t in range(8, 50)], 1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(gap(found[i], model(sequence)[:, 8:]) < 1e-10 for i in range(3))


def test_a_decoder_kept_by_its_model_is_freed_with_it():
    model = language_model(LAYER, width=4, l_max=MOST)
    dec = native_decoder(model)
    dec.step(ids(1, 1)[:, 0])
    model.__dict__["own_decoder"] = dec
    gone = weakref.ref(model)
    del model, dec
    gc.collect()
    assert gone() is None


# Building


@pytest.fixture
def fresh(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("FLASHINF_CACHE_DIR", str(tmp_path))
    extension._found.clear()
    yield tmp_path
    extension._found.clear()


def test_without_a_compiler_there_is_none(fresh, monkeypatch, caplog):
    def missing(folder):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(extension, "_built", missing)
    with caplog.at_level("INFO"):
        assert extension.between() is None
    assert "no compiler" in caplog.text


def test_one_that_reads_tensors_wrongly_is_not_used(fresh, monkeypatch):
    monkeypatch.setattr(extension, "_works", lambda module: False)
    assert extension.between() is None


def test_it_is_kept_and_built_anew_where_it_was_damaged(fresh, monkeypatch):
    assert extension.between() is not None
    (library,) = (fresh / "extension").glob("*.so")
    built = []
    build = extension._built
    monkeypatch.setattr(extension, "_built", lambda folder: built.append(1) or build(folder))
    extension._found.clear()
    assert extension.between() is not None
    assert not built
    library.unlink()  # a process that has loaded it keeps its own
    library.write_bytes(b"damaged")
    extension._found.clear()
    assert extension.between() is not None
    assert built


def test_a_directory_that_cannot_be_written_is_no_obstacle(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("FLASHINF_CACHE_DIR", str(fresh / "file" / "below"))
    assert extension.between() is not None


def test_reading_the_machine_and_torch_is_part_of_its_name(fresh, monkeypatch):
    assert extension.between() is not None
    monkeypatch.setattr(extension, "machine", lambda: ("another",))
    extension._found.clear()
    assert extension.between() is not None
    assert len(OrderedDict.fromkeys((kept.cache_directory() / "extension").glob("*.so"))) == 2
