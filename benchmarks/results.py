"""What a run found: checks, and figures that are withheld where the checks they rest on did not pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Check:
    """A comparison of something measured with the truth: `error` must not exceed `bound`."""

    error: float
    bound: float
    against: str

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Target:
    """What is wanted of a figure: at least, or at most, a value."""

    relation: str  # ≥ or ≤
    value: float

    def met(self, value: float) -> bool:
        """Whether a value satisfies it."""
        return value >= self.value if self.relation == "≥" else value <= self.value

    def __str__(self) -> str:
        return f"{self.relation} {_number(self.value)}"


@dataclass(frozen=True)
class Figure:
    """One number; `of` names the checks it rests on."""

    name: str
    value: float
    unit: str
    of: tuple[str, ...]
    target: Target | None = None
    note: str = ""


@dataclass
class Section:
    """The figures of one measurement, in a process and a run of its own."""

    name: str
    checks: dict[str, Check] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = field(default_factory=dict)
    withheld: list[str] = field(default_factory=list)
    error: str | None = None

    def check(self, subject: str, error: float, bound: float, against: str) -> bool:
        """Note how far `subject` is from the truth; of several checks the worst counts. Returns whether it passed."""
        new, old = Check(error, bound, against), self.checks.get(subject)
        if old is None or (
            old.passed and not (new.passed and new.error / new.bound <= old.error / old.bound)
        ):
            self.checks[subject] = new
        return new.passed

    def passed(self, *subjects: str) -> bool:
        """Whether all of them were checked and found right."""
        return all(s in self.checks and self.checks[s].passed for s in subjects)

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        of: str | Sequence[str],
        target: Target | None = None,
        note: str = "",
    ) -> None:
        """Keep a figure, or withhold it where something it rests on was not checked or did not pass."""
        of = (of,) if isinstance(of, str) else tuple(of)
        if not of or not self.passed(*of):
            self.withheld.append(name)
        else:
            self.figures.append(Figure(name, float(value), unit, of, target, note))

    def curve(
        self, plot: str, label: str, x: Sequence[float], y: Sequence[float], of: str | Sequence[str]
    ) -> None:
        """Keep points of a plot (`plots.PLOTS` names them), under the same condition."""
        of = (of,) if isinstance(of, str) else tuple(of)
        if self.passed(*of):
            self.curves.setdefault(plot, {})[label] = list(x), list(y)

    @property
    def sound(self) -> bool:
        """Whether nothing failed in it."""
        return self.error is None and not self.withheld and all(c.passed for c in self.checks.values())


@dataclass
class Results:
    """All sections of a run and the machine's record; written to `folder` after each section."""

    folder: Path
    machine: dict[str, Any]
    mode: str
    sections: list[Section] = field(default_factory=list)

    def write(self) -> Path:
        """Write `results.json`, replacing what an earlier section wrote."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, partial = self.folder / "results.json", self.folder / "results.json.partial"
        content = {"mode": self.mode, "machine": self.machine, "sections": [asdict(s) for s in self.sections]}
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str))
        return partial.replace(path)

    def table(self) -> Table:
        """All figures; what was withheld, and why."""
        table = Table(title="flashinf benchmarks", title_justify="left")
        for column in ("measurement", "figure"):
            table.add_column(column)
        for column in ("value", "target"):
            table.add_column(column, justify="right")
        table.add_column("met")
        table.add_column("note", style="dim")
        for section in self.sections:
            for figure in section.figures:
                target = figure.target
                met = "" if target is None else ("yes" if target.met(figure.value) else "NO")
                table.add_row(
                    section.name,
                    figure.name,
                    f"{_number(figure.value)} {figure.unit}".strip(),
                    "" if target is None else str(target),
                    met,
                    figure.note,
                )
            for name in section.withheld:
                table.add_row(section.name, name, "withheld", "", "", "a check it rests on did not pass")
            for subject, check in section.checks.items():
                if not check.passed:
                    why = f"error {check.error:.3g}, allowed {check.bound:.3g}, against {check.against}"
                    table.add_row(section.name, subject, "WRONG", "", "", why)
            if section.error:
                table.add_row(section.name, "", "FAILED", "", "", section.error.splitlines()[-1])
            table.add_section()
        return table

    def print(self, console: Console) -> None:
        """The machine, the table, and how far the checks were from their bounds."""
        console.print(", ".join(f"{k} {v}" for k, v in self.machine.items()))
        console.print(self.table())
        checks = [c for s in self.sections for c in s.checks.values()]
        passed = sum(c.passed for c in checks)
        console.print(
            f"correctness: {passed} of {len(checks)} checks passed before their figures were printed"
        )

    @property
    def sound(self) -> bool:
        """Whether every section ran and every check passed."""
        return all(s.sound for s in self.sections)


def _number(value: float) -> str:
    if value == 0 or 1e-2 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.2e}"
