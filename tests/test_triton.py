"""Triton kernels against their references, interpreted on the CPU.

A process interprets kernels or compiles them, never both, and decides when it imports triton: so the tests of
`tests/interpreted/` run in a process of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fi_compile
from decoding import EAGER, ids, language_model

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


@pytest.mark.parametrize("file", FILES)
def test_interpreted_kernels(file: str):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout), done.stdout


def test_triton_without_a_gpu_says_what_to_do(without_gradients):
    model, sequence = language_model("fft_scale_on_filter"), ids(2, 9)
    with pytest.raises(fi_compile.InputError, match="expected a model on a GPU, found one on 'cpu'; move"):
        fi_compile.decoder(model, sequence, max_length=20, options={**EAGER, "kernels": "triton"})
    assert fi_compile.decoder(model, sequence, max_length=20, options=EAGER).engine.kernels != "triton"
    with pytest.raises(
        fi_compile.InputError, match="kernels='cuda': expected one of auto, torch, native, triton"
    ):
        fi_compile.Options(kernels="cuda")


def test_the_benchmark_without_a_gpu_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--output", "nowhere"],
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "CUDA_VISIBLE_DEVICES": ""},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout.startswith("No GPU: torch.cuda.is_available() is False, nothing was measured.")
    assert not (FOLDER.parent.parent / "nowhere").exists()
