"""Turn an engine into the report a person reads."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import fx

from .derive import Derived
from .lane import Lane
from .mixers.increments import weights_of
from .program import source_of
from .report import MixerReport, Report, Snapshot
from .text import graph_text
from .units import ALL, Unit

if TYPE_CHECKING:
    from .engine import Engine

_COSTS = {
    "tiles": "C·(K/2 + O(log² L)) multiply-adds",
    "kv_cache": "one row against all rows so far",
    "history": "all rows so far, recomputed",
}


def describe(engine: Engine) -> Report:
    """The report on an engine: mixers, schedule, certificate, state, and a snapshot per pass."""
    derived = engine.derived(engine.rows)
    start = time.perf_counter()
    graph = engine.step_graph().graph_module.graph
    spent = 1e3 * (time.perf_counter() - start)
    looking_back = [unit for unit in engine.plan.units if _looks_back(engine, unit)]
    split = Snapshot("split", spent, len(engine.plan.units), graph_text(graph), engine.decode, graph)
    return Report(
        verdict=engine.verdict,
        mixers=tuple(_mixer(engine, unit) for unit in looking_back),
        snapshots=(*engine.snapshots, split),
        schedule=derived.bank.schedule(0) if derived.bank is not None else None,
        tiling=derived.tiling if derived.bank is not None else None,
        precision=_precision(engine) if derived.bank is not None else None,
        bytes_of_mixing=derived.bank.predict_bytes() if derived.bank is not None else {},
        certificate=tuple(engine.proof.steps),
        state_bytes=Lane(derived, engine.rows).state_bytes // engine.rows,
        capacity=engine.capacity,
        notes=(
            *_given_up(derived),
            *(f"{s.node!r}: {s.condition}" for s in engine.proof.steps if s.rule == "numerically bounded"),
            *(
                f"{unit.exit.name!r} recomputes all rows every step: "
                + engine.settled.declined.get(unit.exit.name, "no better increment is known for it")
                for unit in engine.plan.regions
            ),
        ),
    )


def _precision(engine: Engine) -> str | None:
    matrix = engine.kernels == "triton" and engine.dtype != torch.float64
    return engine.options.precision if matrix else None


def _given_up(derived: Derived) -> tuple[str, ...]:
    """What is said of a state that keeps no history."""
    if derived.bank is None or not derived.bank.halved:
        return ()
    half = derived.bank.capacity
    return (f"inputs of long convolutions are given up at position {half}, where the schedule begins anew",)


def _looks_back(engine: Engine, unit: Unit) -> bool:
    return unit.mixer is not None or any(
        ALL in demand and node in engine.plan.histories for node, demand in unit.reads.items()
    )


def _mixer(engine: Engine, unit: Unit) -> MixerReport:
    name, source, mixer = module_path(unit.exit), source_of(unit.exit), unit.mixer
    if mixer is None:
        kind, lowering = ("region", "history") if unit.is_region else ("attention", "kv_cache")
        return MixerReport(
            name, kind, source, None, None, (), "proved causal at every length", lowering, _COSTS[lowering]
        )
    derived = engine.derived(engine.rows)
    window = derived.step.windows.get(mixer.name)
    return MixerReport(
        name,
        mixer.kind,
        source,
        mixer.layout_out.count,
        None if mixer.kind == "scan" else mixer.support,
        mixer.depends_on,
        engine.settled.verdicts[mixer.name],
        mixer.lowering,
        (_COSTS["tiles"].replace("L", "M") if mixer.ends else _COSTS["tiles"])
        if window is None
        else window.cost(weights_of(window, mixer.name, derived.constants)),
    )


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward made a node, or the node's own name at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values())) if entry[0]), "")
    return path or node.name
