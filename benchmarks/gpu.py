"""Everything that only a GPU can tell, in one command: tests, tuning, the paper's figures.

``python -m benchmarks.gpu [--output gpu-results]``

1. the tests marked ``gpu``: no figure without them;
2. every form of every tile, timed; the table is kept in the user's cache directory, where decoders find it.
   ``--precisions float32 tf32 bfloat16`` times products on matrix units in others too;
3. mixers and whole models by lazy, eager, the published schedule and this project's, for M = 18 and 36 layers of
   D = 256 and 768 channels, B = 1 to 8 rows, L to 2^18 positions as far as they fit. A sequence gives the figures of
   its first half, quarter and eighth too. Whole models take hours: ``--end-to-end 0`` leaves them out.

Results are written as JSON, and as plots where matplotlib is installed. Without a GPU the command says so and exits
with 2; ``TRITON_INTERPRET=1 python -m benchmarks.gpu --tiny`` runs all of it at toy sizes, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu_end_to_end import end_to_end
from benchmarks.gpu_mixers import mixers
from benchmarks.gpu_plots import plot
from benchmarks.gpu_setting import Place, Setting
from benchmarks.gpu_tuning import tune_all
from fi_compile.kernels.gpu import PRECISIONS, interpreted

ROOT = Path(__file__).parent.parent
NO_GPU = """No GPU: torch.cuda.is_available() is False, nothing was measured.
Run this where torch sees a GPU, with a torch built for it. To see the command itself work, at toy sizes and
interpreted: TRITON_INTERPRET=1 python -m benchmarks.gpu --tiny"""
TINY = [Setting(1, 3, batch, 32, block=8) for batch in (1, 2)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="a folder for the results")
    parser.add_argument("--layers", type=int, nargs="+", default=[18, 36])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--length", type=int, default=1 << 18, help="the most positions")
    parser.add_argument("--end-to-end", type=int, default=1 << 18, help="the most positions of whole models")
    parser.add_argument("--repeats", type=int, default=5, help="timings of which the median counts")
    parser.add_argument("--table", type=Path, help="the table of tiles, where not in the cache directory")
    parser.add_argument(
        "--precisions", nargs="+", default=["float32"], choices=PRECISIONS, help="of tiles that are tuned"
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes, interpreted where there is no GPU")
    return parser.parse_args(argv)


def run_tests() -> int:
    """The tests marked `gpu`: their exit status."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu.py",
    ]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def fitting(args: argparse.Namespace, place: Place, most: int) -> list[Setting]:
    """The settings asked for, each as long as fits."""
    found, room = [], place.room()
    for layers, width, batch in itertools.product(args.layers, args.widths, args.batches):
        length = most
        while Setting(layers, width, batch, length).nbytes > room and length > 1 << 10:
            length //= 2
        found.append(Setting(layers, width, batch, length))
    return found


def main(argv: list[str] | None = None) -> int:
    """Test, tune, measure, write."""
    args = parse(argv)
    there = torch.cuda.is_available()
    if not there and not (args.tiny and interpreted()):
        print(NO_GPU)
        return 2
    place = Place(torch.device("cuda" if there else "cpu"))
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "device": place.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "means nothing": args.tiny or not there,
    }

    def keep(name: str, value: Any) -> None:
        results[name] = value
        path = args.output / "results.json"
        path.write_text(json.dumps(results, indent=1))

    status = run_tests()
    keep("tests", "passed" if there else "skipped: no GPU")
    if status:
        print("the tests marked gpu failed: no figures")
        return 1
    if args.tiny:
        settings, whole, repeats = TINY, TINY[:1], 1
        table = args.table or args.output / "tiles.json"
    else:
        settings, repeats, table = fitting(args, place, args.length), args.repeats, args.table
        whole = fitting(args, place, args.end_to_end) if args.end_to_end else []
    keep("tuning", tune_all(settings, place, repeats, table, args.precisions))
    of_mixers = []
    for setting in settings:
        print(f"mixers, {setting}", flush=True)
        of_mixers.append(mixers(setting, place, repeats))
        keep("mixers", of_mixers)
    models = []
    for setting in whole:
        print(f"whole model, {setting}", flush=True)
        # Lazy and eager are composed at marks: of a run of the same length.
        same = next((m for m in of_mixers if m["setting"] == setting.as_dict()), None)
        models.append(
            end_to_end(
                setting,
                place,
                repeats,
                same or mixers(setting, place, repeats),
                "eager" if args.tiny else "inductor",
            )
        )
        keep("end_to_end", models)
    print(f"results are in {os.fspath(args.output / 'results.json')}")
    for path in plot(results, args.output):
        print(f"plotted {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
