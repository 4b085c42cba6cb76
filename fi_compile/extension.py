"""Code in C++: built once by the compiler that builds the steps, and kept on disk.

The extension ``between.cpp`` does nothing that is not written in Python too: :meth:`Layers.bind`,
:class:`WeightWatch`, :meth:`Decoder.step` and the backend are its callers. Tiles by ``kernels/tile_lanes.cpp`` are
torch's where it cannot be built. Without a compiler everything takes a few times as long, and computes the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .kept import cache_directory, keep, known, machine
from .kernels import tile_lanes
from .kernels.tile import tile_reference

log = logging.getLogger(__name__)

T = TypeVar("T")

_found: list[Any] = []  # the extension, once it was looked for
_found_lanes: list[tile_lanes.Lanes | None] = []  # and the tiles
_lock, _lanes_lock = threading.Lock(), threading.Lock()

_SOURCE = Path(__file__).with_name("between.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")


def between() -> Any | None:
    """The extension, or None where it cannot be built."""
    return _once(_found, _lock, _SOURCE, _built, _loaded)


def places(values: tuple[Any, ...], tensors: tuple[int, ...], numbers: tuple[int, ...] = ()) -> bytes | None:
    """Equal where the values at the places ``tensors`` are the same objects, laid out as they were where they were,
    of the same dtypes, and those at ``numbers`` tensors of the same number, bit by bit.

    None where that cannot be told quickly: no extension is loaded, or a tensor is of another kind.
    """
    extension = _found[0] if _found else None
    try:
        return None if extension is None else extension.places(values, tensors, numbers)
    except RuntimeError:
        return None


def prepare() -> None:
    """Begin to build what has to be built, in threads of its own."""
    wanted = (_found_lanes, tile_lanes.SOURCE, lanes), (_found, _SOURCE, between)
    for found, source, build in wanted:
        if not found and not _place(source).with_suffix(".json").exists():
            with contextlib.suppress(ImportError):  # not while another thread imports from torch
                importlib.import_module("torch._inductor.cpp_builder")
            threading.Thread(target=build, name=f"flashinf {source.name}").start()


def lanes() -> tile_lanes.Lanes | None:
    """Tiles for this processor, or None where they cannot be built."""
    return _once(_found_lanes, _lanes_lock, tile_lanes.SOURCE, _compiled, _loaded_lanes)


def _once(
    found: list[T | None],
    lock: threading.Lock,
    source: Path,
    build: Callable[[Path], Path],
    load: Callable[[Path], T],
) -> T | None:
    """What was found before, or is now."""
    if not found:
        with lock:
            if not found:
                found.append(_kept_or_built(source, build, load))
    return found[0]


def _kept_or_built(source: Path, build: Callable[[Path], Path], load: Callable[[Path], T]) -> T | None:
    """What a source is as a library: the one kept on disk, or a new one; None where there is none to be had."""
    try:
        place = _place(source)
        try:
            library = known(place)
            if library is not None:
                return load(library)
        except Exception as error:
            log.info("the library in %s is not usable, and is built anew: %s", place, error)
        with tempfile.TemporaryDirectory() as folder:
            return load(keep(build(Path(folder)), place))
    except Exception as error:
        log.info("%s is done without: %s: %s", source.name, type(error).__name__, error)
        return None


def _place(source: Path) -> Path:
    made_by = torch.__version__, sys.implementation.cache_tag, machine(), _FLAGS
    key = hashlib.sha256(source.read_bytes() + repr(made_by).encode()).hexdigest()
    return cache_directory() / "extension" / key


def _compiled(folder: Path) -> Path:
    """Without torch's headers and flags: these forbid a product and a sum in one instruction."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    library = folder / "tile_lanes.so"
    command = [get_cpp_compiler(), *_FLAGS, str(tile_lanes.SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])
    return library


def _built(folder: Path) -> Path:
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    options = CppTorchOptions(include_pytorch=True, warning_all=False)
    builder = CppBuilder("between", str(_SOURCE), options, str(folder))
    builder.build()
    return Path(builder.get_target_file_path())


def _loaded(library: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("between", str(library))
    spec = importlib.util.spec_from_file_location("between", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    if not _works(module):
        raise RuntimeError("it reads tensors in another way than this torch keeps them")
    return module


def _loaded_lanes(library: Path) -> tile_lanes.Lanes:
    code = tile_lanes.Lanes(library)
    if not all(_adds_up(code, dtype) for dtype in (torch.float32, torch.float64)):
        raise RuntimeError("its tiles are not those of the definition")
    return code


def _adds_up(code: tile_lanes.Lanes, dtype: torch.dtype, side: int = 32) -> bool:
    """Whether a tile is what it should be."""
    with torch.inference_mode(False), torch.no_grad():
        values = torch.arange(2.0 * side, dtype=dtype)
        inputs, filters = (
            values[:side].cos().expand(1, 3, side),
            values.sin().expand(3, 2 * side).contiguous(),
        )
        outputs = torch.zeros(1, 3, side, dtype=dtype)
        code.tile(outputs, inputs.contiguous(), side, [(0, code.spectra(filters, side))]).add()
        expected = tile_reference(inputs.double(), filters.double(), side)
        return bool((outputs - expected).abs().max() < 100 * torch.finfo(dtype).eps)


def _works(module: Any) -> bool:
    """Whether it reads what torch says of tensors."""
    with torch.inference_mode(False), torch.no_grad():
        tensor = torch.zeros(3)
        for _ in range(5):
            tensor.add_(1)
        views = tensor, torch.nn.Parameter(tensor), tensor[1:]
        return all(module.probe(view) == (view._version, view.data_ptr()) for view in views)
