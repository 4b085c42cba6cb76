"""The results of `benchmarks.gpu` as plots: seconds of a sequence by its length, a line for each scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = {"mixers": "all mixers", "end_to_end": "whole model"}


def curves(found: Mapping[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    """Positions and seconds of each scheme of one setting; `found` may come from JSON, whose keys are strings."""
    lines = {}
    for scheme, value in found.items():
        if isinstance(value, Mapping) and value.get("seconds"):
            points = sorted((int(n), float(s)) for n, s in value["seconds"].items())
            label = f"{scheme} (composed)" if value.get("composed") else scheme
            lines[label] = ([n for n, _ in points], [s for _, s in points])
    return lines


def plot(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write one picture for mixers and one for whole models; none, with a word about it, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (it is in the extra `bench`)")
        return []
    matplotlib.use("Agg")
    return [_draw(kind, results, folder) for kind in KINDS if _panels(results.get(kind, ()))]


def _panels(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [setting for setting in found if curves(setting)]


def _draw(kind: str, results: Mapping[str, Any], folder: Path) -> Path:
    from matplotlib import pyplot

    panels = _panels(results[kind])
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, found in zip(axes.flat, panels, strict=False):
        s = found["setting"]
        for label, (positions, seconds) in curves(found).items():
            axis.loglog(positions, seconds, marker="o", markersize=3, label=label)
        axis.set_title(f"M={s['layers']} D={s['width']} B={s['batch']}", fontsize=9)
        axis.set_xlabel("positions")
        axis.set_ylabel("seconds")
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(f"{KINDS[kind]}: {results['device']}, torch {results['torch']}", fontsize=10)
    figure.tight_layout()
    path = folder / f"{kind}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
