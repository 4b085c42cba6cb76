"""Variations nobody prepared for: decoded exactly, or refused for a reason that is written down here."""

import sys
from pathlib import Path

import pytest
import torch
from variations import VARIATIONS, WIDTH

import fi_compile
from decoding import decoded, decoder, features, gap

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from zoo.backbone import awaken
from zoo.measure import mixers_of

LENGTH = 70

# What is found in each, in float64. A model whose mixers get better increments turns its line red.
FOUND = {}
# The kind of the first refusal. A fix turns its line red.
REFUSED = {}
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


@pytest.mark.parametrize("name", FOUND)
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


@pytest.mark.parametrize("name", REFUSED)
def test_variations_that_are_refused(name):
    with pytest.raises(fi_compile.Unsupported) as refused:
        decoder(build(name), features(2, 9, WIDTH), max_length=LENGTH + 10)
    assert refused.value.refusals[0].kind == REFUSED[name]
