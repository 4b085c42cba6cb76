"""Random models: sound ones are decoded exactly, ones with a single flaw are refused.

The examples are the same in every run. For others: `FI_RANDOM=1 pytest tests/test_random_models.py
--hypothesis-seed=N`, with `-m slow` for five hundred.
"""

import os
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn

import fi_compile
from corpus import OTHERS, SPELLINGS, Architecture, architectures
from decoding import decoded, decoder, gap
from fi_compile import CapacityError, Unsupported

LENGTH, MOST, PROMPT, TOLERANCE = 90, 96, 5, 1e-10

# Mixers that are refused by themselves (tests/test_exactness.py says why) are no part of a decodable model.
BEYOND = {
    "fft_real_arithmetic",
    "direct_toeplitz_index_select",
    "spectrum_buffer",
    # torch's symbolic arithmetic needs half a minute for each of these
    "attention_linear_chunked",
    "fft_n_power_of_two",
}
SOUND = architectures(
    spellings=[name for name in SPELLINGS if name not in BEYOND],
    others=[name for name in OTHERS if name not in BEYOND],
)
BROKEN = architectures(
    broken=True,
    spellings=[name for name in SPELLINGS if name not in BEYOND],
    others=[name for name in OTHERS if name not in BEYOND],
)


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def every(strategy, count: int, check: Callable[[Architecture], None]) -> None:
    """Run a check on `count` random models."""
    settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize="FI_RANDOM" not in os.environ,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(check))()


def taken(architecture: Architecture) -> tuple[nn.Module, Tensor, fi_compile.Decoder | None, str]:
    """A model in double precision, a sequence, and its decoder or the reason there is none."""
    model = architecture.build().double().eval()
    sequence = architecture.example(2, LENGTH)
    assume(bool(model(sequence).isfinite().all()))  # a quotient of 0 by 0 says nothing
    try:
        return model, sequence, decoder(model, sequence[:, :9], max_length=MOST, block=8), ""
    except (Unsupported, CapacityError) as refused:
        return model, sequence, None, str(refused).splitlines()[0]


def decode_sound(count: int) -> None:
    refused: list[str] = []
    lowerings: Counter[str] = Counter()
    seen = 0

    def check(architecture: Architecture) -> None:
        nonlocal seen
        seen += 1
        model, sequence, dec, reason = taken(architecture)
        if dec is None:
            refused.append(f"{architecture}: {reason}")
            return
        lowerings.update(mixer.lowering for mixer in dec.report.mixers)
        found = decoded(dec, sequence, PROMPT)
        assert gap(found, model(sequence)[:, PROMPT - 1 :]) < TOLERANCE, architecture

    every(SOUND, count, check)
    print(f"{seen} sound models, {len(refused)} refused needlessly, {dict(lowerings)}", *refused, sep="\n")
    assert len(refused) <= 0.05 * seen, "\n".join(refused)
    # Every kind of increment was met: the rate is not one of trivial models.
    assert lowerings["tiles"] > seen / 2
    assert lowerings["window"]


def refuse_broken(count: int) -> None:
    accepted: list[str] = []
    kinds: Counter[str] = Counter()

    def check(architecture: Architecture) -> None:
        _, _, dec, reason = taken(architecture)
        kinds[reason.partition(":")[0]] += 1
        if dec is not None:
            accepted.append(str(architecture))

    every(BROKEN, count, check)
    print(f"{kinds.total()} broken models, {len(accepted)} accepted; refused as {dict(kinds)}")
    assert not accepted, "\n".join(accepted)
    # Refused for what is wrong with them, not for running into something else.
    assert kinds["non_causal"] + kinds["length_dependent"] > kinds.total() / 2


def test_sound_models_are_decoded_exactly():
    decode_sound(16)


def test_broken_models_are_refused():
    refuse_broken(8)


@pytest.mark.slow
def test_many_sound_models_are_decoded_exactly():
    decode_sound(300)


@pytest.mark.slow
def test_many_broken_models_are_refused():
    refuse_broken(200)
