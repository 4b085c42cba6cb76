"""Which forms serve a tile on a GPU, and what each takes by the datasheet: bytes, operations, launches.

`direct` (`tile_direct`), `matrix` and `stream` (`tile_fft`, `tile_stream`; `tile_kept` where spectra of inputs are
kept) are kernels, `fft` is torch's transforms.
"""

from __future__ import annotations

import torch

from fi_compile.kernels.channels import chunk_width
from fi_compile.kernels.gpu import Rates
from fi_compile.kernels.monarch import STREAMS, Split, Stream, largest_side, split_for, stream_for
from fi_compile.kernels.tile_direct import LARGEST, tile_direct_traffic
from fi_compile.kernels.tile_fft import tile_fft_traffic, torch_traffic
from fi_compile.kernels.tile_kept import tile_kept_traffic
from fi_compile.kernels.tile_stream import channels_at_once, tile_stream_traffic

# What a launch is taken to cost where nothing hides it: an assumption, no datasheet has it.
LAUNCH = 5e-6
# Of a chunk of channels by torch: transform, products, transform back, sum, and copying together.
_TORCH_LAUNCHES = 5


def offered(side: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """The forms that serve tiles of `side` on a device."""
    forms = ["direct"] if side <= LARGEST else []
    if dtype == torch.float32:
        forms += ["matrix"] if side <= largest_side(device) else []
        forms += ["stream"] if stream_for(side, device) else []
    return [*forms, "fft"]


def how_by(form: str, side: int) -> Split | Stream:
    """How the transforms of `matrix` or `stream` factor for a side. Raises ValueError where they do not serve it."""
    found = split_for(side) if form == "matrix" else STREAMS.get(1 << (side - 1).bit_length())
    if found is None:
        raise ValueError(f"{form!r} does not serve tiles of {side} inputs")
    return found


def traffic(form: str, side: int, length: int, blocks: float = 1, kept: bool = False) -> dict[str, float]:
    """What one channel of one row of a tile costs, `blocks` blocks of inputs: bytes, floating-point operations.

    kept: whether spectra of inputs are kept from tile to tile.
    """
    if form == "direct":
        return tile_direct_traffic(round(side * blocks), length)
    if form == "fft":
        return torch_traffic(side, blocks)
    how = how_by(form, side)
    if kept:
        return tile_kept_traffic(how, blocks)
    return tile_stream_traffic(how) if isinstance(how, Stream) else tile_fft_traffic(how)


def launches(form: str, side: int, channels: int, kept: bool = False, batch: int = 1) -> int:
    """Launches of a tile for all channels."""
    if form == "fft":
        return _TORCH_LAUNCHES * -(-channels // chunk_width(2 * side * batch))
    if form == "stream":
        rounds = -(-channels // channels_at_once(STREAMS[1 << (side - 1).bit_length()], batch))
        return 2 + 2 * rounds if kept else 3 * rounds
    return 2 if kept and form == "matrix" else 1


def fastest(
    rates: Rates,
    side: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    kept: bool = False,
    fan: float = 1,
) -> str:
    """The form of least predicted time, launches aside.

    Tiles that keep spectra are judged as if each met two blocks: so all of a side take one form. fan: how many inputs
    a channel reads on average: each costs as a block of its own does.
    """
    blocks = fan * (2 if kept else 1)
    forms = offered(side, dtype, device)
    return min(forms, key=lambda form: rates.seconds(**traffic(form, side, length, blocks, kept)))
