"""What needs a process of its own: how long compilation takes, and how much memory a generation takes.

`python -m benchmarks.child JOB key=value ...` prints one line of JSON, last.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import models
from .decoding import decode

ROOT = Path(__file__).parent.parent


def call(job: str, caches: str | None = None, **arguments: int) -> dict[str, Any]:
    """Run a job in a new process, with compilers' caches in a folder of its own. Raises RuntimeError where it fails."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as fresh:
        folder = caches or fresh
        env = {
            # What malloc was told to keep counts as resident.
            **{name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "XDG_CACHE_HOME": f"{folder}/xdg",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        command = [sys.executable, "-m", "benchmarks.child", job, *(f"{k}={v}" for k, v in arguments.items())]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_time(width: int, layers: int, length: int) -> dict[str, Any]:
    """Seconds of `decoder(...)` and of the first step, and the check of some steps."""
    model = models.hyena(width, layers, length)
    import fi_compile

    start = time.perf_counter()
    decoder = fi_compile.decoder(model, models.random_ids(1, 16), max_length=length)
    analysed = time.perf_counter()
    decoder.step(models.random_ids(1, 1)[:, 0])
    compiled = time.perf_counter()
    decoder.reset()
    error, bound, against = models.check_logits(model, decode(decoder.step, models.random_ids(1, 64)).logits)
    return {
        "analysis": analysed - start,
        "compilation": compiled - analysed,
        "check": (error, bound, against),
    }


def memory(width: int, layers: int, length: int) -> dict[str, Any]:
    """Bytes resident before the decoder is made, at most while it is made, and at most while it generates."""
    model = models.hyena(width, layers, length)
    # A small decoder first: what the compiler itself loads is not the generation's.
    models.decoder_for(model, 64)
    torch.compiler.reset()
    before = _resident()
    decoder = models.decoder_for(model, length)
    making = _peak()
    start = _resident()
    _reset_peak()
    token, last = models.random_ids(1, length), None
    for t in range(length):
        last = decoder.step(token[:, t])
    generating = _peak()
    assert last is not None
    check = models.check_logits(model, last[:, None], [length - 1])
    report = decoder.report
    return {
        "before": before,
        "making": making,
        "start": start,
        "generating": generating,
        "predicted": sum(report.bytes_of_mixing.values()),
        "state": decoder.state_bytes,
        "history": 4 * length * sum(m.channels or 0 for m in report.mixers if m.kind == "long_conv"),
        "check": check,
    }


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def _resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(arguments: list[str]) -> None:
    """Run a job and print what it found."""
    job, *rest = arguments
    given: Mapping[str, int] = {k: int(v) for k, _, v in (a.partition("=") for a in rest)}
    torch.set_num_threads(given.get("threads", torch.get_num_threads()))
    jobs = {"compile_time": compile_time, "memory": memory}
    found = jobs[job](**{k: v for k, v in given.items() if k != "threads"})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
