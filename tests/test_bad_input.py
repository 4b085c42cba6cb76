"""Bad input is refused with what was found, what was expected and the fix; and nothing is lost by it."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import fi_compile
from corpus import SPELLINGS
from decoding import decoded, decoder, features, gap, ids, language_model, module, stacked
from fi_compile import CapacityError, InputError, Unsupported

TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


@cache
def reader_of_ids():
    model = language_model("fft_scale_on_filter", "short_conv1d_4", width=4, l_max=64)
    return model, decoder(model, ids(2, 9), max_length=60, block=8).engine


@cache
def reader_of_features():
    model = module(SPELLINGS["gated"], 4, 64).double()
    return model, decoder(model, features(2, 9, 4), max_length=60, block=8).engine


def in_mid_sequence(kind: str):
    """A model, its decoder at position 20, and the sequence it will have read at 40."""
    model, engine = reader_of_ids() if kind == "ids" else reader_of_features()
    sequence = ids(2, 40) if kind == "ids" else features(2, 40, 4)
    dec = fi_compile.Decoder(engine, model, 2)
    dec.prefill(sequence[:, :20])
    return model, dec, sequence


X = features(2, 70, 4)
PROMPT = ids(2, 70)
BAD = {
    "a step of a wrong batch": ("ids", lambda d: d.step(ids(3, 1)[:, 0]), r"\[2\], found \[3\]"),
    "a step that is a column": ("ids", lambda d: d.step(ids(2, 1)), r"\[2\], found \[2, 1\]"),
    "a step that is one number": ("ids", lambda d: d.step(torch.tensor(3)), r"\[2\], found \[\]"),
    "a step that is a list": ("ids", lambda d: d.step([3, 4]), "found list"),
    "a step in int32": ("ids", lambda d: d.step(ids(2, 1)[:, 0].int()), "int64 .*found torch.int32"),
    "a step of features for ids": ("ids", lambda d: d.step(X[:, 0]), r"\[2\], found \[2, 4\]"),
    "a step on another device": ("ids", lambda d: d.step(PROMPT[:, 0].to("meta")), "found .* on meta"),
    "a step of an id too large": ("ids", lambda d: d.step(torch.tensor([3, 11])), r"0 … 10, found 11"),
    "a step of a negative id": ("ids", lambda d: d.step(torch.tensor([-1, 3])), r"0 … 10, found -1"),
    "a step of wrong width": ("features", lambda d: d.step(X[:, 0, :3]), r"\[2, 4\], found \[2, 3\]"),
    "a step in float32": ("features", lambda d: d.step(X[:, 0].float()), "float64 .*found torch.float32"),
    "a step of ids for features": ("features", lambda d: d.step(PROMPT[:, 0]), r"\[2, 4\], found \[2\]"),
    "an extension of a wrong batch": ("ids", lambda d: d.extend(ids(1, 4)), "batch of 2, found 1"),
    "an extension by nothing": ("ids", lambda d: d.extend(PROMPT[:, :0]), "empty"),
    "an extension of wrong rank": ("ids", lambda d: d.extend(PROMPT[:, 0]), r"ids \[B, n\], found \[2\]"),
    "a long extension with a wrong id": ("ids", lambda d: d.extend(ids(2, 34) + 1), r"0 … 10, found 11"),
    "an empty prompt": ("ids", lambda d: d.prefill(PROMPT[:, :0]), "empty"),
    "an empty batch": ("ids", lambda d: d.prefill(PROMPT[:0]), "empty"),
    "a prompt that is a list": ("ids", lambda d: d.prefill([[1, 2]]), "found list"),
    "a prompt of wrong rank": ("features", lambda d: d.prefill(X[0]), r"features \[B, n, 4\], found \[70, 4\]"),
    "a prompt of wrong width": ("features", lambda d: d.prefill(X[..., :3]), r"found \[2, 70, 3\]"),
    "a prompt with a wrong id": ("ids", lambda d: d.prefill(PROMPT[:, :20] + 1), r"0 … 10, found 11"),
    "too many lengths": ("ids", lambda d: d.prefill(PROMPT[:, :9], [1, 2, 3]), "expected 2 of 1 … 9"),
    "a length of zero": ("ids", lambda d: d.prefill(PROMPT[:, :9], [0, 2]), "expected 2 of 1 … 9"),
    "a length beyond the prompt": ("ids", lambda d: d.prefill(PROMPT[:, :9], [9, 10]), "expected 2 of 1 … 9"),
    "a rewind forward": ("ids", lambda d: d.rewind(21), "between 0 and"),
    "a negative rewind": ("ids", lambda d: d.rewind(-1), "between 0 and"),
    "rewinds of too many rows": ("ids", lambda d: d.rewind([1, 2, 3]), "between 0 and"),
    "a reorder to nothing": ("ids", lambda d: d.reorder([]), "row numbers 0 … 1"),
    "a reorder to rows that are not there": ("ids", lambda d: d.reorder([0, 2]), "row numbers 0 … 1"),
}  # fmt: skip
TOO_LONG = {
    "a prompt": ("ids", lambda d: d.prefill(PROMPT[:, :61]), "exceed 60"),
    "an extension by steps": ("ids", lambda d: d.extend(PROMPT[:, :41]), "61 positions exceed 60"),
    "an extension by forward": ("features", lambda d: d.extend(X), "90 positions exceed 60"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_and_nothing_is_lost(what):
    kind, call, message = BAD[what]
    refused(kind, call, InputError, message)


@pytest.mark.parametrize("what", TOO_LONG)
def test_too_long_is_refused_and_nothing_is_lost(what):
    kind, call, message = TOO_LONG[what]
    refused(kind, call, CapacityError, message)


def refused(kind, call, error, message) -> None:
    model, dec, sequence = in_mid_sequence(kind)
    before = dec.state_bytes
    with pytest.raises(error, match=message) as caught:
        call(dec)
    assert isinstance(caught.value, fi_compile.FlashinfError)
    assert isinstance(caught.value, ValueError)
    assert (dec.position.tolist(), dec.state_bytes, dec.batch) == ([20, 20], before, 2)
    rows = stacked([dec.step(sequence[:, t]) for t in range(20, 40)])
    assert gap(rows, model(sequence)[:, 20:]) < TOLERANCE


# Capacity


def test_a_step_past_the_most_positions():
    model, dec, sequence = in_mid_sequence("ids")
    longer = torch.cat([sequence, ids(2, 20, seed=3)], 1)
    dec.extend(longer[:, 20:])
    for _ in range(2):
        with pytest.raises(CapacityError, match="61 positions exceed 60"):
            dec.step(longer[:, 0])
    dec.rewind(59)
    assert gap(dec.step(longer[:, 59]), model(longer)[:, 59]) < TOLERANCE


def test_a_step_past_the_capacity_without_growth():
    model = language_model("fft_scale_on_filter", width=4, l_max=64)
    dec = decoder(model, ids(2, 9), capacity=16, growth=False, block=8)
    sequence = ids(2, 16)
    found = decoded(dec, sequence, 3)
    with pytest.raises(CapacityError, match="16 positions is used up and growth is off"):
        dec.step(sequence[:, 0])
    assert gap(found, model(sequence)[:, 2:]) < TOLERANCE
    dec.rewind(15)
    assert gap(dec.step(sequence[:, 15]), model(sequence)[:, 15]) < TOLERANCE


def test_one_full_row_stops_all_and_loses_none():
    model, dec, _ = in_mid_sequence("ids")
    prompt = ids(2, 60)
    dec.prefill(prompt, [7, 60])
    for call in (lambda: dec.step(prompt[:, 0]), lambda: dec.extend(prompt[:, :5])):
        with pytest.raises(CapacityError):
            call()
        assert dec.position.tolist() == [7, 60]
    dec.rewind([7, 50])
    found = dec.extend(prompt[:, 7:17])
    assert gap(found[:1], model(prompt[:1, :17])[:, 7:]) < TOLERANCE
    assert gap(found[1:], model(torch.cat([prompt[1:, :50], prompt[1:, 7:17]], 1))[:, 50:]) < TOLERANCE


@pytest.mark.parametrize("length", [65, 200, 100_000])
def test_max_length_beyond_the_tables(length):
    model = language_model("fft_scale_on_filter", width=4, l_max=64, positions="sinus")
    with pytest.raises(CapacityError, match=f"max_length={length} exceeds 64, the longest"):
        decoder(model, ids(2, 9), max_length=length)


def test_growth_ends_where_the_tables_do():
    model = language_model("fft_scale_on_filter", width=4, l_max=50, positions="sinus")
    dec = decoder(model, ids(2, 9), capacity=16, block=8)
    sequence = ids(2, 50)
    assert gap(decoded(dec, sequence, 3), model(sequence)[:, 2:]) < TOLERANCE
    with pytest.raises(CapacityError, match="51 positions exceed 50"):
        dec.step(sequence[:, 0])
    with pytest.raises(CapacityError, match="exceed 50"):
        dec.prefill(ids(2, 51))
    dec.rewind(49)
    assert gap(dec.step(sequence[:, 49]), model(sequence)[:, 49]) < TOLERANCE


def test_a_filter_that_ends_goes_on_as_zeros():
    # The model itself runs beyond its 24 taps; so does the decoder, across growth.
    model = language_model("fft_scale_on_filter", width=4, l_max=24)
    sequence = ids(2, 100)
    for length in (20, 24, 25, 100):
        dec = decoder(model, sequence[:, :9], max_length=length, block=8)
        assert gap(decoded(dec, sequence[:, :length], 3), model(sequence[:, :length])[:, 2:]) < TOLERANCE
    dec = decoder(model, sequence[:, :9], capacity=16, block=8)
    assert gap(decoded(dec, sequence, 3), model(sequence)[:, 2:]) < TOLERANCE


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blok": 8}, "unknown option 'blok'; did you mean 'block'"),
        ({"capasity": 8}, "did you mean 'capacity'"),
        ({"step": "fast"}, "step='fast': expected one of auto, aot, inductor, eager"),
        ({"block": 0}, "block=0: expected a positive integer"),
        ({"capacity": 2.5}, "capacity=2.5: expected a positive integer"),
        ({"memory_limit": -1}, "memory_limit=-1: expected a positive integer"),
    ],
)
def test_options(options, message):
    model, _ = reader_of_ids()
    for call in (fi_compile.decoder, fi_compile.explain):
        with pytest.raises(InputError, match=message):
            call(model, ids(2, 9), options=options)
    with pytest.raises(InputError, match="max_length=-3"):
        fi_compile.decoder(model, ids(2, 9), max_length=-3)


# Models and examples


@pytest.mark.parametrize(
    ("example", "found"),
    [
        ("ids", "str"),
        (torch.tensor([1, 2]), r"\(2,\)"),
        (torch.zeros(2, 3, 4, 5), r"\(2, 3, 4, 5\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"\(2, 0\)"),
        (torch.zeros(0, 5, dtype=torch.int64), r"\(0, 5\)"),
        (ids(2, 9).to("meta"), "meta"),
    ],
)
def test_examples(example, found):
    model, _ = reader_of_ids()
    with pytest.raises(InputError, match=f"example: .*{found}"):
        fi_compile.decoder(model, example)


@pytest.mark.parametrize("model", [lambda x: x, torch.nn.functional.relu, None, nn.Module])
def test_what_is_no_module(model):
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module, found"):
        fi_compile.decoder(model, ids(2, 9))


class Dropping(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.body, self.drop = module(SPELLINGS["gated"], 4, 64).double(), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.body(x))


def test_dropout_in_training_mode():
    x = features(2, 30, 4)
    with pytest.raises(Unsupported, match=r"'drop' .*training mode") as caught:
        decoder(Dropping(0.1).train(), x, max_length=60)
    assert caught.value.refusals[0].hint == "call model.eval() first"
    for model in (Dropping(0.1).eval(), Dropping(0.0).train()):
        dec = decoder(model, x, max_length=60, block=8)
        assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < TOLERANCE


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(value):
    model = language_model("gated", width=4, l_max=64)
    model.head.weight[3, 2] = value
    with pytest.raises(Unsupported, match=r"'head.weight' has NaN or infinite"):
        decoder(model, ids(2, 9))


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the model's own error")


@pytest.mark.parametrize(
    ("model", "message"), [(Pair(), "missing|required|expects"), (Failing(), "own error")]
)
def test_models_that_cannot_be_traced(model, message):
    with pytest.raises(Unsupported, match=message) as caught:
        decoder(model, features(2, 9, 4))
    assert caught.value.refusals[0].kind == "trace"
    report = fi_compile.explain(model, features(2, 9, 4))
    assert report.verdict == "refused"
    assert report.refusals == caught.value.refusals


class BranchesOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > 0:
            return x + 1
        return x


def test_a_branch_on_data_is_named_by_its_line_and_nothing_is_printed(capfd):
    with pytest.raises(Unsupported) as caught:
        decoder(BranchesOnData(), features(2, 9, 4))
    (refusal,) = caught.value.refusals
    assert refusal.kind == "data_dependent"
    line = BranchesOnData.forward.__code__.co_firstlineno + 1
    assert refusal.source == f"{__file__}:{line}"
    assert capfd.readouterr() == ("", "")


class Branches(nn.Module):
    """Another function below 20 positions: a branch on the length."""

    def __init__(self):
        super().__init__()
        self.body = module(SPELLINGS["gated"], 4, 64).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return 2 * y if x.shape[1] < 20 else y


def test_a_branch_on_the_length_is_never_crossed():
    model, x = Branches(), features(2, 50, 4)
    dec = decoder(model, x[:, :30], max_length=60, block=8)
    for call in (
        lambda: dec.prefill(x[:, :19]),
        lambda: dec.step(x[:, 0]),
        lambda: dec.extend(x[:, :19]),
    ):
        with pytest.raises(InputError, match="below 20 positions"):
            call()
    assert gap(decoded(dec, x, 20), model(x)[:, 19:]) < TOLERANCE
    dec.rewind(7)
    with pytest.raises(InputError, match="below 20 positions"):
        dec.step(x[:, 7])
    assert gap(dec.extend(x[:, 7:25]), model(x[:, :25])[:, 7:]) < TOLERANCE


@pytest.mark.parametrize("draw", [torch.randn_like, torch.bernoulli, lambda x: torch.rand(x.shape[-1])])
def test_random_numbers_are_refused_as_what_they_are(draw):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + draw(x.sigmoid())

    report = fi_compile.explain(Noisy(), torch.randn(2, 9, 3))
    assert [r.kind for r in report.refusals] == ["random"]
