"""Times, and what they were taken on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fi_compile

SHORTEST = 2e-3  # a sample lasts at least so long, in seconds: shorter runs are repeated inside it
BUSY = 0.3  # load average beyond this many processes before a run: the machine is not quiet


@dataclass(frozen=True)
class Times:
    """Seconds of repeated runs of one thing."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Slowest over fastest."""
        return max(self.samples) / min(self.samples)


def once(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed(run: Callable[[], object], repeats: int = 5, budget: float = 2.0) -> Times:
    """Repeated runs after one that is not counted, fewer where `budget` seconds are used up (at least two)."""
    inner = max(1, round(SHORTEST / max(once(run), 1e-9)))
    samples: list[float] = []
    while len(samples) < repeats and (len(samples) < 2 or sum(samples) * inner < budget):
        samples.append(once(lambda: [run() for _ in range(inner)]) / inner)
    return Times(tuple(samples))


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, Times]:
    """Times of several things in turn, round by round, so that a slow spell of the machine meets all of them."""
    inner = {name: max(1, round(SHORTEST / max(once(run), 1e-9))) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            n = inner[name]
            samples[name].append(once(lambda run=run, n=n: [run() for _ in range(n)]) / n)
    return {name: Times(tuple(s)) for name, s in samples.items()}


def read_bandwidth(nbytes: int = 1 << 29) -> tuple[float, float]:
    """Bytes a second at which all threads read memory beyond the caches, the best of two ways to sum a buffer of ones.

    Also the relative error of these sums.
    """
    values = torch.ones(nbytes // 4)
    ways = (lambda: values.sum(), lambda: torch.dot(values, values))
    error = max(abs(float(way()) / values.numel() - 1) for way in ways)
    return nbytes / min(min(timed(way, 5).samples) for way in ways), error


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flashinf": fi_compile.__version__,
        "load_before": os.getloadavg()[0],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor()
    )


def others_busy(interval: float = 1.0) -> float | None:
    """How many cores other processes keep busy while this one sleeps for a moment; None where nobody says."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None

    def busy() -> int:
        user, nice, system, _idle, _wait, *rest = map(int, stat.read_text().splitlines()[0].split()[1:])
        return user + nice + system + sum(rest[:3])

    before = busy()
    time.sleep(interval)
    return (busy() - before) / os.sysconf("SC_CLK_TCK") / interval
