"""native: a part of the step as a native library, by TorchInductor, kept on disk for later processes.

Weights and state are its inputs, so one library serves every layer that is like it, and any weights. Nearly always it
is a function of pointers (pointers.py), which costs less than a microsecond beside its kernels; where the part calls
operators of other libraries, AOTInductor wraps it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import FlashinfWarning
from .kept import cache_directory, keep, known, machine
from .kernels import block
from .layers import lies_as, returned_values, tensor_form

log = logging.getLogger(__name__)

ENTRY = "flashinf_part"  # what a library that is called with pointers exports; see pointers.py

INDUCTOR: dict[str, Any] = {
    "realize_opcount_threshold": 0,  # else a norm is recomputed for every row of the product that follows
    "cpp.enable_floating_point_contract_flag": "fast",
    "size_asserts": False,
    "cpp.min_chunk_size": 4096,  # products are ours; what is left are loops that take less time than to share them
    "reorder_for_locality": False,  # it moves writes before reads, and what is written is then copied whole
}

# What the compiler can do is not tried out first, which takes ten seconds: where it cannot, compilation fails.
_UNTRIED: dict[str, Any] = {"cpp.vec_isa_ok": True}

_lock = threading.Lock()


@dataclass(frozen=True)
class Native:
    """A part of the step as a loaded library, called with a list of tensors.

    ``address``: of the function that is called with pointers, and trusts that they are of tensors that lie as the
    part's inputs; None where the library takes tensors.
    """

    part: fx.GraphModule
    run: Callable[[list[Any]], Sequence[Tensor]]
    address: int | None = None

    def __call__(self, args: list[Any]) -> Sequence[Tensor]:
        """The part's outputs; what it writes, it writes in place. Raises RuntimeError as `check`."""
        if self.address is not None:
            self.check(args)
        return self.run(args)

    def check(self, args: Sequence[Tensor]) -> None:
        """Raise RuntimeError where tensors do not lie in memory as those the part was compiled for."""
        for node, arg in zip(self.part.graph.find_nodes(op="placeholder"), args, strict=True):
            if not lies_as(arg, node.meta["val"]):
                raise RuntimeError(f"{node.name} has another shape, layout or dtype than it was compiled for")


def compile_native(part: fx.GraphModule, example: Sequence[Tensor]) -> Native:
    """A part's graph as a function of a list of tensors, from the cache where it is known.

    ``example``: tensors of the shapes, strides and dtypes that the part will be called with. Raises whatever
    TorchInductor raises where it cannot compile the part, or where there is no compiler.
    """
    place = cache_directory() / "steps" / _key(part)
    try:
        library = known(place)
        if library is not None:
            return _load(library, part)
    except Exception as error:
        warnings.warn(
            f"the compiled step in {place} is not usable ({error}); compiled anew",
            FlashinfWarning,
            stacklevel=2,
        )
    with tempfile.TemporaryDirectory() as folder:
        return _load(keep(_compile(part, example, Path(folder)), place), part)


@contextlib.contextmanager
def generating(options: dict[str, Any]) -> Iterator[None]:
    """TorchInductor with these options, for one thread at a time; the C++ compiler works beside it."""
    from torch._inductor import config

    with _lock, config.patch(options), torch.no_grad():
        yield


def _compile(part: fx.GraphModule, example: Sequence[Tensor], folder: Path) -> Path:
    from torch._inductor import aot_compile

    from .pointers import builder_of, generate_source

    try:
        with generating(INDUCTOR | _UNTRIED):
            builder = builder_of(generate_source(part, example), folder)
        builder.build()
        return Path(builder.get_target_file_path())
    except Exception as error:  # operators of a library of their own take tensors
        log.info("a part of the step is called with tensors, not pointers: %s", error)
    with generating(INDUCTOR):  # which may now try out the compiler
        return Path(str(aot_compile(by_torch_alone(part, example), tuple(example))))


def by_torch_alone(part: fx.GraphModule, example: Sequence[Tensor]) -> fx.GraphModule:
    """A part in which torch need not know what only code of our own does, or does well."""
    known = {block.OPERATOR: block.block_sum_by_torch, torch.ops.aten.linear.default: _linear_of_one_row}
    if not any(part.graph.find_nodes(op="call_function", target=operator) for operator in known):
        return part
    with torch.no_grad():
        return make_fx(part, decomposition_table=known, tracing_mode="fake", pre_dispatch=True)(*example)


def _linear_of_one_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As a sum, which TorchInductor makes a loop of its own: half the time of a BLAS."""
    if x.numel() != x.shape[-1] or x.dtype in (torch.bfloat16, torch.float16):
        return NotImplemented
    out = (weight * x.unsqueeze(-2)).sum(-1)
    return out if bias is None else out + bias


def _load(library: Path, part: fx.GraphModule) -> Native:
    loaded = ctypes.CDLL(str(library))
    if hasattr(loaded, ENTRY):
        entry = getattr(loaded, ENTRY)
        return Native(part, _called(entry, returned_values(part)), ctypes.cast(entry, ctypes.c_void_p).value)
    loader: Any = torch._C
    return Native(part, loader._aoti.AOTIModelContainerRunnerCpu(str(library), 1).run)


def _called(entry: Any, outputs: Sequence[Tensor]) -> Callable[[list[Any]], Sequence[Tensor]]:
    def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))

    def run(args: list[Any]) -> Sequence[Tensor]:
        made = [torch.empty_strided(out.shape, out.stride(), dtype=out.dtype) for out in outputs]
        entry(addresses(args), addresses(made))
        return made

    return run


@cache
def _written_by() -> str:
    """A digest of what writes a part's source, beside TorchInductor."""
    files = (Path(__file__).with_name(name) for name in ("pointers.py", "skinny_gemm.h", "block_sum.h"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _key(part: fx.GraphModule) -> str:
    """All that the library depends on: the graph with its shapes and strides, torch, the machine, the options."""
    forms = [(node.name, str(node.target), tensor_form(node)) for node in part.graph.nodes]
    made_by = (
        torch.__version__,
        version("flashinf"),
        _written_by(),
        sorted((INDUCTOR | _UNTRIED).items()),
        torch.get_num_threads(),
    )
    return hashlib.sha256(repr((part.code, forms, made_by, machine())).encode()).hexdigest()
