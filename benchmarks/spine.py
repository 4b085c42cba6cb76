"""What the derived decoder costs beside the loops people write, on the trained Hyena model (4 layers × 128).

``python -m benchmarks.spine [--tokens 16384]``. All figures come from one process; a figure is printed only after the
decoder's logits were compared with the plain forward's at every position.

- naive: the full forward over the prefix for every token, filters already computed; timed at sampled lengths and
  integrated.
- decoder: ``Decoder.step`` for every token.
- transparent: the growing-prefix loop through ``torch.compile(model, backend="flashinf")``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fi_compile
from examples.hyena import HyenaLM, encode, load

PROMPT = "In the beginning God created the heaven and the earth. "


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def naive_total(decoder: fi_compile.Decoder, ids: Tensor) -> tuple[float, dict[int, float]]:
    """Seconds of the naive loop over all prefixes of ids [1, n], from a sample of lengths, by the trapezoid rule."""
    n = ids.shape[1]
    lengths = sorted({64, *(n * i // 8 for i in range(1, 9))})
    engine = decoder.engine
    derived = engine.derived(1, engine.capacity_for(n))
    cost = {m: seconds(lambda m=m: engine.forward(ids[:, :m], derived)) for m in lengths}
    total = 64 * cost[64] / 2
    for a, b in itertools.pairwise(lengths):
        total += (b - a) * (cost[a] + cost[b]) / 2
    return total, cost


def decode(decoder: fi_compile.Decoder, prompt: Tensor, tokens: int) -> tuple[Tensor, Tensor, float]:
    """Greedy generation by ``step``: ids [1, P + tokens], the logits of each step, and seconds."""
    start = time.perf_counter()
    logits = decoder.prefill(prompt)
    ids, rows = [prompt], []
    for _ in range(tokens):
        rows.append(logits)
        token = logits.argmax(-1)
        ids.append(token[:, None])
        if len(rows) < tokens:
            logits = decoder.step(token)
    return torch.cat(ids, 1), torch.stack(rows, 1), time.perf_counter() - start


def transparent(model: HyenaLM, prompt: Tensor, tokens: int) -> tuple[Tensor, float, float]:
    """The growing-prefix loop: ids, seconds of the loop without its compilations, seconds of the first calls."""
    fast = torch.compile(model, backend="flashinf", dynamic=True)
    ids = prompt
    start = time.perf_counter()
    for _ in range(3):
        ids = torch.cat([ids, fast(ids)[:, -1:].argmax(-1)], 1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(tokens - 3):
        ids = torch.cat([ids, fast(ids)[:, -1:].argmax(-1)], 1)
    return ids, time.perf_counter() - start, first


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the comparison, print it, and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384, help="positions in all, prompt included")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    model, prompt = load().eval(), encode(PROMPT)
    tokens = args.tokens - prompt.shape[1]
    with torch.inference_mode():
        start = time.perf_counter()
        decoder = fi_compile.decoder(model, prompt, max_length=args.tokens)
        classified = time.perf_counter() - start
        decoder.prefill(prompt)
        decoder.step(prompt[:, 0])
        compiled = time.perf_counter() - start
        ids, rows, spent = decode(decoder, prompt, tokens)
        full = model(ids)[:, prompt.shape[1] - 1 : -1]
        error = float((rows - full).abs().max() / full.abs().max())
        if error > 1e-4:
            raise SystemExit(f"decoder and forward disagree: {error:.1e}; no figures")
        naive, cost = naive_total(decoder, ids)
        grown, looped, first = transparent(model, prompt, tokens)
        same = int((grown == ids).all(0).long().cumprod(0).sum())
        if not torch.equal(grown, ids):
            full = model(grown)[:, prompt.shape[1] - 1 : -1]
            margin = full.max(-1).values - full.gather(-1, grown[:, prompt.shape[1] :, None])[..., 0]
            if float(margin.max()) > 1e-4 * float(full.abs().max()):
                raise SystemExit(
                    f"the transparent loop left the model's greedy path after {same}; no figures"
                )
    figures = {
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "max_error": error,
        "analyse_seconds": classified,
        "analyse_and_compile_seconds": compiled,
        "decoder_us_per_token": 1e6 * spent / tokens,
        "naive_ms_per_token": 1e3 * naive / tokens,
        "naive_ms_at_end": 1e3 * cost[max(cost)],
        "decoder_speedup": naive / spent,
        "transparent_us_per_call": 1e6 * looped / (tokens - 3),
        "transparent_first_calls_seconds": first,
        "transparent_speedup": naive / looped,
    }
    for name, value in figures.items():
        print(f"{name:34s} {value:,.4g}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    main()
