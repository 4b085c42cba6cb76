"""The extension ``between.cpp``: built once by the compiler that builds the steps, and kept on disk.

It does nothing that is not written in Python too: :meth:`Layers.bind`, :meth:`WeightWatch.unchanged`,
:meth:`Decoder.step` and the backend are its callers. Without a compiler they take a few times as long, and compute
the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .kept import cache_directory, keep, known, machine

log = logging.getLogger(__name__)

_found: list[Any] = []  # the extension, once it was looked for
_lock = threading.Lock()

_SOURCE = Path(__file__).with_name("between.cpp")


def between() -> Any | None:
    """The extension, or None where it cannot be built."""
    if not _found:
        with _lock:
            if not _found:
                _found.append(_between())
    return _found[0]


def places(tensors: list[Tensor]) -> bytes | None:
    """Equal for the same tensor objects with their data at the same places, in the same dtypes.

    None where that cannot be told quickly: no extension is loaded, or a tensor is of another kind.
    """
    extension = _found[0] if _found else None
    try:
        return None if extension is None else extension.places(tensors)
    except RuntimeError:
        return None


def prepare() -> None:
    """Begin to build the extension, where it has to be built, in a thread of its own."""
    if not _found and not _place().with_suffix(".json").exists():
        with contextlib.suppress(ImportError):
            importlib.import_module(
                "torch._inductor.cpp_builder"
            )  # not while another thread imports from torch
        threading.Thread(target=between, name="flashinf extension").start()


def _between() -> Any | None:
    try:
        place = _place()
        try:
            library = known(place)
            if library is not None:
                return _loaded(library)
        except Exception as error:
            log.info("the extension in %s is not usable, and is built anew: %s", place, error)
        with tempfile.TemporaryDirectory() as folder:
            return _loaded(keep(_built(Path(folder)), place))
    except Exception as error:
        log.info("steps run without the extension: %s: %s", type(error).__name__, error)
        return None


def _place() -> Path:
    made_by = torch.__version__, sys.implementation.cache_tag, machine()
    key = hashlib.sha256(_SOURCE.read_bytes() + repr(made_by).encode()).hexdigest()
    return cache_directory() / "extension" / key


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


def _works(module: Any) -> bool:
    """Whether it reads what torch says of tensors."""
    with torch.inference_mode(False), torch.no_grad():
        tensor = torch.zeros(3)
        for _ in range(5):
            tensor.add_(1)
        views = tensor, torch.nn.Parameter(tensor), tensor[1:]
        return all(module.probe(view) == (view._version, view.data_ptr()) for view in views)
