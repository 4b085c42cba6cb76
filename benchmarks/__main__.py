"""``python -m benchmarks``: flashinf beside every alternative, in one run; see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import end_to_end, latency, mixing, plots, processes, steps, tiles
from .measure import BUSY, machine, others_busy
from .results import Results, Section
from .setup import SIZES, Bench, Sizes

MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "mixing": mixing.run,
    "tiles": tiles.run,
    "crossover": tiles.crossover,
    "end_to_end": end_to_end.run,
    "small": steps.small,
    "batch": steps.batch,
    "growing": steps.growing,
    "prefill": steps.prefill,
    "latency": latency.run,
    "memory": processes.memory,
    "compile": processes.compile_time,
}


def measure(results: Results, names: Sequence[str], sizes: Sizes, mode: str, *, quiet: bool = False) -> None:
    """Run measurements by name; whatever happens in one, the others run, and what is there is written."""
    for name in names:
        section = Section(name)
        results.sections.append(section)
        bench = Bench(sizes, mode, section, quiet, results.write)
        try:
            with torch.no_grad():
                MEASUREMENTS[name](bench)
        except Exception as error:
            section.error = f"{traceback.format_exc()}\n{type(error).__name__}: {error}"
            section.figures.clear()  # of a measurement that broke off nothing is shown
            section.curves.clear()
            bench.say(f"failed: {type(error).__name__}: {error}")
        results.write()
        torch.compiler.reset()
        gc.collect()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run, print; returns the exit status: 1 where a check or a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: three minutes instead of forty")
    parser.add_argument(
        "--only", action="append", choices=MEASUREMENTS, help="a measurement; may be repeated"
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of JSON and plots")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    mode = "quick" if args.quick else "full"
    results = Results(args.out, machine(), mode)
    console = Console(width=max(160, Console().width))
    busy = others_busy()
    results.machine["others_busy_before"] = busy
    if busy is not None and busy > BUSY:
        console.print(
            f"[bold]warning: other processes keep {busy:.1f} cores busy; figures will be too slow[/]"
        )
    start = time.perf_counter()
    measure(results, args.only or list(MEASUREMENTS), SIZES[mode], mode)
    results.machine["others_busy_after"] = others_busy()
    results.machine["load_after"] = os.getloadavg()[0]
    results.machine["seconds"] = round(time.perf_counter() - start)
    path = results.write()
    drawn = plots.draw(results)
    results.print(console)
    console.print(f"written to {path.parent}: {', '.join(p.name for p in (path, *drawn))}")
    if not plots.INSTALLED:
        console.print("no plots: matplotlib is not installed (extra `bench`)")
    return 0 if results.sound else 1


if __name__ == "__main__":
    sys.exit(main())
