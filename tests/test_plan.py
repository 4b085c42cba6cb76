"""What the passes leave behind, as text: golden files, written anew by `pytest --update-golden`.

A program after trace and after raise, and the plan of a step: which values are made from which rows, and what is
kept. Beside the text, that each snapshot computes the model and that the plan names nothing it does not need.
"""

from pathlib import Path

import pytest
import torch

from decoding import decoder, gap, ids, language_model
from fi_compile.passes.plan_demands import plan_demands
from fi_compile.passes.propose_consistency import propose_consistency, sample_lengths
from fi_compile.program import operator_name
from fi_compile.units import ALL, Plan

GOLDEN = Path(__file__).parent / "golden"
MODELS = {
    "gated": ("gated",),
    "hyena": ("hyena_2",),
    "attention": ("attention_tril_mask",),
    "window_and_sum": ("short_conv1d_3", "cumsum"),
}


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


@pytest.fixture(scope="module", params=MODELS)
def compiled(request):
    with torch.no_grad():
        model = language_model(*MODELS[request.param], width=4, l_max=64, norm="none")
        return request.param, model, decoder(model, ids(2, 9), max_length=60, block=8).engine


def plan_text(plan: Plan) -> str:
    """A plan as text: one line a unit, then what is kept."""
    lines = []
    for unit in plan.units:
        how = unit.mixer.kind if unit.mixer is not None else unit.binding
        operators = " ".join(operator_name(node.target) for node in unit.nodes if node.op == "call_function")
        reads = ", ".join(f"{node.name}[{', '.join(rows)}]" for node, rows in unit.reads.items())
        lines.append(f"%{unit.exit.name}[{', '.join(unit.demand)}] = {how}: {operators} <- {reads}")
    lines.append(f"histories: {', '.join(node.name for node in plan.histories) or 'none'}")
    tables = {node.name: sorted(" ".join(d) for d in kinds) for node, kinds in plan.tables.items()}
    lines += [f"table: {name} {kinds}" for name, kinds in sorted(tables.items())]
    return "\n".join(lines)


def compare(name: str, text: str, update: bool) -> None:
    path = GOLDEN / f"{name}.txt"
    if update:
        path.write_text(text + "\n")
    assert path.exists(), f"no golden text {path.name}: run pytest --update-golden"
    assert text + "\n" == path.read_text(), f"{path.name} differs: if that is meant, pytest --update-golden"


@pytest.mark.parametrize("stage", ["trace", "raise"])
def test_programs(stage, compiled, update_golden):
    name, _, engine = compiled
    (snapshot,) = [s for s in engine.report.snapshots if s.name == stage]
    compare(f"{name}.{stage}", snapshot.text, update_golden)


def test_plans(compiled, update_golden):
    name, _, engine = compiled
    compare(f"{name}.plan", plan_text(engine.plan), update_golden)


def test_every_snapshot_computes_the_model(compiled):
    _, model, engine = compiled
    sequence = ids(2, 50)
    snapshots = engine.report.snapshots
    assert [s.name for s in snapshots] == ["trace", "analyse", "raise", "split"]
    for snapshot in snapshots:
        assert gap(snapshot.run(sequence), model(sequence)) < 1e-12
        assert str(snapshot).startswith(f"# {snapshot.name}: {snapshot.rewrites} rewrites, ")


def test_raise_leaves_one_node_for_each_mixer(compiled):
    _, _, engine = compiled
    (snapshot,) = [s for s in engine.report.snapshots if s.name == "raise"]
    mixers = [unit.mixer for unit in engine.plan.units if unit.mixer is not None]
    semantic = [n for n in snapshot.graph.nodes if "mixer" in n.meta]
    assert [n.name for n in semantic] == [m.name for m in mixers]
    assert [operator_name(n.target) for n in semantic] == [m.reference.__name__ for m in mixers]
    assert snapshot.rewrites == len(mixers)


def test_units_read_only_what_is_there(compiled):
    _, _, engine = compiled
    plan, program = engine.plan, engine.program
    made = {(program.sequence, ("new",))}
    for unit in plan.units:
        for node, demand in unit.reads.items():
            known = node in plan.tables or (node in plan.histories and demand == (ALL,))
            assert known or (node, demand) in made, f"{unit.exit.name} reads {node.name}{demand}"
        made.add((unit.exit, unit.demand))
    read_whole = {n for unit in plan.units for n, demand in unit.reads.items() if demand == (ALL,)}
    assert set(plan.histories) == {n for n in read_whole if n in program.input_dependent}


def test_the_proposal_marks_what_disagrees_with_its_prefixes(compiled):
    name, _, engine = compiled
    analysis = propose_consistency(engine.program, seed=3)
    assert set(engine.program.outputs) <= analysis.consistent
    spectra = [n for n in engine.program.graph.nodes if operator_name(n.target).startswith("fft_")]
    assert bool(spectra) == (name in ("gated", "hyena"))
    assert not analysis.consistent.intersection(spectra)
    lengths = sample_lengths(engine.program)
    assert len(lengths) >= 3
    assert list(lengths) == sorted(set(lengths))


def test_without_an_increment_everything_before_is_kept(compiled):
    """The fallback: no mixer is recognised, and the plan is still complete."""
    _, _, engine = compiled
    plan = plan_demands(
        engine.analysis,
        lambda analysis, unit, x: None,
        engine.proof.row_local,
        lambda unit: engine._certify(unit, engine.capacity, engine.double_values),
    )
    assert all(unit.mixer is None for unit in plan.units)
    assert plan.histories
