"""Which form of a tile is fastest on a GPU, measured there once and kept in the user's cache directory.

`python -m benchmarks.gpu` measures. A table says for an architecture, a precision, a number of channels, a batch and a
side how many seconds each form takes; what it does not say is left to the datasheet's rates (`gpu.Rates`). Times belong
to the versions of torch and Triton that they were measured with: a table of others counts as empty.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

FORMAT = 3

# Architecture, precision of products on matrix units, channels of all layers together, rows of the batch, side of a
# tile, blocks of inputs that it meets: one, or two where spectra are kept, of which the newest block's are made by the
# tile itself.
Key = tuple[str, str, int, int, int, int]
NAMES = ("architecture", "precision")
SIZES = ("channels", "batch", "side", "blocks")


def cache_path() -> Path:
    """Where the table lies: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fi_compile" / "tiles.json"


def architecture(device: torch.device) -> str:
    """The name of a device's architecture, `sm_90`, `gfx942`; `interpreted` for what is no GPU."""
    if device.type != "cuda":
        return "interpreted"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@dataclass(frozen=True)
class Table:
    """Seconds of a tile by key and form."""

    tiles: Mapping[Key, Mapping[str, float]] = field(default_factory=dict)

    def fastest(self, key: Key, forms: Collection[str]) -> str | None:
        """The fastest of the forms; None unless every one of them was measured for this key."""
        seconds = self.tiles.get(key, {})
        if not forms or not set(forms) <= set(seconds):
            return None
        return min(forms, key=seconds.__getitem__)


def load(path: Path | None = None) -> Table:
    """The table at a path; empty where there is none, or one of other versions.

    Raises ValueError, which says what was found, where the file is not such a table.
    """
    path = path or cache_path()
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return Table()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no table of tiles: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise ValueError(f"{path} is no table of tiles: it names no format")
    if found["format"] != FORMAT or found.get("versions") != _versions():
        return Table()
    try:
        return Table(dict(_entry(entry) for entry in found["tiles"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of tiles: {error!r} in an entry") from None


def save(tiles: Mapping[Key, Mapping[str, float]], path: Path | None = None) -> Path:
    """Add entries to the table at a path, or begin one where there is none that can be read; returns the path."""
    path = path or cache_path()
    try:
        known = dict(load(path).tiles)
    except ValueError:
        known = {}
    entries = [
        dict(zip((*NAMES, *SIZES), key, strict=True), seconds=dict(seconds))
        for key, seconds in sorted({**known, **tiles}.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may read at any time.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump({"format": FORMAT, "versions": _versions(), "tiles": entries}, file, indent=1)
    os.replace(file.name, path)
    return path


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": triton.__version__}


def _entry(entry: Any) -> tuple[Key, dict[str, float]]:
    names = tuple(entry[x] for x in NAMES)
    sizes = tuple(entry[x] for x in SIZES)
    seconds = {str(form): float(s) for form, s in entry["seconds"].items()}
    if not all(isinstance(name, str) for name in names) or not all(
        isinstance(n, int) and n > 0 for n in sizes
    ):
        raise ValueError(f"{names} with {sizes}")
    if not all(math.isfinite(s) and s > 0 for s in seconds.values()):
        raise ValueError(f"seconds {seconds}")
    return (*names, *sizes), seconds
