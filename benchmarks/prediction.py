"""What decoding would cost on a GPU, on paper: bytes, operations and launches from schedule and datasheet."""

from __future__ import annotations

import torch

from fi_compile.kernels.gpu import H100
from fi_compile.kernels.monarch import split_for
from fi_compile.kernels.tile import tile_cost
from fi_compile.kernels.tile_direct import tile_direct_traffic
from fi_compile.kernels.tile_fft import tile_fft_traffic
from fi_compile.mixers.tiles import TritonTiles
from fi_compile.schedule import Schedule, Tile

LAYERS, WIDTH, BLOCK, LENGTH = 18, 768, 32, 1 << 17


def traffic(form: str, side: int) -> dict[str, float]:
    """Bytes and operations of one channel's tile; for torch's transforms every pass over memory is counted."""
    if form == "direct":
        return tile_direct_traffic(side, side)
    split = split_for(side)
    if form == "matrix" and split is not None:
        return tile_fft_traffic(split)
    # Copy the inputs together, transform, multiply by the spectrum, transform back, add the upper half.
    reads, writes = (1 + 1 + 2 + 2 + 2 + 1 + 1) * side, (1 + 2 + 2 + 2 + 1) * side
    return {"reads": 4.0 * reads, "writes": 4.0 * writes, "flops": tile_cost(side, side)["fft"]}


def prediction() -> str:
    """A section of docs/kernels.md."""
    channels = LAYERS * WIDTH
    tiles = TritonTiles(torch.zeros(1, 1), None, None)
    lines = [
        "## A prediction",
        "",
        f"{LAYERS} layers of {WIDTH} channels, one row, {LENGTH:,} positions, K = {BLOCK}, at an H100's datasheet",
        "rates. Nothing of it was measured; launches and latencies are not in it.",
        "",
        "| side | tiles | form | MB a tile | Mflop a tile | µs a tile | µs a token |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    total = dict.fromkeys(("bytes", "flops", "seconds", "launches"), 0.0)
    for side, count in Schedule(BLOCK, LENGTH).count_tiles().items():
        form = tiles.form(Tile(range(side), range(side, 2 * side)))
        cost = {name: channels * value for name, value in traffic(form, side).items()}
        seconds, moved = H100.seconds(**cost), cost["reads"] + cost["writes"]
        for name, value in (("bytes", moved), ("flops", cost["flops"]), ("seconds", seconds)):
            total[name] += count * value / LENGTH
        total["launches"] += count / LENGTH
        lines.append(
            f"| {side:,} | {count:,} | {form} | {moved / 1e6:,.1f} | {cost['flops'] / 1e6:,.0f} | "
            f"{1e6 * seconds:,.1f} | {1e6 * count * seconds / LENGTH:.2f} |"
        )
    in_step = 4.0 * channels * (2 * (BLOCK - 1) / 2 + 2)
    lazy = 4.0 * channels * 2 * LENGTH / 2
    step = in_step / H100.bandwidth
    lines += [
        "",
        f"A token: {(total['bytes'] + in_step) / 1e6:.1f} MB and {total['flops'] / 1e6:.0f} Mflop, one launch for the"
        f" block's sums and {total['launches']:.3f} for tiles,",
        f"{1e6 * (total['seconds'] + step):.1f} µs for all mixers ({1e6 * step:.1f} of them in the step). Summing every"
        f" lag anew (lazily) reads {lazy / 1e9:.1f} GB a",
        f"token on average: {1e6 * lazy / H100.bandwidth:,.0f} µs.",
    ]
    return "\n".join(lines) + "\n"
