"""The corpus is what it says: sound modules keep their prefixes, traps do not, and every filter matters."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn
from torch._dynamo.exc import UserError

from corpus import (
    DEPENDS,
    DETOURS,
    FALSE_ALARMS,
    LAST_ONLY,
    MAY_REFUSE,
    OTHERS,
    SEES,
    SPELLINGS,
    TRAPS,
    UNTRACEABLE,
    Architecture,
    LanguageModel,
    architectures,
    break_filters,
    logits_of,
    scale_weights,
)
from corpus.convolutions import direct
from corpus.false_alarms import Lonely
from corpus.random_models import FLAWED_MIXERS
from corpus.spellings import Conv
from corpus.traps import DATA_TRAPS

WIDTH, L_MAX = 6, 200
PAIRS = ((1, 2), (2, 5), (7, 23), (41, 63), (5, 130), (64, 129), (129, 130))
SOUND = {
    **SPELLINGS,
    **OTHERS,
    **FALSE_ALARMS,
    **{name: factory for name, (factory, _) in UNTRACEABLE.items()},
}
NO_SHRINK = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True)
def quiet():
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def make(factory, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return scale_weights(factory(WIDTH, L_MAX), seed).double()


def features(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 130, WIDTH, generator=generator, dtype=torch.float64)


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    scale = max(a.abs().max().item(), b.abs().max().item())
    return (a - b).abs().max().item() / scale if scale else 0.0


def inconsistency(model: nn.Module, x: Tensor, pairs=PAIRS) -> float:
    """The worst gap between `V_s(x)[:r]` and `V_r(x[:r])`."""
    out = {n: logits_of(model(x[:, :n])) for n in {n for pair in pairs for n in pair}}
    return max(gap(out[s][:, :r], out[r]) for r, s in pairs)


def foresight(model: nn.Module, x: Tensor, lengths=(72, 90, 130), seen: int = 65) -> float:
    """How far outputs before `seen` move when the input from there on is replaced, at fixed lengths."""
    other = torch.cat([x[:, :seen], features(1)[:, seen:]], 1)
    return max(gap(model(x[:, :s])[:, :seen], model(other[:, :s])[:, :seen]) for s in lengths)


@pytest.mark.parametrize("name", SOUND)
def test_sound_modules_keep_their_prefixes(name):
    assert inconsistency(make(SOUND[name]), features()) < 1e-10


@pytest.mark.parametrize("name", TRAPS)
def test_traps_break_for_the_reason_given(name):
    factory, reason = TRAPS[name]
    model = make(factory)
    assert inconsistency(model, features()) > 1e-6
    assert reason.startswith((SEES, DEPENDS))
    if reason.startswith(SEES):
        assert foresight(model, features()) > 1e-6
    else:
        assert foresight(model, features()) < 1e-12


@pytest.mark.parametrize("name", [n for n in TRAPS if "40" in n or "70" in n])
def test_thresholds_are_silent_on_short_samples(name):
    short = ((1, 2), (7, 12), (18, 23), (12, 39))
    assert inconsistency(make(TRAPS[name][0]), features(), short) < 1e-12


@pytest.mark.parametrize("name", [*SPELLINGS, *UNTRACEABLE])
def test_filters_matter_and_remember(name):
    model, x = make(SOUND[name]), features()
    before = model(x)
    nudged = x.clone()
    nudged[:, 0] += 1
    assert gap(model(nudged)[:, 1:], before[:, 1:]) > 1e-2
    assert 0.05 < before.std() < 10
    assert break_filters(model) > 0
    assert (model(x) - before).norm() > 1e-2 * before.norm()


LONG = [
    n for n in SPELLINGS if n.startswith(("fft_", "direct_", "filter_", "hyena", "gated", "series", "outer"))
]


@pytest.mark.parametrize("name", LONG)
def test_long_filters_reach_far(name):
    model, x = make(SPELLINGS[name]), features()
    nudged = x.clone()
    nudged[:, 0] += 1
    assert gap(model(nudged)[:, 40:], model(x)[:, 40:]) > 1e-3


PLAIN = [name for name in SOUND if type(SOUND[name](WIDTH, L_MAX)) is Conv]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_convolutions_equal_the_definition(name):
    model, x = make(SOUND[name]), features()[:, :63]
    assert isinstance(model, Conv)
    expected = direct(x.mT, model.filter(63)).mT
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DETOURS)
def test_detours_are_sound_to_float32_only(name):
    model = make(DETOURS[name])
    assert model(features()).dtype == torch.float64
    assert inconsistency(model, features()) < 1e-5
    assert inconsistency(model.float(), features().float()) < 1e-5
    assert gap(model.float()(features().float()).double(), model.double()(features())) < 1e-5


@pytest.mark.parametrize("name", {**SOUND, **TRAPS})
def test_float32_in_float32_out(name):
    factory = SOUND[name] if name in SOUND else TRAPS[name][0]
    model = scale_weights(factory(WIDTH, L_MAX), 0)
    y = model(features()[:, :37].float())
    assert y.dtype == torch.float32
    assert y.shape == (2, 37, WIDTH)
    assert y.isfinite().all()


BY_LOGARITHM = ("n_bit_length", "n_log2")  # torch by itself pins their length


def export(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    dynamic = torch.export.Dim.DYNAMIC
    return torch.export.export(model, (x,), dynamic_shapes=({0: dynamic, 1: dynamic},), strict=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("name", [n for n in SPELLINGS if n not in BY_LOGARITHM])
def test_spellings_trace_with_a_free_length(name):
    model, x = make(SPELLINGS[name]), features()
    program = export(model, x[:, :37])
    for s in (33, 61, 120):
        torch.testing.assert_close(program.module()(x[:, :s]), model(x[:, :s]), rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNTRACEABLE)
def test_untraceable_spellings_do_not(name):
    model, x = make(UNTRACEABLE[name][0]), features()
    with pytest.raises((UserError, AssertionError)):
        export(model, x[:, :37]).module()(x[:, :61])


@pytest.mark.parametrize("name", LAST_ONLY)
def test_last_only_is_the_last_of_every_position(name):
    model, x = make(LAST_ONLY[name]), features()
    assert isinstance(model, Lonely)
    for s in (1, 2, 77):
        expected = model.every_position(x)[:, s - 1]
        torch.testing.assert_close(model(x[:, :s]).reshape(2, WIDTH), expected)


@pytest.mark.parametrize("output", ["tensor", "tuple", "dict", "dataclass", "hidden"])
def test_output_structures_hold_the_same_logits(output):
    def build(output):
        torch.manual_seed(0)
        mixers = [SPELLINGS["hyena_2"](8, 64), OTHERS["attention_sdpa"](8, 64)]
        return scale_weights(LanguageModel(mixers, 8, 13, tied=True, output=output), 0)

    ids = torch.randint(13, (2, 19))
    torch.testing.assert_close(logits_of(build(output)(ids)), build("tensor")(ids))
    assert isinstance(build(output)(ids), Tensor) == (output == "tensor")


def test_redrawing_is_repeatable_and_complete():
    mixers = [SPELLINGS[n](8, 64) for n in ("hyena_3", "filter_complex_modes")]
    model = LanguageModel(mixers, 8, 13, norm="rms", positions="learned", gating=True)
    before = {n: p.detach().clone() for n, p in scale_weights(model, 1).named_parameters()}
    scale_weights(model, 2)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    scale_weights(model, 1)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_names_are_unique():
    groups = (SPELLINGS, OTHERS, FALSE_ALARMS, UNTRACEABLE, TRAPS)
    assert sum(map(len, groups)) == len({name for group in groups for name in group})
    assert set(FALSE_ALARMS) >= MAY_REFUSE


RANDOM_PAIRS = ((1, 2), (7, 12), (23, 41), (41, 63), (7, 96), (63, 96), (95, 96))


def random_inconsistency(architecture: Architecture) -> float:
    model = architecture.build().double()
    return inconsistency(model, architecture.example(2, 96), RANDOM_PAIRS)


@NO_SHRINK
@given(architectures())
def test_random_models_keep_their_prefixes(architecture):
    assert random_inconsistency(architecture) < 1e-10


@NO_SHRINK
@given(architectures(broken=True))
def test_broken_random_models_do_not(architecture):
    assert random_inconsistency(architecture) > 1e-9


def test_descriptions_print_and_build_the_same_again():
    architecture = Architecture(("spectrum_buffer", "attention_alibi"), 8, tied=True, seed=3)
    again = eval(repr(architecture))
    ids = architecture.example(2, 20)
    first = architecture.build()(ids)
    torch.manual_seed(1)
    assert torch.equal(first, again.build()(ids))
    assert torch.initial_seed() == 1
    assert all(name in TRAPS for name in FLAWED_MIXERS)
    assert all(f"data_{name}" in TRAPS for name in DATA_TRAPS)
