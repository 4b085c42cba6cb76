"""kept: libraries on disk, for later processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch


def cache_directory() -> Path:
    """Where compiled steps are kept: ``FLASHINF_CACHE_DIR``, else ``flashinf`` in the user's cache directory."""
    chosen = os.environ.get("FLASHINF_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "flashinf"


def known(place: Path) -> Path | None:
    """The library kept at a place, if there is one; raises where it is not what was written there."""
    note, library = place.with_suffix(".json"), place.with_suffix(".so")
    if not note.exists():
        return None
    if json.loads(note.read_text())["sha256"] != _digest(library):
        raise ValueError("its contents changed")
    return library


def keep(library: Path, place: Path) -> Path:
    """Keep a library for later processes; a directory that cannot be written is no error."""
    kept = place.with_suffix(".so")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        note = json.dumps({"sha256": _digest(library), "torch": torch.__version__})
        with tempfile.TemporaryDirectory(dir=place.parent) as fresh:  # what appears at the place is whole
            shutil.copyfile(library, Path(fresh, "so"))
            Path(fresh, "json").write_text(note)
            with contextlib.suppress(FileNotFoundError):
                place.with_suffix(".json").unlink()
            Path(fresh, "so").replace(kept)
            Path(fresh, "json").replace(place.with_suffix(".json"))
    except OSError:
        return library
    return kept


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def machine() -> tuple[str, ...]:
    """What of this machine a compiled library depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return platform.platform(), platform.machine(), torch.backends.cpu.get_cpu_capability(), flags
