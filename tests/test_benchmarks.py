"""Benchmarks measure what they say: every peer is right, a wrong one is stopped, what is written is what was found."""

import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks import child, end_to_end, gate, latency, measure, mixing, models, plots  # noqa: E402
from benchmarks.decoding import Steps, decode  # noqa: E402
from benchmarks.filters import history, hyena_like  # noqa: E402
from benchmarks.peers import flashinf as flashinf_peer  # noqa: E402
from benchmarks.peers import gpt  # noqa: E402
from benchmarks.peers.base import Piece, quadrature, spread  # noqa: E402
from benchmarks.peers.blocked_lazy import BlockedLazy  # noqa: E402
from benchmarks.peers.eager import Eager  # noqa: E402
from benchmarks.peers.flashinf import Flashinf  # noqa: E402
from benchmarks.peers.futurefill import FutureFill, PartitionedFutureFill  # noqa: E402
from benchmarks.peers.lazy import Lazy  # noqa: E402
from benchmarks.peers.lazy_decoder import BLOCK, make_lazy  # noqa: E402
from benchmarks.peers.naive import with_known_filters  # noqa: E402
from benchmarks.peers.published import Published  # noqa: E402
from benchmarks.peers.recurrence import Recurrence, approximation_error, fit, modal_filter  # noqa: E402
from benchmarks.results import Results, Section, Target  # noqa: E402
from benchmarks.setup import Bench, Sizes  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_gradients")

CHANNELS = 3
EXACT = [Lazy, BlockedLazy, Eager, Published, FutureFill, PartitionedFutureFill]
TINY = Sizes(
    channels=8,
    lengths=(256,),
    tile_lengths=(128, 256),
    width=8,
    layers=1,
    decoded=(128,),
    small_width=8,
    small_length=96,
    growing=40,
    prefill=64,
    latency=128,
    batch=2,
    batch_length=64,
    orders=(4, 16),
    crossover=(64, 128),
    crossover_channels=4,
    repeats=2,
    options={"step": "eager"},
)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch):
    """No compiler where it is not the subject."""
    monkeypatch.setattr(gpt, "compiled", lambda function, *example: function)
    monkeypatch.setattr(flashinf_peer, "bound", lambda function, *tensors: lambda: function(*tensors))
    monkeypatch.setattr(mixing, "read_bandwidth", lambda: measure.read_bandwidth(1 << 16))


def problem(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return hyena_like(CHANNELS, length), history(CHANNELS, length)


def made(kind: type, filters: torch.Tensor, past: torch.Tensor):
    return kind(filters, past, 32) if issubclass(kind, FutureFill) else kind(filters, past)


# -- peers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [64, 128, 512])
@pytest.mark.parametrize("kind", EXACT, ids=lambda k: k.__name__)
def test_peer_is_exact_and_reads_no_future(kind: type, length: int):
    filters, inputs = problem(length)
    peer = made(kind, filters, torch.full_like(inputs, float("nan")))
    assert gate.check_push(peer, inputs) <= gate.BOUND


@pytest.mark.parametrize("kind", EXACT, ids=lambda k: k.__name__)
def test_pieces_are_exact_and_all_of_the_work(kind: type):
    length = 512
    filters, inputs = problem(length)
    pieces = made(kind, filters, inputs.clone()).pieces()
    assert sum(p.count * p.pairs for p in pieces) == pytest.approx(length * (length + 1) / 2, rel=0.01)
    assert gate.check_pieces(pieces, filters, inputs) <= gate.BOUND


@pytest.mark.parametrize("length", [96, 256])
def test_flashinf_peer_is_exact(length: int):
    filters, inputs = problem(length)
    peer = Flashinf(filters)
    for _ in range(2):
        assert gate.check_push(peer, inputs) <= gate.BOUND
        peer.restart()


def test_published_schedule_begins_anew():
    filters, inputs = problem(256)
    peer = Published(filters, torch.full_like(inputs, float("nan")))
    for _ in range(2):
        assert gate.check_push(peer, inputs) <= gate.BOUND
        peer.restart()


def test_recurrence_is_that_of_its_filter_and_finds_filters_of_its_order():
    peer = Recurrence.random(CHANNELS, 8)
    peer.filters = modal_filter(*peer.given, 300)
    assert gate.check_push(peer, history(CHANNELS, 300)) <= 8 * gate.BOUND

    t = torch.arange(999, dtype=torch.float64)
    decays = torch.tensor([[50.0], [9.0]], dtype=torch.float64)
    tail = (torch.exp(-t / decays) * torch.cos(torch.tensor([[0.3], [1.1]]) * t)).sum(0)
    kernel = torch.cat([torch.ones(1, dtype=torch.float64), tail])
    poles, _ = fit(kernel, 4)
    assert sorted(poles.abs().tolist()) == pytest.approx(sorted(torch.exp(-1 / decays).flatten().tolist()))
    assert approximation_error(kernel, 4) < 1e-8
    assert 1e-3 < approximation_error(kernel, 2) < 1


def test_quadrature_sums_what_is_linear():
    for length in (1, 2, 63, 500):
        found = quadrature(spread(length))
        assert sum(w for _, w in found) == pytest.approx(length)
        assert sum(w * (3 * t + 5) for t, w in found) == pytest.approx(sum(3 * t + 5 for t in range(length)))


# -- decoders ----------------------------------------------------------------------------------------------


def tiny_model():
    return models.hyena(TINY.width, TINY.layers, 128)


def test_lazy_decoder_is_the_model_and_a_wrong_one_is_not():
    model, ids = tiny_model(), models.random_ids(1, 70)
    decoder = models.decoder_for(model, 96, block=BLOCK, step="eager")
    for wrong in (False, True):
        decoder.reset()
        state = make_lazy(decoder)
        if wrong:
            state.reversed = state.reversed.roll(1, -1)
        error, bound, _ = models.check_logits(model, decode(decoder.step, ids).logits)
        assert (error > bound) is wrong


def test_naive_loop_with_known_filters_is_the_model():
    model, ids = tiny_model(), models.random_ids(1, 50)
    assert torch.equal(with_known_filters(model)(ids), model(ids))


@pytest.mark.parametrize("compile_step", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gpt_decodes_what_it_computes(compile_step: bool):
    model = gpt.GPT(models.VOCAB, 16, 2, 40).eval()
    decoder = gpt.GPTDecoder(model, compile_step=compile_step)
    found = torch.stack([decoder.step(token) for token in models.random_ids(1, 40).T])
    error, bound, _ = models.check_logits(model, found[None])
    assert error <= bound


# -- the gate ----------------------------------------------------------------------------------------------


class OffByOne(Lazy):
    """Reads every filter a lag late."""

    def output(self, t: int) -> torch.Tensor:
        return super().output(t - 1) if t else super().output(t)


class LosesATile(Published):
    """Skips one of its tiles."""

    def large_tile(self, end: int, side: int) -> None:
        if end != 192:
            super().large_tile(end, side)


class Forgets(Published):
    """Says that its largest tile runs half as often as it does."""

    def pieces(self) -> list[Piece]:
        *rest, last = super().pieces()
        return [*rest, Piece(last.what, last.count / 2, last.inputs, last.outputs, last.run, last.adds_to)]


def test_gate_sees_what_is_wrong():
    filters, inputs = problem(256)
    assert gate.check_push(OffByOne(filters, inputs.clone()), inputs) > 100 * gate.BOUND
    assert gate.check_push(LosesATile(filters, inputs.clone()), inputs) > 100 * gate.BOUND
    assert gate.check_pieces(OffByOne(filters, inputs.clone()).pieces(), filters, inputs) > 100 * gate.BOUND
    assert gate.check_pieces(Forgets(filters, inputs.clone()).pieces(), filters, inputs) == float("inf")
    inputs[0, 7] = float("nan")
    assert gate.check_push(Lazy(filters, inputs.clone()), inputs) == float("inf")


def test_figures_need_every_check_they_rest_on():
    section = Section("s")
    section.figure("too early", 1, "s", "a")
    assert section.check("a", 1, 2, "x")
    assert not section.check("b", float("nan"), 2, "x")
    section.figure("of a", 1, "s", "a")
    section.figure("of both", 1, "×", ("a", "b"))
    section.figure("of nothing", 1, "s", ())
    section.curve("mixing", "b", [1], [1], "b")
    assert [f.name for f in section.figures] == ["of a"]
    assert section.withheld == ["too early", "of both", "of nothing"]
    assert not section.curves
    section.check("a", 3, 2, "a second check, which fails")
    section.check("a", 0, 2, "a third, which passes")
    assert not section.passed("a")


@pytest.mark.usefixtures("uncompiled")
def test_a_wrong_peer_gets_no_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(mixing, "Lazy", OffByOne)
    monkeypatch.setitem(cli.SIZES, "quick", TINY)
    assert cli.main(["--quick", "--only", "mixing", "--threads", "1", "--out", str(tmp_path)]) == 1
    (section,) = json.loads((tmp_path / "results.json").read_text())["sections"]
    shown = {f["name"] for f in section["figures"]}
    assert {"L=256 lazy", "L=256 lazy / flashinf"} <= set(section["withheld"])
    assert not any(name.startswith("L=256 lazy") for name in shown)
    assert {"L=256 eager", "L=256 eager / flashinf"} <= shown
    assert "lazy" not in section["curves"]["mixing"]


# -- what is written ---------------------------------------------------------------------------------------


def test_table_json_and_plots(tmp_path: Path):
    good, bad, broken = Section("good"), Section("bad"), Section("broken", error="trace\nValueError: no")
    good.check("a", 0.5, 1, "truth")
    good.figure("speed", 2.5, "×", "a", Target("≥", 2), "a note")
    good.figure("slow", 2.5, "s", "a", Target("≤", 2))
    good.curve("tiles", "flashinf", [1, 10], [1, 2], "a")
    bad.check("b", 2, 1, "truth")
    bad.figure("other speed", 1, "×", "b")
    found = Results(tmp_path / "out", {"cpu": "this one"}, "quick", [good, bad, broken])
    assert not found.sound
    read = json.loads(found.write().read_text())
    assert read["machine"] == {"cpu": "this one"}
    assert read["sections"][0]["figures"][0]["value"] == 2.5
    assert read["sections"][1]["figures"] == []
    console = Console(width=200, record=True, file=io.StringIO())
    found.print(console)
    lines = {line.split("│")[2].strip(): line for line in console.export_text().splitlines() if "│" in line}
    assert "2.5 ×" in lines["speed"]
    assert "yes" in lines["speed"]
    assert "NO" in lines["slow"]
    assert "withheld" in lines["other speed"]
    assert "WRONG" in lines["b"]
    assert "ValueError: no" in lines[""]
    pytest.importorskip("matplotlib")
    (picture,) = plots.draw(found)
    assert picture.name == "tiles.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "name", ["mixing", "tiles", "crossover", "end_to_end", "small", "batch", "growing", "prefill", "latency"]
)
def test_measurement_at_tiny_sizes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(end_to_end, "CHECKED", 40)
    monkeypatch.setattr(end_to_end.striped_hyena, "measure", lambda bench: None)
    found = Results(tmp_path, {}, "quick")
    cli.measure(found, [name], TINY, "quick", quiet=True)
    (section,) = found.sections
    assert section.error is None, section.error
    assert found.sound, section
    assert section.figures
    assert all(np.isfinite(f.value) for f in section.figures)
    differences = ("call - step", ": around it", ": tiles")
    assert all(f.value > 0 for f in section.figures if not f.name.endswith(differences))
    assert all(f.target is None for f in section.figures)  # stated for the full sizes only


def test_a_measurement_that_breaks_off_shows_nothing_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def breaks(bench: Bench) -> None:
        bench.section.check("a", 0, 1, "truth")
        bench.section.figure("half of it", 1, "s", "a")
        raise ValueError("no")

    def works(bench: Bench) -> None:
        bench.section.check("a", 0, 1, "truth")
        bench.section.figure("all of it", 1, "s", "a")

    monkeypatch.setattr(cli, "MEASUREMENTS", {"breaks": breaks, "works": works})
    assert cli.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 1
    first, second = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert first["figures"] == []
    assert "ValueError: no" in first["error"]
    assert [f["name"] for f in second["figures"]] == ["all of it"]


# -- small parts -------------------------------------------------------------------------------------------


def test_steps_are_summed_up_by_position():
    found = Steps(np.arange(1.0, 129.0), torch.zeros(1, 128, 1))
    ends, means = found.by_position()
    widths = np.diff([0, *ends])
    assert float((widths * means).sum()) == pytest.approx(found.seconds.sum())
    assert not set(found.without_block_ends(32)) & {32.0, 64.0, 96.0, 128.0}
    assert len(found.without_block_ends(32)) == 124


def test_work_is_counted_where_tiles_run():
    from fi_compile.schedule import Schedule

    work = latency.work_by_step(Schedule(32, 256), 32, channels=3)
    assert len(work) == 256
    assert int(work.argmax()) == 127
    assert set(np.flatnonzero(work > work.min()) + 1) == set(range(32, 256, 32))


def test_repeated_runs_are_counted():
    runs = []
    times = measure.timed(lambda: runs.append(1) or time.sleep(0.003), repeats=4)
    assert len(times.samples) == 4
    assert times.median > 0.0025
    found = measure.interleaved({"a": lambda: None, "b": lambda: None}, 3)
    assert {name: len(t.samples) for name, t in found.items()} == {"a": 3, "b": 3}


def test_a_job_that_fails_says_so():
    with pytest.raises(RuntimeError, match="no_such_job"):
        child.call("no_such_job")


@pytest.mark.slow
def test_jobs_in_processes_of_their_own():
    found = child.call("compile_time", width=8, layers=1, length=128, threads=1)
    error, bound, _ = found["check"]
    assert error <= bound
    assert found["compilation"] > 0
    found = child.call("memory", width=8, layers=1, length=256, threads=1)
    assert found["check"][0] <= found["check"][1]
    assert 0 < found["before"] <= found["generating"]
    assert found["history"] == 4 * 256 * 8
