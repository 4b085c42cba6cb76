"""Steps of a smaller model, of a batch, through torch.compile, and a prompt: each against what it is compared with."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from fi_compile import Decoder

from . import models
from .decoding import decode, where_time_goes
from .measure import interleaved
from .setup import Bench


def small(bench: Bench) -> None:
    """8 layers × 64, where Python's share is largest."""
    sizes = bench.sizes
    model = models.hyena(sizes.small_width, sizes.layers, sizes.small_length)
    bench.say("analysis and compilation")
    decoder = bench.decoder(model, sizes.small_length)
    bench.say(f"{sizes.small_length} steps")
    steps = decode(decoder.step, models.random_ids(1, sizes.small_length))
    name = f"{sizes.layers} × {sizes.small_width} mean step"
    bench.section.check("decoder", *models.check_logits(model, steps.logits))
    bench.section.figure(
        name,
        1e6 * steps.mean,
        "µs",
        "decoder",
        bench.target("≤", 120),
        f"to L={sizes.small_length}, tiles included",
    )
    where_time_goes(bench.section, f"{sizes.layers} × {sizes.small_width}", "decoder", steps, decoder)


def batch(bench: Bench) -> None:
    """Several sequences in lockstep."""
    sizes = bench.sizes
    model = models.hyena(sizes.width, sizes.layers, sizes.batch_length)
    bench.say("analysis and compilation")
    decoder = bench.decoder(model, sizes.batch_length, sizes.batch)
    bench.say(f"{sizes.batch_length} steps")
    steps = decode(decoder.step, models.random_ids(sizes.batch, sizes.batch_length))
    bench.section.check("decoder", *models.check_logits(model, steps.logits))
    name = f"{sizes.layers} × {sizes.width}, B = {sizes.batch}: mean step"
    bench.section.figure(
        name,
        1e3 * steps.mean,
        "ms",
        "decoder",
        bench.target("≤", 3.0),
        f"to L={sizes.batch_length}, tiles included",
    )


def growing(bench: Bench) -> None:
    """The loop with a growing prefix under torch.compile, against Decoder.step at the same positions."""
    sizes, length = bench.sizes, bench.sizes.growing
    model = models.hyena(sizes.width, sizes.layers, length)
    given = models.random_ids(1, length)
    bench.say("decoder: analysis and compilation")
    decoder = bench.decoder(model, length)
    bench.say(f"decoder: {length} steps")
    steps = decode(decoder.step, given)
    bench.section.check("decoder", *models.check_logits(model, steps.logits))
    bench.say("torch.compile by itself")
    own = _share_of_torch(model, decoder, given)
    del decoder
    fast = torch.compile(
        model, backend="flashinf", dynamic=True, options={**sizes.options, "max_length": length}
    )
    bench.say("torch.compile: first calls")
    start, seconds, rows = 16, [], []
    ids = given[:, :start]
    clock = time.perf_counter
    with torch.inference_mode():
        for t in range(start, length):
            before = clock()
            logits = fast(ids)
            last = logits[:, -1].clone()
            ids = torch.cat([ids, given[:, t : t + 1]], 1)
            seconds.append(clock() - before)
            rows.append(last)
            if t == start + 8:
                bench.say(f"torch.compile: {length} calls")
    error = models.check_logits(model, torch.stack(rows, 1), range(start - 1, length - 1))
    bench.section.check("growing loop", *error)
    settled = torch.tensor(seconds[8:]).double()  # the first calls compile
    mean, step = float(settled.mean()), float(steps.seconds[start + 8 :].mean())
    of, note = ("decoder", "growing loop"), f"to {length} positions, {sizes.layers} layers"
    bench.section.figure("Decoder.step", 1e6 * step, "µs", "decoder", note=f"mean, {note}")
    bench.section.figure("call of the compiled model", 1e6 * mean, "µs", "growing loop", note=f"mean, {note}")
    bench.section.figure("call - step", 1e3 * (mean - step), "ms", of, bench.target("≤", 0.6))
    bench.section.figure(
        "of which torch.compile", 1e3 * own, "ms", "decoder", note="guards, and a backend that does nothing"
    )
    bench.section.figure(
        "first 8 calls", sum(seconds[:8]), "s", "growing loop", note="analysis and compilation"
    )


def _share_of_torch(model: nn.Module, decoder: Decoder, given: Tensor) -> float:
    """Seconds of a call with a backend that does nothing, each after a step, which fills the caches with weights."""
    rows = given.new_zeros(1, given.shape[1], models.VOCAB)
    empty = torch.compile(model, backend=lambda graph, _: lambda *_: (rows,), dynamic=True)
    decoder.reset()
    seconds = []
    with torch.inference_mode():
        for t in range(16, min(1024, given.shape[1])):
            decoder.step(given[:, t])
            before = time.perf_counter()
            empty(given[:, :t])
            seconds.append(time.perf_counter() - before)
    torch.compiler.reset()
    return statistics.mean(seconds[8:])


def prefill(bench: Bench) -> None:
    """A prompt against one eager forward of the model."""
    sizes, length, after = bench.sizes, bench.sizes.prefill, 64
    model = models.hyena(sizes.width, sizes.layers, length + after)
    ids = models.random_ids(1, length + after)
    bench.say("analysis and compilation")
    decoder = bench.decoder(model, length + after)
    bench.say(f"prompt of {length} and {after} steps")
    first = decoder.prefill(ids[:, :length])[:, None]
    rows = torch.cat([first, decode(decoder.step, ids[:, length:]).logits], 1)
    bench.section.check("decoder", *models.check_logits(model, rows, range(length - 1, length + after)))
    bench.say("times, in turn")
    prompt = ids[:, :length]
    with torch.inference_mode():
        times = interleaved(
            {"prefill": lambda: decoder.prefill(prompt), "forward": lambda: model(prompt)}, sizes.repeats
        )
    mine, theirs = times["prefill"].median, times["forward"].median
    bench.section.figure(f"prefill of {length} ids", mine, "s", "decoder")
    bench.section.figure(f"eager forward of {length} ids", theirs, "s", "decoder")
    bench.section.figure("prefill / forward", mine / theirs, "×", "decoder", bench.target("≤", 1.2))
