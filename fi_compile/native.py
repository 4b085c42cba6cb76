"""native: a part of the step as a native library, by AOTInductor, kept on disk for later processes.

Weights and state are its inputs, so one library serves every layer that is like it, and any weights. What
calls it is C++ alone: a call costs a few microseconds where a compiled function of TorchInductor costs ten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .errors import FlashinfWarning
from .layers import tensor_form

INDUCTOR: dict[str, Any] = {
    "realize_opcount_threshold": 0,  # else a norm is recomputed for every row of the product that follows
    "cpp.enable_floating_point_contract_flag": "fast",
    "size_asserts": False,
    "reorder_for_locality": False,  # it moves writes before reads, and what is written is then copied whole
}

Native = Callable[[list[Any]], Sequence[Tensor]]


def compile_native(part: fx.GraphModule, example: Sequence[Tensor]) -> Native:
    """A part's graph as a function of a list of tensors, from the cache where it is known.

    ``example``: tensors of the shapes, strides and dtypes that the part will be called with. Raises whatever
    AOTInductor raises where it cannot compile the part, or where there is no compiler.
    """
    place = cache_directory() / "steps" / _key(part)
    try:
        library = _known(place)
        if library is not None:
            return _load(library)
    except Exception as error:
        warnings.warn(
            f"the compiled step in {place} is not usable ({error}); compiled anew",
            FlashinfWarning,
            stacklevel=2,
        )
    return _load(_keep(Path(_compile(part, example)), place))


def cache_directory() -> Path:
    """Where compiled steps are kept: ``FLASHINF_CACHE_DIR``, else ``flashinf`` in the user's cache directory."""
    chosen = os.environ.get("FLASHINF_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "flashinf"


def _compile(part: fx.GraphModule, example: Sequence[Tensor]) -> str:
    from torch._inductor import aot_compile, config

    with config.patch(INDUCTOR), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own insides
        return str(aot_compile(part, tuple(example)))


def _load(library: Path) -> Native:
    loader: Any = torch._C
    return loader._aoti.AOTIModelContainerRunnerCpu(str(library), 1).run


def _known(place: Path) -> Path | None:
    """The library kept at a place, if there is one; raises where it is not what was written there."""
    note, library = place.with_suffix(".json"), place.with_suffix(".so")
    if not note.exists():
        return None
    if json.loads(note.read_text())["sha256"] != _digest(library):
        raise ValueError("its contents changed")
    return library


def _keep(library: Path, place: Path) -> Path:
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


def _key(part: fx.GraphModule) -> str:
    """All that the library depends on: the graph with its shapes and strides, torch, the machine, the options."""
    forms = [(node.name, str(node.target), tensor_form(node)) for node in part.graph.nodes]
    made_by = torch.__version__, version("flashinf"), sorted(INDUCTOR.items()), torch.get_num_threads()
    return hashlib.sha256(repr((part.code, forms, made_by, _machine())).encode()).hexdigest()


@cache
def _machine() -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return platform.platform(), platform.machine(), torch.backends.cpu.get_cpu_capability(), flags
