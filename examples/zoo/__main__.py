"""Decode architectures of the zoo against their plain forward: `python -m examples.zoo [names] [--write]`."""

import argparse
import math
from pathlib import Path

from . import ZOO
from .measure import measure, rewritten, table
from .package import INSTALLED

DOCUMENT = Path(__file__).parents[2] / "docs" / "zoo.md"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What becomes of published architectures.")
    parser.add_argument("names", nargs="*", help="parts of names; all without")
    parser.add_argument("--write", action="store_true", help="write these rows of docs/zoo.md")
    args = parser.parse_args(argv)
    chosen = [n for n in ZOO if not args.names or any(part.lower() in n.lower() for part in args.names)]
    rows = []
    for name in chosen:
        if "package" in name and not INSTALLED:
            print(f"{name}: not installed, left out")
            continue
        rows.append(measure(name))
        print(rows[-1], flush=True)
    if args.write:
        DOCUMENT.write_text(rewritten(DOCUMENT.read_text(), rows) if args.names else table(rows))
    errors = [(row.double or 0.0, row.single or 0.0) for row in rows]
    exact = all(d <= 1e-10 and s <= 3 and not math.isnan(d + s) for d, s in errors)
    print("every decoder computes what its model computes" if exact else "a decoder is off")
    return 0 if exact else 1


if __name__ == "__main__":
    raise SystemExit(main())
