"""How a bank of filters runs its tiles: with torch, or with Triton kernels.

Both take the state of a stack, history and pending [B, C, capacity], and add what one tile contributes. They differ
in how that state lies in memory: transforms of torch want positions contiguous, the kernels channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fi_compile.errors import FlashinfWarning, InputError
from fi_compile.kernels.tile import add_tile_direct, add_tile_fft, tile_cost, tile_spectrum
from fi_compile.schedule import Tile


def choose_kernels(option: str, device: torch.device) -> str:
    """`torch` or `triton` for a device: what the option says, or for `auto` Triton on GPUs that it serves.

    Raises InputError where Triton is asked for and cannot run.
    """
    if option == "torch" or (option == "auto" and device.type != "cuda"):
        return "torch"
    from fi_compile.kernels.gpu import capable, runs_on

    if option == "auto":
        return "triton" if capable(device) else "torch"
    if not runs_on(device):
        raise InputError(
            f"option kernels='triton': expected a model on a GPU, found one on {device.type!r}; move the model, use"
            " kernels='auto', or set TRITON_INTERPRET=1 before Python starts to interpret the kernels (for tests)"
        )
    return "triton"


class TorchTiles:
    """Tiles by torch: batched products for small sides, transforms for large ones.

    filters [F, capacity]; source, filter_index: int64 [Cout] or None, and target, int64 [P] or None, as in a bank.
    """

    def __init__(
        self,
        filters: Tensor,
        source: Tensor | None,
        filter_index: Tensor | None,
        target: Tensor | None = None,
    ):
        self.filters, self.maps = filters, (source, filter_index, target)
        self._made: dict[tuple[str, int], Tensor] = {}

    def new_state(self, batch: int, channels: int) -> Tensor:
        """Zeros [B, C, capacity], positions contiguous."""
        return self.filters.new_zeros(batch, channels, self.filters.shape[1])

    def select_rows(self, state: Tensor, index: Tensor) -> Tensor:
        """Rows `index` of a state, int64 [B'], laid out as `new_state` does."""
        return state.index_select(0, index)

    @property
    def nbytes(self) -> int:
        """Bytes of what was made of the filters so far."""
        return sum(t.nbytes for t in self._made.values())

    def form(self, tile: Tile) -> str:
        """How a tile runs: `direct` or `fft`."""
        cost = tile_cost(tile.side, len(tile.outputs))
        return min(cost, key=cost.__getitem__)

    def add(self, tile: Tile, history: Tensor, pending: Tensor) -> None:
        """Add to pending what a tile's inputs in history contribute."""
        inputs = history[:, :, tile.inputs.start : tile.inputs.stop]
        outputs = pending[:, :, tile.outputs.start : tile.outputs.stop]
        self._run(self.form(tile), tile.side, outputs, inputs)

    def _run(self, form: str, side: int, outputs: Tensor, inputs: Tensor) -> None:
        if form == "direct":
            add_tile_direct(outputs, inputs, self.filters, *self.maps)
        else:
            add_tile_fft(outputs, inputs, self.spectrum(side), *self.maps)

    def spectrum(self, side: int) -> Tensor:
        """The filters' spectra for tiles of `side`, complex [F, side + 1], made on first use."""
        return self._keep("fft", side, tile_spectrum)

    def _keep(self, form: str, side: int, make: Callable[[Tensor, int], Tensor]) -> Tensor:
        if (form, side) not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[form, side] = make(self.filters, side)
        return self._made[form, side]


class TritonTiles(TorchTiles):
    """Tiles by Triton: direct in registers, then transforms on matrix units, in one launch or in three; or torch's.

    The choice goes by what was measured (see `kernels.tuning`), else by the time that an H100's datasheet predicts.
    """

    def __init__(
        self,
        filters: Tensor,
        source: Tensor | None,
        filter_index: Tensor | None,
        target: Tensor | None = None,
    ):
        # Only here: who stays with torch's kernels needs no Triton.
        from fi_compile.kernels import monarch, tile_direct, tile_fft, tile_stream, tuning
        from fi_compile.kernels.gpu import H100

        if target is not None:
            raise ValueError("the Triton kernels serve one input a channel")
        super().__init__(filters, source, filter_index)
        self._direct, self._fft, self._monarch, self._rates = tile_direct, tile_fft, monarch, H100
        self._stream = tile_stream
        self._largest = monarch.largest_side(filters.device)
        self._architecture, self._batch = tuning.architecture(filters.device), 1
        try:
            self._measured = tuning.load()
        except ValueError as error:
            self._measured = tuning.Table()
            warnings.warn(
                f"{error}. Tiles are chosen by the datasheet; delete the file, or write it anew with"
                " `python -m benchmarks.gpu`",
                FlashinfWarning,
                stacklevel=2,
            )

    def new_state(self, batch: int, channels: int) -> Tensor:
        """Zeros [B, C, capacity], channels contiguous."""
        return self.filters.new_zeros(self.filters.shape[1], batch, channels).permute(1, 2, 0)

    def select_rows(self, state: Tensor, index: Tensor) -> Tensor:
        """Rows `index` of a state, int64 [B'], laid out as `new_state` does."""
        return state.permute(2, 0, 1).index_select(1, index).permute(1, 2, 0)

    def offered(self, side: int) -> list[str]:
        """The forms that serve tiles of `side`: `direct`, `matrix` and `stream` by kernels, `fft` by torch."""
        forms = ["direct"] if side <= self._direct.LARGEST else []
        if self.filters.dtype == torch.float32:
            forms += ["matrix"] if side <= self._largest else []
            forms += ["stream"] if self._stream.stream_for(side, self.filters.device) else []
        return [*forms, "fft"]

    def form(self, tile: Tile) -> str:
        """How a tile runs: the fastest of those that are offered."""
        side, length = tile.side, len(tile.outputs)
        forms = self.offered(side)
        maps = self.maps[0] if self.maps[0] is not None else self.maps[1]
        channels = self.filters.shape[0] if maps is None else len(maps)
        key = self._architecture, channels, self._batch, side
        # What was measured are whole tiles; those at the capacity may be clipped.
        found = self._measured.fastest(key, forms) if length == side else None
        return found or min(forms, key=lambda form: self._seconds(form, side, length))

    def _seconds(self, form: str, side: int, length: int) -> float:
        """What the datasheet predicts for one channel."""
        if form == "direct":
            return self._rates.seconds(**self._direct.tile_direct_traffic(side, length))
        split, stream = self._monarch.split_for(side), self._stream.stream_for(side, self.filters.device)
        if form == "matrix" and split is not None:
            return self._rates.seconds(**self._fft.tile_fft_traffic(split))
        if form == "stream" and stream is not None:
            return self._rates.seconds(**self._stream.tile_stream_traffic(stream))
        return self._rates.seconds(**self._fft.torch_traffic(side))

    def add(self, tile: Tile, history: Tensor, pending: Tensor, *kept: Any) -> None:
        """Add to pending what a tile's inputs in history contribute."""
        self._batch = history.shape[0]  # which form is fastest depends on it; all are right
        super().add(tile, history, pending, *kept)

    def _run(self, form: str, side: int, outputs: Tensor, inputs: Tensor) -> None:
        if form == "direct":
            lags = self._keep(form, self._direct.LARGEST, self._direct.lag_table)
            self._direct.add_tile_direct_gpu(outputs, inputs, lags, *self.maps[:2])
        elif form == "matrix":
            spectrum = self._keep(form, side, self._monarch.tile_spectrum_gpu)
            self._fft.add_tile_fft_gpu(outputs, inputs, spectrum, *self.maps[:2])
        elif form == "stream":
            spectrum = self._keep(form, side, self._stream.tile_spectrum_stream)
            self._stream.add_tile_stream_gpu(outputs, inputs, spectrum, *self.maps[:2])
        else:
            super()._run(form, side, outputs, inputs)


TILES = {"torch": TorchTiles, "triton": TritonTiles}
