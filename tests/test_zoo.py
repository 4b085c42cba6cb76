"""Published architectures and unprepared variations: what is found in them, and that decoding is exact."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fi_compile
from decoding import by_speed, convolution_scale, decoded, decoder, gap

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from zoo import ZOO, Entry  # noqa: E402
from zoo.measure import Row, logits_of, measure, mixers_of, read_table, rewritten, table, twin  # noqa: E402
from zoo.package import INSTALLED  # noqa: E402

LENGTH, TOLERANCE, ROUNDING = 140, 1e-10, 3.0
PACKAGE = "StripedHyena, the package"

# Models that are refused, and the first reason given. A fix turns its line red and must be noted here and in
# docs/zoo.md.
REFUSED = {
    "RTF, grid of the length": "length_dependent",  # its filter differs between lengths: rightly refused
    "Mixture of experts, capacity": "mixes_rows",  # rows compete for places: rightly refused
}
WRITTEN = read_table((ROOT / "docs" / "zoo.md").read_text())
DECODED = [name for name in WRITTEN if name not in REFUSED and (name != PACKAGE or INSTALLED)]
# Quick ones, of different families; the others are slow.
QUICK = {"Hyena, order 3", "S4D", "Llama", "Based"}


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


def step_by_step(dec: fi_compile.Decoder, x: Tensor, prompt: int) -> Tensor:
    return logits_of(decoded(dec, x, prompt))


def forgets(entry: Entry, model: torch.nn.Module) -> float:
    """How little the logits of the second half move when the first five positions are replaced."""
    x, other = (entry.sequence(2, 40, torch.float64, seed) for seed in (1, 2))
    y = torch.cat([other[:, :5], x[:, 5:]], 1)
    x, y = (v if entry.double or not v.is_floating_point() else v.float() for v in (x, y))
    return 1 / max(gap(logits_of(model(y))[:, 5:20], logits_of(model(x))[:, 5:20]), 1e-30)


@pytest.mark.parametrize("name", DECODED)
def test_every_mixer_of_the_zoo_remembers(name):
    entry = ZOO[name]
    model = entry.model(torch.float64 if entry.double else torch.float32)
    assert forgets(entry, model) < 1e3


@pytest.mark.parametrize("name", by_speed(DECODED, QUICK.__contains__))
def test_architectures_decode_exactly(name):
    entry = ZOO[name]
    model = entry.model()
    dec = decoder(model, entry.sequence(2, 9), max_length=LENGTH + 50)
    assert (name, mixers_of(dec.report), dec.report.verdict) == WRITTEN[name]

    x = entry.sequence(2, LENGTH)
    double_model = copy.deepcopy(model).double()
    double_x = x.double() if entry.features else x
    truth = logits_of(double_model(double_x))
    own = float((logits_of(model(x)) - truth).abs().max())
    unit = max(own, torch.finfo(torch.float32).eps * convolution_scale(dec, x))
    for prompt in (1, 7):
        found = step_by_step(dec, x, prompt)
        assert found.dtype == torch.float32
        assert float((found - truth[:, prompt - 1 :]).abs().max()) <= ROUNDING * unit
    if entry.double:
        exact = decoder(double_model, double_x[:, :9], max_length=LENGTH + 50)
        for prompt in (1, 7):
            assert gap(step_by_step(exact, double_x, prompt), truth[:, prompt - 1 :]) <= TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_give_their_reason(name):
    entry = ZOO[name]
    with pytest.raises(fi_compile.Unsupported) as refused:
        decoder(entry.model(), entry.sequence(2, 9), max_length=LENGTH)
    assert refused.value.refusals[0].kind == REFUSED[name]
    assert WRITTEN[name][2].startswith(f"refused: {REFUSED[name]}")


def test_rows_that_compete_are_refused_with_their_line():
    report = fi_compile.explain(
        ZOO["Mixture of experts, capacity"].model(), ZOO["Mixture of experts, capacity"].sequence(3, 9)
    )
    assert "other rows" in report.refusals[0].reason
    assert "transformers.py" in str(report.refusals[0].source)


def test_the_document_names_every_architecture():
    assert list(WRITTEN) == list(ZOO)


def test_a_table_is_read_as_it_was_written():
    rows = [Row("A", "1 long_conv → tiles", "proved", 1e-15, 0.4), Row("B", "", "refused: lengths")]
    assert read_table(table(rows)) == {row.name: row.found for row in rows}


def test_single_rows_are_written_again():
    rows = [Row("A", "1 long_conv → tiles", "proved", 1e-15, 0.4), Row("B", "", "refused: lengths")]
    new = Row("B", "1 scan → running_sum", "proved", 2e-15, 0.5)
    assert rewritten(table(rows), [new]) == table([rows[0], new])


@pytest.mark.parametrize("name", ["S4D", "Mixture of experts, capacity"])
def test_measuring_gives_the_written_row(name):
    row = measure(name)
    assert row.found == WRITTEN[name]
    assert (row.double or 0) <= TOLERANCE
    assert (row.single or 0) <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Hyena, order 2", "Mega", "Toeplitz network"])
def test_transparent_mode(name):
    entry = ZOO[name]
    model, x = entry.model(torch.float64), entry.sequence(2, 60, torch.float64)
    fast = torch.compile(
        model, backend="flashinf", dynamic=True, options={"step": "eager", "fallback": "eager"}
    )
    with torch.inference_mode():
        for n in (20, 21, 22, 23, 40, 41, 60):
            assert gap(logits_of(fast(x[:, :n])), logits_of(model(x[:, :n]))) <= TOLERANCE
    report = fi_compile.last_report()
    assert report is not None
    assert mixers_of(report) == WRITTEN[name][1]
    torch.compiler.reset()


needs_package = pytest.mark.skipif(not INSTALLED, reason="the package stripedhyena is not installed")


def own_decode(model: torch.nn.Module, x: Tensor, prompt: int) -> Tensor:
    """The package's cached decoding: logits at positions prompt - 1 … L - 1."""
    caches = model.initialize_inference_params()
    out, _ = model(x[:, :prompt], inference_params_dict=caches)
    rows = [out[:, -1]]
    for t in range(prompt, x.shape[1]):
        for cache in caches.values():
            cache.seqlen_offset += 1
        out, _ = model(x[:, t : t + 1], inference_params_dict=caches)
        rows.append(out[:, -1])
    return torch.stack(rows, 1)


@needs_package
@pytest.mark.parametrize("ran_before", [False, True])
def test_the_package_decodes_like_its_forward_and_its_own_cache(ran_before):
    entry = ZOO[PACKAGE]
    x = entry.sequence(2, 100)
    model = entry.model()
    if ran_before:
        model(x)  # keeps a table of positions on the module
    dec = decoder(model, x[:, :9], max_length=100)
    truth = twin(dec, x)[:, 6:]  # the package computes its filters in float32, whatever its type
    unit = (entry.model()(x)[0][:, 6:] - truth).abs().max()
    assert [m.lowering for m in dec.report.mixers] == 3 * ["window", "recurrence"]
    for found in (step_by_step(dec, x, 7), own_decode(model, x, 7)):
        assert (found - truth).abs().max() <= ROUNDING * unit
