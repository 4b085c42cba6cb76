"""The curves of a run as pictures, one file a plot."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .results import Results

INSTALLED = find_spec("matplotlib") is not None


@dataclass(frozen=True)
class Plot:
    """Its title and axes; both are logarithmic."""

    title: str
    x: str
    y: str


PLOTS = {
    "mixing": Plot("Mixing alone, all positions", "positions L", "seconds"),
    "tiles": Plot("Tiles alone", "positions L", "ns per token and channel"),
    "crossover": Plot("Recurrences against tiles", "positions L", "µs a token"),
    "end_to_end": Plot("A token at a position, end to end", "position", "µs a token"),
    "latency": Plot("Steps slower than", "share of all steps", "µs"),
}


def draw(results: Results) -> list[Path]:
    """Write a PNG for each plot that has curves; none where matplotlib is not installed (extra `bench`)."""
    if not INSTALLED:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    for name, plot in PLOTS.items():
        curves = {label: points for s in results.sections for label, points in s.curves.get(name, {}).items()}
        if not curves:
            continue
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for label, (x, y) in curves.items():
            axes.plot(x, y, marker="." if len(x) < 50 else "", label=label)
        axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        path = results.folder / f"{name}.png"
        FigureCanvasAgg(figure).print_png(str(path))
        paths.append(path)
    return paths
