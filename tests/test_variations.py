"""Variations nobody prepared for: decoded exactly, or refused for a reason that is written down here."""

import sys
from pathlib import Path

import pytest
import torch

import fi_compile
from decoding import by_speed, decoded, decoder, features, gap
from variations import VARIATIONS, WIDTH

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from zoo.backbone import awaken
from zoo.measure import mixers_of

LENGTH = 70

# What is found in each, in float64. A model whose mixers get better increments turns its line red.
FOUND = {
    "EinopsHyena": "2 long_conv → tiles",
    "ModuleAttention": "2 attention → kv_cache",
    "Parametrized": "6 short_conv → window",
    "CachedFilter": "2 long_conv → tiles",
    "InPlace": "2 long_conv → tiles",
    "RunningMax": "2 scan → running_max, 2 scan → running_sum",
    "LearnedState": "2 long_conv → tiles",
    "Interpolated": "2 long_conv → tiles",
    "ComplexLRU": "2 long_conv → tiles",
    "MinGRU": "2 scan → running_logsumexp, 2 scan → running_sum",
    "GatedLinearAttention": "2 linear_attention → recurrence, 2 scan → running_sum",
    "Autocast": "2 scan → running_sum",
    "Float32Islands": "2 short_conv → window",
    "GLUs": "2 short_conv → window",
    "TokenShifts": "8 short_conv → window",
    "RolledMask": "2 short_conv → window",
    "RelativeBias": "4 attention → kv_cache",
    "StridedMemory": "2 scan → running_sum",
    "EncoderStack": "2 attention → kv_cache",
    "DeltaRule": "2 linear_attention → recurrence, 2 region → history",
    "FlashStyleMask": "4 attention → kv_cache",  # -10000, and norms that bound the scores
    "ChunkedLinear": "2 region → history",
    "ChunkedBranch": "2 region → history",
    "SelectiveSSM": "2 attention → kv_cache, 2 region → history, 2 short_conv → window",
}
# The kind of the first refusal. A fix turns its line red.
REFUSED = {
    "PackedSlopes": "merged",  # heads merged into the batch meet an expanded mask; and -1e9 is no -inf
    "MaxPool": "static_length",  # torch.export pins the length in max_pool1d
}
# Sound to float32 only: they compute in a lower precision inside, whatever their type is.
ROUGH = {"Float32Islands"}


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return awaken(VARIATIONS[name]()).double().eval()


def test_every_variation_is_listed():
    assert FOUND.keys() | REFUSED.keys() == VARIATIONS.keys()
    assert not FOUND.keys() & REFUSED.keys()


# Quick ones, of different families; the others are slow.
QUICK = {
    "EinopsHyena",
    "Parametrized",
    "CachedFilter",
    "InPlace",
    "ComplexLRU",
    "GLUs",
    "MaxPool",
    "RolledMask",
}


@pytest.mark.parametrize("name", by_speed(FOUND, QUICK.__contains__))
def test_variations_decode_exactly(name):
    model, x = build(name), features(2, LENGTH, WIDTH)
    expected = model(x)
    for n in (1, 2, 33):
        assert gap(model(x[:, :n]), expected[:, :n]) <= (1e-5 if name in ROUGH else 1e-10)
    dec = decoder(model, x[:, :9], max_length=LENGTH + 10)
    assert mixers_of(dec.report) == FOUND[name]
    for prompt in (1, 7):
        error = gap(decoded(dec, x, prompt), expected[:, prompt - 1 :])
        assert error <= (1e-5 if name in ROUGH else 1e-10)


@pytest.mark.parametrize("name", by_speed(REFUSED, QUICK.__contains__))
def test_variations_that_are_refused(name):
    with pytest.raises(fi_compile.Unsupported) as refused:
        decoder(build(name), features(2, 9, WIDTH), max_length=LENGTH + 10)
    assert refused.value.refusals[0].kind == REFUSED[name]
