"""A decoder computes what the model's full forward computes: every model of the corpus, at every position."""

import pytest
import torch

import fi_compile
from corpus import FALSE_ALARMS, LAST_ONLY, OTHERS, SPELLINGS, TRAPS, scale_weights
from corpus.false_alarms import Lonely
from decoding import by_speed, decoded, decoder, features, gap, module, one_in, rounding, stacked
from fi_compile.doors import doors_of

WIDTH, LENGTH = 6, 130
SOUND = {**SPELLINGS, **OTHERS, **FALSE_ALARMS}
TOLERANCE = 1e-10

# Sound models that are refused all the same. This list may shrink; a new entry is a regression.
REFUSED = {
    "fft_real_arithmetic": "complex products spelled in real and imaginary parts",
    "direct_toeplitz_index_select": "the length appears as a value in a table of indices",
    "zero_times_future": "a mean over all positions, times zero",
}

# The trace pins a comparison with the length: exact, but not up to any length.
SHORTER = {"fft_n_power_of_two": 128, "hyena_2": 129, "hyena_3": 129}


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def length_of(name: str) -> int:
    return SHORTER.get(name, LENGTH)


# Symbolic arithmetic that takes torch half a minute, with `-m slow`.
SLOW = {"fft_n_power_of_two", "attention_linear_chunked"}


def is_quick(name: str) -> bool:
    return name not in SLOW


@pytest.mark.parametrize("name", by_speed((n for n in SOUND if n not in REFUSED), is_quick))
def test_decoding_equals_the_full_forward(name):
    length = length_of(name)
    model, x = module(SOUND[name], WIDTH, LENGTH).double(), features(2, length, WIDTH)
    dec = decoder(model, x[:, :9], max_length=length)
    expected = model(x)
    # Of causal models alone: outputs at every position agree with runs of that length.
    for n in (1, 2, 31, 32, 33, 100):
        assert gap(model(x[:, :n]), expected[:, :n]) < TOLERANCE
    for prompt in (1, 7):
        assert gap(decoded(dec, x, prompt), expected[:, prompt - 1 :]) < TOLERANCE
    for prompt in (2, 31, 32, 33, length):
        assert gap(dec.prefill(x[:, :prompt]), expected[:, prompt - 1]) < TOLERANCE


@pytest.mark.parametrize("name", by_speed(REFUSED, is_quick))
def test_what_is_refused_needlessly(name):
    with pytest.raises((fi_compile.Unsupported, fi_compile.CapacityError)):
        decoder(module(SOUND[name], WIDTH, LENGTH), features(2, 9, WIDTH).float(), max_length=LENGTH)


@pytest.mark.parametrize("name", LAST_ONLY)
def test_models_that_return_one_position(name):
    model, x = module(LAST_ONLY[name], WIDTH, LENGTH).double(), features(2, 100, WIDTH)
    assert isinstance(model, Lonely)
    dec = decoder(model, x[:, :9], max_length=LENGTH)
    for prompt in (1, 7):
        rows = [dec.prefill(x[:, :prompt])] + [dec.step(x[:, t]) for t in range(prompt, 100)]
        assert rows[0].shape == model(x[:, :prompt]).shape
        found = stacked([row.reshape(2, WIDTH) for row in rows])
        assert gap(found, model.every_position(x)[:, prompt - 1 :]) < TOLERANCE


@pytest.mark.parametrize("name", one_in(2, [n for n in SPELLINGS if n not in (*REFUSED, *SLOW)]))
def test_float32_stays_within_rounding(name):
    length = length_of(name)
    model, x = module(SPELLINGS[name], WIDTH, LENGTH), features(2, length, WIDTH).float()
    dec = decoder(model, x[:, :9], max_length=length)
    assert rounding(dec, model, module(SPELLINGS[name], WIDTH, LENGTH).double(), x, 1) <= 3


# One of each kind of filter, transform, and shape of the data path; the others with `-m slow`.
LONG = (
    "fft_scale_on_filter",
    "fft_n_taps_plus_length_minus_1",
    "fft_conj_of_reversed",
    "fft_channel_last_dim_1",
    "filter_implicit_mlp_decay",
    "filter_complex_modes",
    "filter_rational_fixed_length",
    "filter_per_head",
    "finite_fft",
    "short_conv1d_dilated",
    "outer_product_heads",
    "filter_bank",
    "series_gated",
    "hyena_3",
)


SHORTER_THAN_LONG = {"fft_n_power_of_two"}
EVERY_SPELLING = by_speed(
    (n for n in SPELLINGS if n not in REFUSED and n not in SHORTER_THAN_LONG), LONG.__contains__
)


@pytest.mark.parametrize("name", EVERY_SPELLING)
def test_long_sequences(name):
    width, length = 4, 2049
    model, x = module(SPELLINGS[name], width, 2060).double(), features(1, length, width)
    dec = decoder(model, x[:, :9], max_length=length)
    expected = model(x)
    assert gap(decoded(dec, x, 1), expected) < TOLERANCE
    assert gap(decoded(dec, x[:, :1100], 1000), expected[:, 999:1100]) < TOLERANCE
    assert gap(decoded(dec, x[:, :500], 7), expected[:, 6:500]) < TOLERANCE
    assert gap(dec.extend(x[:, 500:]), expected[:, 500:]) < TOLERANCE


@pytest.mark.parametrize("name", EVERY_SPELLING)
def test_the_transparent_mode(name):
    torch._dynamo.reset()
    model, x = module(SPELLINGS[name], 4, 520).double(), features(2, 510, 4)
    expected = model(x)
    options = {"step": "eager", "fallback": "eager", "max_length": 512}
    fast = torch.compile(model, backend="flashinf", dynamic=True, options=options)
    with torch.inference_mode():
        for n in (7, 8, 9, 31, 32, 33, 34, 100, 500, 501):
            found = fast(x[:, :n].clone())
            assert gap(found, expected[:, :n]) < TOLERANCE
    if name == "n_bit_length":  # Dynamo asks Python for the number: each length is a graph of its own
        return
    assert fi_compile.last_report().verdict != "refused"
    held = [doors_of([w]) for w in (*model.parameters(), *model.buffers())]
    (door,) = [door for doors in held for door in doors.values()]
    assert [s.decoder.position.tolist() for s in door.sessions] == [[501, 501]]


@pytest.mark.parametrize("name", ["fft_scale_on_filter", "filter_real_modes", "hyena_2"])
def test_long_sequences_in_float32(name):
    width, length = 4, 2049
    model, x = module(SPELLINGS[name], width, 2060), features(1, length, width).float()
    dec = decoder(model, x[:, :9], max_length=length)
    double = module(SPELLINGS[name], width, 2060).double()
    assert rounding(dec, model, double, x, 1) <= 3
    assert rounding(dec, model, double, x, 1000) <= 3


# Here torch itself cuts the filter to the transform's length beyond that; a longer capacity is another error.
GUARDED = {"conv_kernel_l_max": 64, "conv_kernel_2L": 65}


@pytest.mark.parametrize("name", one_in(2, list(TRAPS)))
def test_traps_are_refused_with_a_reason(name):
    factory, _ = TRAPS[name]
    model = scale_weights(factory(WIDTH, LENGTH), 0).eval()
    with pytest.raises(fi_compile.Unsupported) as caught:
        decoder(model, features(2, 9, WIDTH).float(), max_length=GUARDED.get(name, 128))
    first = caught.value.refusals[0]
    assert first.kind.isidentifier()
    assert len(first.reason) > 20
    assert first.hint
    assert first.kind in ("trace", "static_length") or (first.nodes and first.source)
    assert first.reason in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.bool, torch.float64),
        (torch.int64, torch.float64),
    ],
)
def test_sums_in_a_type_of_their_own(given, kept):
    """A prompt's, too."""

    class Sums(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 3).to(given).cumsum(1, dtype=kept)

    net, x = Sums(), features(2, 20, 4)
    dec = decoder(net, x[:, :9], max_length=30)
    found = [dec.prefill(x[:, :12]), dec.step(x[:, 12]), *dec.extend(x[:, 13:]).unbind(1)]
    assert {row.dtype for row in found} == {kept}
    assert gap(torch.stack(found, 1), net(x)[:, 11:]) < (1e-6 if kept == torch.float32 else 1e-12)
