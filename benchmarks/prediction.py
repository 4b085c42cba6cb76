"""What decoding would cost on a GPU, on paper: bytes, operations and launches from schedule and datasheet."""

from __future__ import annotations

import torch

from fi_compile.kernels.block_step import block_step_traffic
from fi_compile.kernels.gpu import H100
from fi_compile.kernels.tile_forms import LAUNCH, fastest, launches, traffic
from fi_compile.schedule import Schedule

LAYERS, WIDTH, BLOCK, LENGTH = 18, 768, 32, 1 << 17


def prediction() -> str:
    """A section of docs/kernels.md."""
    channels = LAYERS * WIDTH
    lines = [
        "## A prediction",
        "",
        f"{LAYERS} layers of {WIDTH} channels, one row, {LENGTH:,} positions, K = {BLOCK}, at an H100's datasheet",
        "rates. Nothing of it was measured; launches and latencies are not in the times. The scratch of streamed tiles",
        "is counted as memory, though a cache may hold it.",
        "",
        "| side | tiles | form | launches a tile | MB a tile | Mflop a tile | µs a tile | µs a token |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    total = dict.fromkeys(("bytes", "flops", "seconds", "launches"), 0.0)
    for side, count in Schedule(BLOCK, LENGTH).count_tiles().items():
        form = fastest(H100, side, side, torch.float32, torch.device("cpu"))
        cost = {name: channels * value for name, value in traffic(form, side, side).items()}
        seconds, moved = H100.seconds(**cost), cost["reads"] + cost["writes"]
        for name, value in (("bytes", moved), ("flops", cost["flops"]), ("seconds", seconds)):
            total[name] += count * value / LENGTH
        many = launches(form, side, channels)
        total["launches"] += count * many / LENGTH
        lines.append(
            f"| {side:,} | {count:,} | {form} | {many:,} | {moved / 1e6:,.1f} | {cost['flops'] / 1e6:,.0f} | "
            f"{1e6 * seconds:,.1f} | {1e6 * count * seconds / LENGTH:.2f} |"
        )
    block = block_step_traffic((BLOCK - 1) / 2)
    in_step = channels * (block["reads"] + block["writes"])
    lazy = 4.0 * channels * 2 * LENGTH / 2
    step = in_step / H100.bandwidth
    ours, theirs = total["seconds"] + step, lazy / H100.bandwidth
    launched = ours + LAUNCH * (1 + total["launches"]), theirs + LAUNCH * LAYERS
    lines += [
        "",
        f"A token: {(total['bytes'] + in_step) / 1e6:.1f} MB and {total['flops'] / 1e6:.0f} Mflop, one launch for the"
        f" block's sums and {total['launches']:.3f} for tiles,",
        f"{1e6 * ours:.1f} µs for all mixers ({1e6 * step:.1f} of them in the step). Summing every"
        f" lag anew (lazily) reads {lazy / 1e9:.1f} GB a",
        f"token on average, in a launch a layer: {1e6 * theirs:,.0f} µs. With {1e6 * LAUNCH:.0f} µs for each launch,"
        f" an assumption, {1e6 * launched[0]:.1f} and {1e6 * launched[1]:,.0f} µs:",
        f"{launched[1] / launched[0]:.0f} times less. Beside it what Flash Inference *measured* (arXiv 2410.12982,"
        " abstract): up to 110 times less",
        "in the mixers of a Hyena, and 7.8 times end to end, by the dyadic tiling down to single positions.",
    ]
    return "\n".join(lines) + "\n"
