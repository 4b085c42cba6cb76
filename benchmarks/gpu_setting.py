"""What the GPU benchmarks run: sizes, operands, clocks, and whether a size fits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Inputs repeat with a prime period: a tile that reads or writes a power of two too far is seen.
PERIOD = 61


@dataclass(frozen=True)
class Setting:
    """A stack of long convolutions: M layers, D channels each, B rows, L positions, base blocks of K."""

    layers: int
    width: int
    batch: int
    length: int
    block: int = 32

    @property
    def channels(self) -> int:
        """The channels of all layers."""
        return self.layers * self.width

    @property
    def sides(self) -> list[int]:
        """The sides of the tiles that a sequence runs."""
        sides, side = [], self.block
        while side < self.length:
            sides.append(side)
            side *= 2
        return sides

    @property
    def nbytes(self) -> int:
        """Bytes of filters, of their spectra for tiles of all sides, and of history and pending outputs."""
        return 4 * self.channels * self.length * (1 + 2 + 2 * self.batch)

    def __str__(self) -> str:
        return f"M={self.layers} D={self.width} B={self.batch} L={self.length:,}"

    def as_dict(self) -> dict[str, int]:
        """The sizes by name."""
        return asdict(self)


@dataclass(frozen=True)
class Place:
    """Where a benchmark runs: a device, and whether it is one at all or the interpreter."""

    device: torch.device

    @property
    def name(self) -> str:
        """The product, or that kernels are interpreted."""
        if self.device.type != "cuda":
            return "none: kernels interpreted on the CPU"
        return torch.cuda.get_device_name(self.device)

    def wait(self) -> None:
        """Until everything launched so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def room(self) -> float:
        """Bytes that operands may take: nine tenths of what is free."""
        if self.device.type != "cuda":
            return 1e9
        torch.cuda.empty_cache()
        return 0.9 * torch.cuda.mem_get_info(self.device)[0]

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """The median wall time of a call after one that does not count."""
        run()
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def operands(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    """Filters [C, L] that fade, and input rows [PERIOD, B, C] of which position t has row t mod PERIOD."""
    generator = torch.Generator(device).manual_seed(0)
    filters = torch.randn(setting.channels, setting.length, generator=generator, device=device)
    filters *= torch.exp(torch.arange(setting.length, device=device) * (-8.0 / setting.length))
    rows = torch.randn(PERIOD, setting.batch, setting.channels, generator=generator, device=device)
    return filters, rows


def sample_of(setting: Setting) -> list[int]:
    """A few channels, the first and the last among them, for which results are checked."""
    count = min(4, setting.channels)
    return sorted({round(i * (setting.channels - 1) / max(1, count - 1)) for i in range(count)})


def expected(filters: Tensor, rows: Tensor, channels: Sequence[int], length: int) -> tuple[Tensor, float]:
    """The convolutions of some channels in float64, [B, c, length], and the scale ‖u‖·‖k‖ of their rounding."""
    at = torch.arange(length, device=rows.device) % PERIOD
    u = rows[at][:, :, channels].permute(1, 2, 0).double()
    k = filters[channels, :length].double()
    product = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(k, n=2 * length)
    scale = float(u.norm(dim=-1).max() * k.norm(dim=-1).max())
    return torch.fft.irfft(product, n=2 * length)[..., :length], scale


def check(name: str, found: Tensor, wanted: Tensor, scale: float) -> float:
    """The error in units of float32's rounding of ‖u‖·‖k‖; raises SystemExit where a scheme computes something else."""
    error = float((found.double() - wanted).abs().max()) / (torch.finfo(torch.float32).eps * scale)
    if not error < 3:
        raise SystemExit(f"{name} is off by {error:.1f} roundings from the convolution: no figures")
    return error
