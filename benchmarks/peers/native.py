"""The kernels in `native.cpp`, built once a process for this machine."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

OUTPUTS = (1, 8, 16)
# What sums need to be vectorised. Not -ffast-math: it would switch subnormal numbers off in the whole process.
_SUMS = (
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-ffp-contract=fast",
)
_FLAGS = ("-O3", "-march=native", *_SUMS, "-fopenmp", "-shared", "-fPIC", "-std=c++17")


@cache
def _library() -> ctypes.CDLL:
    folder = tempfile.mkdtemp(prefix="benchmarks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, target = Path(__file__).with_name("native.cpp"), os.path.join(folder, "native.so")
    subprocess.run([os.environ.get("CXX", "g++"), *_FLAGS, str(source), "-o", target], check=True)
    return ctypes.CDLL(target)


def sums(history: Tensor, window: Tensor, count: int = 1) -> Tensor:
    """`out[c, s] = sum over i < n of history[c, i] · window[c, i + s]`, s < count: float32 [C, count].

    history [C, n], window [C, n + count - 1] or more, float32, positions contiguous; count: one of OUTPUTS.
    """
    channels, n = history.shape
    out = history.new_empty(channels, count)
    assert history.dtype == window.dtype == torch.float32
    assert window.shape[1] >= n + count - 1
    assert n < 2 or history.stride(1) == window.stride(1) == 1
    sizes = (channels, n, history.stride(0), window.stride(0))
    _call(f"sums_{count}", (history, window, out), sizes)
    return out


def modal_step(state: Tensor, poles: Tensor, residues: Tensor, skip: Tensor, u: Tensor) -> Tensor:
    """`z = Re<R, x> + skip·u`, then `x <- λx + u` in place: state, poles, residues [2, C, N], skip, u [C]; float32."""
    z = torch.empty_like(u)
    tensors = (*state, *poles, *residues, skip, u, z)
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
    _call("modal_step", tensors, state.shape[1:])
    return z


def _call(name: str, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    integers = [ctypes.c_int64(n) for n in sizes]
    getattr(_library(), name)(*pointers, *integers, ctypes.c_int(torch.get_num_threads()))
