"""The mixers alone: what all long convolutions of a model cost a sequence, by five schemes.

- lazy: every lag summed anew for each position, as one batched product;
- eager: each input added to all later outputs at once;
- published: the dyadic tiling of Flash Inference (arXiv 2410.12982) down to single positions, tiles by torch;
- torch: this project's schedule, which sums base blocks of K positions in the step, tiles by torch;
- flashinf: the same, tiles and base blocks by Triton.

The last three run every position. What lazy and eager take is affine in the position: it is timed at some and added up
by the trapezoid rule. Every scheme is compared with the convolution in float64 before its figures count.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_setting import PERIOD, Place, Setting, check, expected, operands, sample_of
from fi_compile.kernels import block
from fi_compile.kernels.block_step import block_step
from fi_compile.mixers.bank import FilterBank
from fi_compile.mixers.stack import ConvState

TILED = {"published": ("torch", False), "torch": ("torch", True), "flashinf": ("triton", True)}


def marks(length: int) -> list[int]:
    """The positions at which totals are noted: an eighth, a quarter, half and all of the sequence."""
    return sorted({max(1, length >> i) for i in range(4)})


class TiledRun:
    """One sequence through a stack of convolutions."""

    def __init__(self, setting: Setting, filters: Tensor, rows: Tensor, kernels: str, blocks: bool) -> None:
        self.rows, self.kernels = rows, kernels
        size = setting.block if blocks else 1
        self.bank = FilterBank(filters, channels_in=setting.channels, block=size, kernels=kernels)
        self.batch = setting.batch
        self.local = torch.zeros(1, dtype=torch.int64, device=filters.device)
        self.sum = block_step if kernels == "triton" else block.block_step

    def run(self, length: int, note: Callable[[int, Tensor], None]) -> ConvState:
        """Every position up to a length; `note` gets the number of positions done and the newest outputs [B, C]."""
        bank, state = self.bank, ConvState(self.bank, self.batch)
        for t in range(length):
            x = self.rows[t % PERIOD]
            self.local.fill_(state.local)
            z = self.sum(state.block_pending, state.block_inputs, bank.block_table, self.local)
            z = torch.addcmul(z, x, bank.skip)
            state.block_inputs.index_copy_(0, self.local, x.unsqueeze(0))
            state.advance()
            note(t + 1, z)
        return state


def tiled(name: str, setting: Setting, place: Place, filters: Tensor, rows: Tensor) -> dict[str, Any]:
    """Seconds up to each mark, and the error of the run that was checked, for one tiled scheme."""
    channels = sample_of(setting)
    wanted, scale = expected(filters, rows, channels, setting.length)
    found = torch.full_like(wanted, torch.nan)
    index = torch.tensor(channels, device=place.device)
    scheme = TiledRun(setting, filters, rows, *TILED[name])

    def keep(done: int, z: Tensor) -> None:
        found[:, :, done - 1] = z.index_select(1, index)

    scheme.run(setting.length, keep)
    error = check(f"{name}, {setting}", found, wanted, scale)
    seconds, noted = {}, frozenset(marks(setting.length))

    def clock(done: int, z: Tensor) -> None:
        if done in noted:
            place.wait()
            seconds[done] = time.perf_counter() - start

    place.wait()
    start = time.perf_counter()
    state = scheme.run(setting.length, clock)
    return {"seconds": seconds, "error": error, "tiles": dict(state.tiles_run)}


def lazily(setting: Setting, filters: Tensor, history: Tensor) -> Callable[[int], Tensor]:
    """Position t by a batched product over all lags: outputs [B, C]."""
    backwards = filters.flip(-1).unsqueeze(-1)

    def position(t: int) -> Tensor:
        return torch.bmm(history[:, :, : t + 1], backwards[:, setting.length - 1 - t :])[..., 0].T

    return position


def eagerly(setting: Setting, filters: Tensor, history: Tensor) -> Callable[[int], Tensor]:
    """Input t added to the outputs from t on, which lie in [B, C, L]: all of those."""
    pending = filters.new_zeros(setting.batch, *filters.shape)
    inputs = history.transpose(0, 1)

    def position(t: int) -> Tensor:
        pending[:, :, t:].addcmul_(inputs[:, :, t, None], filters[:, : setting.length - t])
        return pending

    return position


def sampled(name: str, setting: Setting, place: Place, filters: Tensor, rows: Tensor, repeats: int) -> dict:
    """Seconds up to each mark for lazy or eager, by the trapezoid rule."""
    length = setting.length
    at = torch.arange(length, device=place.device) % PERIOD
    # [C, B, L]: what a batched product of matrices with filters wants.
    history = rows[at].permute(2, 1, 0).contiguous()
    channels = sample_of(setting)
    wanted, scale = expected(filters, rows, channels, length)
    run = (lazily if name == "lazy" else eagerly)(setting, filters, history)
    points = sorted({0, *(length * i // 8 for i in range(1, 8)), length - 1})
    if name == "lazy":
        found = torch.stack([run(t)[:, channels] for t in points], -1)
        error = check(f"{name}, {setting}", found, wanted[..., points], scale)
    else:
        pending = None
        for t in range(min(length, 256)):
            pending = run(t)
        assert pending is not None
        found = pending[:, channels, : min(length, 256)]
        error = check(f"{name}, {setting}", found, wanted[..., : found.shape[-1]], scale)
    cost = {t: place.seconds(lambda t=t: run(t), repeats) for t in points}
    seconds = dict.fromkeys(marks(length), 0.0)
    for a, b in itertools.pairwise(points):
        for mark in seconds:
            stop = min(b, mark)
            if stop > a:
                at_stop = cost[a] + (cost[b] - cost[a]) * (stop - a) / (b - a)
                seconds[mark] += (stop - a) * (cost[a] + at_stop) / 2
    return {"seconds": seconds, "error": error, "at": cost}


def mixers(setting: Setting, place: Place, repeats: int) -> dict[str, Any]:
    """Every scheme at one setting; those that do not fit say so."""
    found: dict[str, Any] = {"setting": setting.as_dict()}
    if setting.nbytes > place.room():
        return {**found, "skipped": f"{setting.nbytes / 1e9:.0f} GB do not fit"}
    filters, rows = operands(setting, place.device)
    for name in ("lazy", "eager", *TILED):
        try:
            if name in TILED:
                found[name] = tiled(name, setting, place, filters, rows)
            else:
                found[name] = sampled(name, setting, place, filters, rows, repeats)
        except torch.cuda.OutOfMemoryError:
            found[name] = {"skipped": "out of memory"}
    return found
