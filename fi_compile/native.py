"""native: a part of the step as a native library, by AOTInductor, kept on disk for later processes.

Weights and state are its inputs, so one library serves every layer that is like it, and any weights. What
calls it is C++ alone: a call costs a few microseconds where a compiled function of TorchInductor costs ten.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .errors import FlashinfWarning
from .kept import cache_directory, keep, known, machine
from .layers import tensor_form

log = logging.getLogger(__name__)

INDUCTOR: dict[str, Any] = {
    "realize_opcount_threshold": 0,  # else a norm is recomputed for every row of the product that follows
    "cpp.enable_floating_point_contract_flag": "fast",
    "size_asserts": False,
    "reorder_for_locality": False,  # it moves writes before reads, and what is written is then copied whole
}

# The library is called with bare pointers, and keeps what is between its operators on the stack: creating and
# counting tensors took longer than the arithmetic of a layer of 64 channels.
_BARE: dict[str, Any] = {
    "aot_inductor.allow_stack_allocation": True,
    "aot_inductor.use_minimal_arrayref_interface": True,
}
_ENTRY = "AOTInductorModelRunMinimalArrayrefInterfaceV2"


@dataclass(frozen=True)
class Native:
    """A part of the step as a library on disk, called with a list of tensors."""

    library: Path
    run: Callable[[list[Any]], Sequence[Tensor]]
    bare: bool  # whether it may be called with pointers

    def __call__(self, args: list[Any]) -> Sequence[Tensor]:
        """The part's outputs; what it writes, it writes in place."""
        return self.run(args)


def compile_native(part: fx.GraphModule, example: Sequence[Tensor]) -> Native:
    """A part's graph as a function of a list of tensors, from the cache where it is known.

    ``example``: tensors of the shapes, strides and dtypes that the part will be called with. Raises whatever
    AOTInductor raises where it cannot compile the part, or where there is no compiler.
    """
    place = cache_directory() / "steps" / _key(part)
    try:
        library = known(place)
        if library is not None:
            return _load(library)
    except Exception as error:
        warnings.warn(
            f"the compiled step in {place} is not usable ({error}); compiled anew",
            FlashinfWarning,
            stacklevel=2,
        )
    return _load(keep(Path(_compile(part, example)), place))


def _compile(part: fx.GraphModule, example: Sequence[Tensor]) -> str:
    from torch._inductor import aot_compile, config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own insides
        try:
            with config.patch(INDUCTOR | _BARE), _bare_wrapper():
                return str(aot_compile(part, tuple(example)))
        except Exception as error:  # operators of a library of their own take tensors
            log.info("a part of the step is called with tensors, not pointers: %s", error)
        with config.patch(INDUCTOR):
            return str(aot_compile(part, tuple(example)))


@contextlib.contextmanager
def _bare_wrapper() -> Iterator[None]:
    """What wraps kernels for bare pointers; TorchInductor decides on it once in a process, at its first use."""
    from torch._inductor.codegen import common
    from torch._inductor.codegen.cpp_wrapper_cpu_array_ref import CppWrapperCpuArrayRef
    from torch._inductor.virtualized import V

    class Bare(CppWrapperCpuArrayRef):
        @staticmethod
        def create(
            is_subgraph: bool, subgraph_name: Any, parent_wrapper: Any, partition_signatures: Any = None
        ) -> Bare:
            return Bare()

        def generate_return(self, output_refs: list[str]) -> None:
            if len(set(output_refs)) < len(output_refs) or V.graph.constants or V.extern_kernel_nodes:
                raise NotImplementedError("outputs in one memory, constants, or operators called by name")
            super().generate_return(output_refs)

    common.init_backend_registration()
    usual = common.device_codegens["cpu"]
    common.device_codegens["cpu"] = dataclasses.replace(usual, cpp_wrapper_codegen=Bare)
    try:
        yield
    finally:
        common.device_codegens["cpu"] = usual


def _load(library: Path) -> Native:
    loader: Any = torch._C
    run = loader._aoti.AOTIModelContainerRunnerCpu(str(library), 1).run
    return Native(library, run, hasattr(ctypes.CDLL(str(library)), _ENTRY))


def _key(part: fx.GraphModule) -> str:
    """All that the library depends on: the graph with its shapes and strides, torch, the machine, the options."""
    forms = [(node.name, str(node.target), tensor_form(node)) for node in part.graph.nodes]
    made_by = (
        torch.__version__,
        version("flashinf"),
        sorted((INDUCTOR | _BARE).items()),
        torch.get_num_threads(),
    )
    return hashlib.sha256(repr((part.code, forms, made_by, machine())).encode()).hexdigest()
