"""Compilation and memory, in processes of their own (`child`)."""

from __future__ import annotations

import tempfile

import torch

from . import child
from .setup import Bench


def compile_time(bench: Bench) -> None:
    """Cold and warm, for two depths: fresh cache folders, then the same ones again."""
    sizes, found = bench.sizes, {}
    for layers in sizes.depths:
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as caches:
            for state in ("cold", "warm"):
                bench.say(f"{layers} layers, {state}")
                result = found[layers, state] = child.call(
                    "compile_time",
                    caches,
                    width=sizes.depth_width,
                    layers=layers,
                    length=sizes.depth_length,
                    threads=torch.get_num_threads(),
                )
                subject = f"{layers} layers, {state}"
                bench.section.check(subject, *result["check"])
                limit = 25 if state == "cold" else 8
                name = f"{layers} × {sizes.depth_width}, {state}"
                bench.section.figure(
                    f"{name}: compilation", result["compilation"], "s", subject, bench.target("≤", limit)
                )
                bench.section.figure(
                    f"{name}: analysis", result["analysis"], "s", subject, note="before it, in decoder()"
                )
    few, many = sizes.depths
    for state in ("cold", "warm"):
        ratio = found[many, state]["compilation"] / found[few, state]["compilation"]
        of = (f"{few} layers, {state}", f"{many} layers, {state}")
        bench.section.figure(f"{state}: {many} / {few} layers", ratio, "×", of, bench.target("≤", 1.3))


def memory(bench: Bench) -> None:
    """Peak resident memory of a generation, beyond that of the model and the libraries."""
    sizes, length = bench.sizes, bench.sizes.memory
    bench.say(f"{sizes.layers} × {sizes.width}, {length} steps in a process of their own")
    found = child.call(
        "memory", width=sizes.width, layers=sizes.layers, length=length, threads=torch.get_num_threads()
    )
    bench.section.check("decoder", *found["check"])
    grown, predicted, history = found["generating"] - found["before"], found["predicted"], found["history"]
    figure, mib = bench.section.figure, 1 << 20
    figure(
        f"peak of {length} steps", grown / mib, "MiB", "decoder", note="resident, beyond model and libraries"
    )
    figure("predicted by explain", predicted / mib, "MiB", "decoder")
    figure("peak / predicted", grown / predicted, "×", "decoder", bench.target("≤", 1.1))
    figure("predicted / peak", predicted / grown, "×", "decoder", bench.target("≤", 1.1))
    figure("history itself", history / mib, "MiB", "decoder")
    figure("peak / history", grown / history, "×", "decoder", bench.target("≤", 3.0))
    figure("peak of analysis and compilation", (found["making"] - found["before"]) / mib, "MiB", "decoder")
