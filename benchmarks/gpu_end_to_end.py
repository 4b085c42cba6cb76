"""Whole models: what a Hyena of random weights takes for a sequence, decoded by the schemes of `gpu_mixers`.

- naive: the full forward over the prefix for every token, timed at some lengths, by the trapezoid rule;
- published, torch, flashinf: `Decoder.step` for every token;
- lazy, eager: flashinf with its mixers' time exchanged for theirs: composed of measured parts, not run.

Before the figures of a decoder count, its logits are compared with the model's forward.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch import Tensor

import fi_compile
from benchmarks.gpu_mixers import TILED, marks
from benchmarks.gpu_setting import Place, Setting
from examples.hyena import HyenaConfig, HyenaLM

COMPARED = 2048
TOLERANCE = 1e-4


def model_for(setting: Setting, device: torch.device) -> HyenaLM:
    """A Hyena of random weights, the same for every scheme."""
    torch.manual_seed(0)
    config = HyenaConfig(width=setting.width, layers=setting.layers, l_max=setting.length)
    return HyenaLM(config).eval().to(device)


def decode(
    name: str, model: HyenaLM, ids: Tensor, setting: Setting, place: Place, step: str
) -> dict[str, Any]:
    """Seconds up to each mark, and the error over the first positions."""
    kernels, blocks = TILED[name]
    block = setting.block if blocks else 1
    options = {"kernels": kernels, "block": block, "radix": 2, "step": step, "growth": False}
    start = time.perf_counter()
    decoder = fi_compile.decoder(model, ids[:, :16], max_length=setting.length, options=options)
    logits, compared = [decoder.prefill(ids[:, :1])], min(COMPARED, setting.length)
    logits += [decoder.step(ids[:, t]) for t in range(1, compared)]
    prepared = time.perf_counter() - start
    wanted = model(ids[:, :compared])
    error = float((torch.stack(logits, 1) - wanted).abs().max() / wanted.abs().max())
    if not error < TOLERANCE:
        raise SystemExit(f"{name}, {setting}: the decoder's logits are off by {error:.1e}: no figures")
    noted, seconds = frozenset(marks(setting.length)), {}
    decoder.reset()
    decoder.prefill(ids[:, :1])
    place.wait()
    start = time.perf_counter()
    for t in range(1, setting.length):
        decoder.step(ids[:, t])
        if t + 1 in noted:
            place.wait()
            seconds[t + 1] = time.perf_counter() - start
    return {"seconds": seconds, "error": error, "prepared": prepared}


def naive(model: HyenaLM, ids: Tensor, setting: Setting, place: Place, repeats: int) -> dict[str, Any]:
    """Seconds of the growing prefix up to each mark, by the trapezoid rule between lengths."""
    points = sorted({1, *marks(setting.length), *(max(1, setting.length * i // 8) for i in range(1, 9))})
    cost = {n: place.seconds(lambda n=n: model(ids[:, :n])[:, -1], repeats) for n in points}
    total, seconds = cost[1], {}
    for a, b in itertools.pairwise(points):
        total += (b - a) * (cost[a] + cost[b]) / 2
        if b in marks(setting.length):
            seconds[b] = total
    return {"seconds": seconds, "at": cost}


def composed(decoded: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The decoder's seconds with its mixers' exchanged for another scheme's."""
    if any("seconds" not in found for found in (decoded, ours, theirs)):
        return {"skipped": "a part was skipped"}
    seconds = {m: s - ours["seconds"][m] + theirs["seconds"][m] for m, s in decoded["seconds"].items()}
    return {"seconds": seconds, "composed": True}


@torch.inference_mode()
def end_to_end(
    setting: Setting, place: Place, repeats: int, of_mixers: dict[str, Any], step: str
) -> dict[str, Any]:
    """Every scheme at one setting; `of_mixers` is what `gpu_mixers.mixers` found there."""
    found: dict[str, Any] = {"setting": setting.as_dict()}
    # The analysis keeps filters in float64 beside what decodes.
    needed = setting.nbytes + 3 * 8 * setting.channels * setting.length
    if needed > place.room():
        return {**found, "skipped": f"{needed / 1e9:.0f} GB do not fit"}
    model = model_for(setting, place.device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(256, (setting.batch, setting.length), generator=generator).to(place.device)
    for name in ("naive", *TILED):
        try:
            if name == "naive":
                found[name] = naive(model, ids, setting, place, repeats)
            else:
                found[name] = decode(name, model, ids, setting, place, step)
        except torch.cuda.OutOfMemoryError:
            found[name] = {"skipped": "out of memory"}
    for name in ("lazy", "eager"):
        parts = found["flashinf"], of_mixers.get("flashinf", {}), of_mixers.get(name, {})
        found[name] = composed(*parts)
    return found
