"""What was found in a model and how it runs, as values a person can print and a program can read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from .costs import Tiling
from .errors import Refusal
from .schedule import Schedule


@dataclass(frozen=True)
class MixerReport:
    """One value of the model that looks back along the sequence, and its increment.

    ``name``: module path. ``kind``: ``long_conv``, ``short_conv``, ``scan``, ``attention``, ``region``… ``source``:
    the user's ``file:line``. ``channels``: output channels. ``filter_length``: lags of the filter, None where there is
    none. ``depends_on``: parameters the filter is computed from. ``proof``: the verdict. ``lowering``: ``tiles``,
    ``window``, ``running_sum``, ``history``… ``cost``: work per token, as a formula in L and C.
    """

    name: str
    kind: str
    source: str | None
    channels: int | None
    filter_length: int | None
    depends_on: tuple[str, ...]
    proof: str
    lowering: str
    cost: str

    def __str__(self) -> str:
        size = [f"{self.channels} channels"] if self.channels else []
        if self.filter_length:
            size.append(f"{self.filter_length} lags")
        lines = [f"{self.name}: {self.kind} → {self.lowering} ({', '.join(size) or 'whole value'})"]
        if self.source:
            lines.append(f"  source:     {self.source}")
        if self.depends_on:
            lines.append(f"  depends on: {', '.join(self.depends_on)}")
        lines.append(f"  proof:      {self.proof}")
        lines.append(f"  cost:       {self.cost}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Snapshot:
    """A program after one pass: readable ``text``, its ``graph``, and ``run``.

    ``run(sequence)`` computes the model's outputs with it; the ``split`` snapshot, which is a step graph, runs once
    per position.
    """

    name: str
    milliseconds: float
    rewrites: int
    text: str = field(repr=False)
    run: Callable[[Tensor], Any] = field(repr=False)
    graph: fx.Graph | None = field(repr=False)

    def __str__(self) -> str:
        return f"# {self.name}: {self.rewrites} rewrites, {self.milliseconds:.1f} ms\n{self.text}"


@dataclass(frozen=True)
class Report:
    """Everything known about one compilation; ``print(report)`` shows it.

    ``tiling``: what was chosen for the long convolutions and the seconds a token it is predicted to take.
    ``bytes_of_mixing``: what they keep for one sequence at the capacity, and of their filters, by what it is.
    ``precision``: of products on matrix units, None where there are none.
    """

    verdict: str  # proved, numerically bounded or refused
    mixers: tuple[MixerReport, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    schedule: Schedule | None = None
    tiling: Tiling | None = None
    precision: str | None = None
    bytes_of_mixing: Mapping[str, int] = field(default_factory=dict)
    certificate: tuple[Any, ...] = field(default=(), repr=False)
    state_bytes: int = 0
    capacity: int = 0
    notes: tuple[str, ...] = ()

    def detached(self) -> Report:
        """The same without what its snapshots hold of the model."""
        return replace(
            self, snapshots=tuple(replace(s, run=_model_is_gone, graph=None) for s in self.snapshots)
        )

    def __str__(self) -> str:
        parts = [f"flashinf: {self.verdict}"]
        if self.refusals:
            parts.append("refusals\n" + _indent("\n".join(str(r) for r in self.refusals)))
        if self.mixers:
            parts.append("mixers\n" + _indent("\n".join(str(m) for m in self.mixers)))
        if self.schedule is not None:
            parts.append(
                "schedule\n"
                + _indent(f"{self.schedule}\ncost: {self.schedule.cost()} (L positions, C channels)")
                + _indent(f"\nchosen: {self.tiling}")
                + (_indent(f"\nprecision: {self.precision} on matrix units") if self.precision else "")
                + _indent("\nbytes: " + ", ".join(f"{n:,} {of}" for of, n in self.bytes_of_mixing.items()))
            )
        if self.capacity:
            parts.append(f"state: {self.state_bytes:,} bytes a sequence at {self.capacity:,} positions")
        if self.snapshots:
            lines = [f"{s.name}: {s.rewrites} rewrites, {s.milliseconds:.1f} ms" for s in self.snapshots]
            parts.append("passes\n" + _indent("\n".join(lines)))
        parts.extend(f"note: {note}" for note in self.notes)
        return "\n\n".join(parts)


def _model_is_gone(sequence: Tensor) -> Any:
    raise RuntimeError("the model this snapshot was taken of is gone")


def _indent(text: str) -> str:
    return "\n".join(line and "  " + line for line in text.splitlines())


# -- the newest report -------------------------------------------------------------------------------------

_newest: tuple[Report | None, weakref.ref[Any] | None] = (None, None)


def last_report() -> Report | None:
    """The report of the newest ``torch.compile(..., backend="flashinf")``, or None.

    Its snapshots can be run as long as the model lives.
    """
    report, owner = _newest[0], _newest[1]() if _newest[1] is not None else None
    return owner.report if owner is not None else report


def note_report(report: Report, owner: Any = None) -> None:
    """Make this the newest report; ``owner``, as long as it lives, has one whose snapshots can be run."""
    global _newest
    _newest = report.detached(), None if owner is None else weakref.ref(owner)


def refused_text(refusals: Sequence[Refusal]) -> str:
    """What a warning says about refusals."""
    reasons = "\n".join(str(refusal) for refusal in refusals)
    return f"flashinf runs this model as given, every position each time, because\n{reasons}"
