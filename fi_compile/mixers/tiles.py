"""How a bank of filters runs its tiles: with torch, or with Triton kernels.

Both take the state of a stack, history and pending [B, C, capacity], and add what one tile contributes. They differ
in how that state lies in memory: transforms of torch want positions contiguous, the kernels channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import log2

import torch
from torch import Tensor

from fi_compile.errors import FlashinfWarning, InputError
from fi_compile.kernels.channels import chunk_width, take, transform
from fi_compile.kernels.tile import add_products, add_tile_direct, add_tile_fft, tile_cost, tile_spectrum
from fi_compile.schedule import Schedule, Tile


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


class KeptSpectra:
    """The spectra of blocks of inputs that several tiles of one state meet, [B, Cin, S + 1] each."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[int, Tensor]] = {}
        self._free: dict[int, list[Tensor]] = {}

    def reserve(self, tile: Tile, new: Callable[[], Tensor]) -> list[int]:
        """Make room for what a tile meets and forget what no tile meets any more; where to begin transforms."""
        kept, free = self._kept.setdefault(tile.side, {}), self._free.setdefault(tile.side, [])
        for start in [start for start in kept if start < tile.inputs.start]:
            free.append(kept.pop(start))
        wanted = [start for start, _ in tile.blocks]
        missing = [start for start in (wanted if tile.reused else wanted[:-1]) if start not in kept]
        for start in missing:
            kept[start] = free.pop() if free else new()
        return missing

    def of(self, side: int, start: int) -> Tensor:
        """The spectra of the block of `side` inputs that begins at `start`."""
        return self._kept[side][start]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        held = [t for kept in self._kept.values() for t in kept.values()]
        return sum(t.nbytes for t in held + [t for free in self._free.values() for t in free])

    def clear(self) -> None:
        """The inputs have changed: nothing is known of any block."""
        for side, kept in self._kept.items():
            self._free.setdefault(side, []).extend(kept.values())
            kept.clear()


class TileWork:
    """A tile by transforms, in `count` pieces of channels that are run in order.

    First the transforms of blocks that other tiles meet too, then products and inverse transforms. elements: values
    of a transform that one piece works on.
    """

    def __init__(
        self,
        tiles: TorchTiles,
        tile: Tile,
        history: Tensor,
        pending: Tensor,
        kept: KeptSpectra,
        elements: int | None = None,
    ):
        self.tile = tile
        self._tiles, self._kept, self._history = tiles, kept, history
        self._outputs = pending[:, :, tile.outputs.start : tile.outputs.stop]
        batch, inputs = history.shape[:2]
        side = tile.side
        self._missing = kept.reserve(tile, lambda: tiles.new_spectra(batch, inputs, side))
        fresh = () if tile.reused else (tile.inputs.stop - side,)
        # What is known of each block: the spectra of its inputs, None where only this tile needs them, and of filters.
        self._met = [
            (None if start in fresh else kept.of(side, start), self._filters(tiles, distance), distance)
            for start, distance in tile.blocks
        ]
        width = chunk_width(2 * side * batch, elements)
        # Floating-point operations a channel.
        self._transforming = batch * 5 * side * log2(2 * side)
        self._combining = batch * (side + 1) * (8 * len(tile.blocks) - 2)
        self._combining += self._transforming * (1 if tile.reused else 2)
        self._width, self._inputs, self._pairs = width, inputs, tiles.pairs(pending)
        self._forward = -(-inputs // width)
        self._before = len(self._missing) * self._forward  # pieces that transform, before those that combine
        self.count = self._before + -(-self._pairs // width)

    def run(self, index: int) -> None:
        """Piece `index` of `count`."""
        block, piece = divmod(index, self._forward)
        if block < len(self._missing):
            self._transform(self._missing[block], piece * self._width)
        else:
            self._combine((index - self._before) * self._width)

    def _transform(self, start: int, first: int) -> None:
        side, last = self.tile.side, min(first + self._width, self._inputs)
        inputs = self._history[:, first:last, start : start + side]
        self._kept.of(side, start)[:, first:last] = torch.fft.rfft(inputs, n=2 * side)

    def _filters(self, tiles: TorchTiles, distance: int) -> Tensor | None:
        once = tiles.meets_once(self.tile.side, distance)
        return None if once else tiles.spectrum(self.tile.side, distance)

    def _combine(self, first: int) -> None:
        side, (source, filter_index, target) = self.tile.side, self._tiles.maps
        pairs = (first, min(first + self._width, self._pairs))
        met = []
        for inputs, filters, distance in self._met:
            if inputs is None:
                newest = self._history[:, :, self.tile.inputs.stop - side : self.tile.inputs.stop]
                spectra = transform(newest, source, 2 * side, *pairs)
            else:
                spectra = take(inputs, source, 1, *pairs)
            if filters is None:
                met.append((spectra, tile_spectrum(self._tiles.filters[slice(*pairs)], side, distance)))
            else:
                met.append((spectra, take(filters, filter_index, 0, *pairs)))
        spectra, filters = met.pop()
        product = spectra.mul_(filters) if self._met[-1][0] is None else spectra * filters
        add_products(self._outputs, product, met, side, pairs, target)

    def operations(self, index: int) -> float:
        """Floating-point operations of a piece, as `Schedule.cost` counts them."""
        if index < self._before:
            return self._transforming * min(self._width, self._inputs - index % self._forward * self._width)
        return self._combining * min(self._width, self._pairs - (index - self._before) * self._width)

    @property
    def total(self) -> float:
        """Floating-point operations of all pieces."""
        return len(self._missing) * self._inputs * self._transforming + self._pairs * self._combining


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
        self._made: dict[tuple[str, int, int], Tensor] = {}

    def new_state(self, batch: int, channels: int) -> Tensor:
        """Zeros [B, C, capacity], positions contiguous."""
        return self.filters.new_zeros(batch, channels, self.filters.shape[1])

    def select_rows(self, state: Tensor, index: Tensor) -> Tensor:
        """Rows `index` of a state, int64 [B'], laid out as `new_state` does."""
        return state.index_select(0, index)

    def new_spectra(self, batch: int, channels: int, side: int) -> Tensor:
        """Room for the spectra of a block of `side` inputs, complex [B, C, side + 1]."""
        with torch.inference_mode(False):
            return self.filters.new_empty(batch, channels, side + 1, dtype=self.filters.dtype.to_complex())

    def pairs(self, pending: Tensor) -> int:
        """How many pairs of an input channel and a filter there are, for outputs [B, Cout, ...]."""
        target = self.maps[2]
        return pending.shape[1] if target is None else target.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of what was made of the filters so far."""
        return sum(t.nbytes for t in self._made.values())

    def form(self, tile: Tile) -> str:
        """How a tile runs: `direct` or `fft`."""
        length = len(tile.outputs) if len(tile.inputs) == tile.side else tile.side
        cost = tile_cost(tile.side, length)
        return min(cost, key=cost.__getitem__)

    def add(self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra) -> None:
        """Add to pending what a tile's inputs in history contribute."""
        form, alone = self.form(tile), not tile.reused and len(tile.inputs) == tile.side
        inputs = history[:, :, tile.inputs.start : tile.inputs.stop]
        outputs = pending[:, :, tile.outputs.start : tile.outputs.stop]
        if form != "fft":
            self._run(form, tile, outputs, inputs)
        elif alone and not self.meets_once(tile.side, distance := 1 + tile.gap // tile.side):
            add_tile_fft(outputs, inputs, self.spectrum(tile.side, distance), *self.maps)
        else:
            work = TileWork(self, tile, history, pending, kept)
            for piece in range(work.count):
                work.run(piece)

    def _run(self, form: str, tile: Tile, outputs: Tensor, inputs: Tensor) -> None:
        assert form == "direct"
        add_tile_direct(outputs, inputs, self.filters, *self.maps, tile.gap)

    def meets_once(self, side: int, distance: int) -> bool:
        """Whether one tile of a sequence at most meets these spectra, so that they are not worth keeping."""
        return self.maps[1] is None and (distance + 1) * side >= self.filters.shape[1]

    def prepare(self, schedule: Schedule) -> None:
        """Make the spectra that a schedule's tiles meet."""
        for side, distance in self._spectra_for(schedule):
            self.spectrum(side, distance)

    def predict_bytes(self, schedule: Schedule, batch: int, channels: int) -> tuple[int, int]:
        """Bytes of the spectra that a whole schedule leaves: of the filters, and of the inputs of one state."""
        value = self.filters.dtype.to_complex().itemsize
        ours = sum(side + 1 for side, _ in self._spectra_for(schedule)) * len(self.filters) * value
        by_transform = {tile.side for tile in schedule if self.form(tile) == "fft"}
        kept = sum(n * (side + 1) for side, n in schedule.kept_blocks().items() if side in by_transform)
        return ours, kept * batch * channels * value

    def _spectra_for(self, schedule: Schedule) -> set[tuple[int, int]]:
        met = {(tile.side, d) for tile in schedule if self.form(tile) == "fft" for _, d in tile.blocks}
        return {place for place in met if not self.meets_once(*place)}

    def spectrum(self, side: int, distance: int = 1) -> Tensor:
        """The filters' spectra for blocks of `side` at a distance, complex [F, side + 1], made on first use."""
        return self._keep("fft", side, lambda f, s: tile_spectrum(f, s, distance), distance)

    def _keep(self, form: str, side: int, make: Callable[[Tensor, int], Tensor], distance: int = 1) -> Tensor:
        if (form, side, distance) not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[form, side, distance] = make(self.filters, side)
        return self._made[form, side, distance]


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

    def add(self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra | None = None) -> None:
        """Add to pending what a tile's inputs in history contribute; `kept` is of use to other radices than 2."""
        self._batch = history.shape[0]  # which form is fastest depends on it; all are right
        super().add(tile, history, pending, KeptSpectra() if kept is None else kept)

    def _run(self, form: str, tile: Tile, outputs: Tensor, inputs: Tensor) -> None:
        if form == "direct":
            lags = self._keep(form, self._direct.LARGEST, self._direct.lag_table)
            self._direct.add_tile_direct_gpu(outputs, inputs, lags, *self.maps[:2])
        elif form == "matrix":
            spectrum = self._keep(form, tile.side, self._monarch.tile_spectrum_gpu)
            self._fft.add_tile_fft_gpu(outputs, inputs, spectrum, *self.maps[:2])
        else:
            spectrum = self._keep(form, tile.side, self._stream.tile_spectrum_stream)
            self._stream.add_tile_stream_gpu(outputs, inputs, spectrum, *self.maps[:2])


TILES = {"torch": TorchTiles, "triton": TritonTiles}
