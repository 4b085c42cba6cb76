"""Tiles by Triton kernels: whole, or in pieces of channels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fi_compile.errors import FlashinfWarning
from fi_compile.kernels.channels import Fan, chunk_width
from fi_compile.schedule import Schedule, Tile

from .tile_work import KeptSpectra, SpectralWork, TileWork, operations_of
from .tiles import TorchTiles

# Pieces of a tile begin at multiples of this many channels: of whole programs, and of addresses for wide loads.
_QUANTUM = 128


class TritonTiles(TorchTiles):
    """Tiles by Triton: direct in registers, then transforms on matrix units, in one launch or in three; or torch's.

    The choice goes by what was measured (see `kernels.tuning`), else by the time that an H100's datasheet predicts.
    precision: of products on matrix units, one of `kernels.gpu.PRECISIONS`.
    """

    def __init__(
        self,
        filters: Tensor,
        source: Tensor | None,
        filter_index: Tensor | None,
        target: Tensor | None = None,
        precision: str = "float32",
    ):
        # Only here: who stays with torch's kernels needs no Triton.
        from fi_compile.kernels import tile_direct, tile_fft, tile_forms, tile_kept, tile_stream, tuning
        from fi_compile.kernels.gpu import H100
        from fi_compile.kernels.monarch import tile_spectrum_gpu, tile_spectrum_stream

        super().__init__(filters, source, filter_index, target)
        self.precision = precision
        # Which pairs an output channel reads, and how many on average.
        self.fan = Fan.of(target)
        self.mean = 1 if self.fan is None else self.fan.mean
        self._direct, self._forms, self._by_kept = tile_direct, tile_forms, tile_kept
        self._rates = H100.at(precision)
        self._by_form = {
            "matrix": (tile_spectrum_gpu, tile_fft.add_tile_fft_gpu),
            "stream": (tile_spectrum_stream, tile_stream.add_tile_stream_gpu),
        }
        # Spectra of the filters at a range of distances, by form and side.
        self._distant: dict[tuple[str, int], tuple[range, Tensor]] = {}
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

    @property
    def nbytes(self) -> int:
        """Bytes of what was made of the filters so far."""
        return super().nbytes + sum(spectra.nbytes for _, spectra in self._distant.values())

    def offered(self, side: int) -> list[str]:
        """The forms that serve tiles of `side`: `direct`, `matrix` and `stream` by kernels, `fft` by torch."""
        return self._forms.offered(side, self.filters.dtype, self.filters.device)

    def form(self, tile: Tile) -> str:
        """How a tile runs: the fastest of those that are offered."""
        side, length = tile.side, len(tile.outputs)
        place = self.filters.dtype, self.filters.device
        kept = self._keeps(tile)
        # All tiles of a side that keep spectra take one form, as if each were whole and met two blocks.
        length = side if kept else length
        maps = self.maps[0] if self.maps[0] is not None else self.maps[1]
        channels = self.filters.shape[0] if maps is None else len(maps)
        key = self._architecture, self.precision, channels, self._batch, side, 2 if kept else 1
        # What was measured are whole tiles of single inputs; those at the capacity may be clipped.
        measured = length == side and self.fan is None
        found = self._measured.fastest(key, self.offered(side)) if measured else None
        return found or self._forms.fastest(self._rates, side, length, *place, kept, self.mean)

    def _keeps(self, tile: Tile) -> bool:
        """Whether spectra of a tile's inputs are kept: where several tiles meet them, or several outputs."""
        return not tile.alone or tile.gap > 0 or self.fan is not None

    def _at_once(self, form: str, tile: Tile) -> bool:
        return super()._at_once(form, tile) if form == "fft" else form != "direct" and not self._keeps(tile)

    def add(self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra | None = None) -> None:
        """Add to pending what a tile's inputs in history contribute; `kept` is of use to tiles of several blocks."""
        self._batch = history.shape[0]
        super().add(tile, history, pending, KeptSpectra() if kept is None else kept)

    def begin(
        self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra, elements: int | None = None
    ) -> TileWork:
        """The same in pieces, each a launch or two; without `elements` in one for all channels."""
        # Which form is fastest depends on it; all are right.
        self._batch = history.shape[0]
        form = self.form(tile)
        if form == "fft":
            return super().begin(tile, history, pending, kept, elements)
        return _Work(self, form, tile, history, pending, kept, elements)

    def _run(self, form: str, tile: Tile, outputs: Tensor, inputs: Tensor) -> None:
        if form == "fft":
            super()._run(form, tile, outputs, inputs)
        else:
            make, add = self._by_form[form]
            add(outputs, inputs, self._keep(form, tile.side, make), *self.maps[:2], self.precision)

    def lags(self, count: int) -> Tensor:
        """The filters position-major, [T, F]: all of their lags, or `count` at least."""
        table = self._made.get(("direct", 0, 1))
        if table is None or len(table) < min(count, self.filters.shape[1]):
            most = max(self._direct.LARGEST, 1 << (count - 1).bit_length() - 1)
            self._made.pop(("direct", 0, 1), None)
            table = self._keep("direct", 0, lambda f, _: self._direct.lag_table(f, most))
        return table

    def distant(self, form: str, side: int, distances: range) -> Tensor:
        """Spectra of the filters for blocks of `side` from the first of some distances on, [F, D, 2, ...]."""
        known, spectra = self._distant.get((form, side), (distances, None))
        if spectra is None or distances.start < known.start or distances.stop > known.stop:
            wanted = range(min(known.start, distances.start), max(known.stop, distances.stop))
            with torch.inference_mode(False), torch.no_grad():
                spectra = self._by_kept.distant_spectra(form, self.filters, side, wanted)
            known = wanted
            self._distant[form, side] = known, spectra
        return spectra[:, distances.start - known.start :]

    def prepare(self, schedule: Schedule) -> None:
        """Make the spectra that a schedule's tiles meet."""
        super().prepare(schedule)
        for need in self._needs(schedule):
            if need.form == "direct":
                self.lags(need.lags)
            elif need.kept:
                self.distant(need.form, need.side, need.distances)
            else:
                self._keep(need.form, need.side, self._by_form[need.form][0])

    def predict_bytes(self, schedule: Schedule, batch: int, channels: int) -> tuple[int, int]:
        """Bytes of the spectra that a whole schedule leaves: of the filters, and of the inputs of one state."""
        self._batch = batch
        ours, kept = super().predict_bytes(schedule, batch, channels)
        lags, spectra, rows = 0, dict[tuple[str, int, bool], range](), dict[tuple[str, int], int]()
        for need in self._needs(schedule):
            lags = max(lags, need.lags)
            if need.form != "direct":
                key = need.form, need.side, need.kept
                known = spectra.get(key, need.distances)
                spectra[key] = range(
                    min(known.start, need.distances.start), max(known.stop, need.distances.stop)
                )
                if need.kept:
                    rows[key[:2]] = max(rows.get(key[:2], 0), len(need.distances))
        if lags:
            most = 2 * max(self._direct.LARGEST, 1 << (lags - 1).bit_length() - 1)
            ours += min(most, self.filters.shape[1]) * len(self.filters) * self.filters.itemsize
        ours += sum(len(d) * self._values(*key[:2]) for key, d in spectra.items()) * 4 * len(self.filters)
        kept += sum(n * self._values(*key) for key, n in rows.items()) * 4 * batch * channels
        return ours, kept

    def _values(self, form: str, side: int) -> int:
        how = self._forms.how_by(form, side)
        return 2 * how.h * how.n

    def _needs(self, schedule: Schedule) -> Iterator[_Need]:
        """What each tile by kernels reads that was made of the filters."""
        for tile in schedule:
            form = self.form(tile)
            far = [distance for _, distance in tile.blocks]
            lags = tile.gap + len(tile.inputs) + len(tile.outputs) if form == "direct" else 0
            if form != "fft":
                yield _Need(form, tile.side, self._keeps(tile), range(far[-1], far[0] + 1), lags)


@dataclass(frozen=True)
class _Need:
    form: str
    side: int
    kept: bool
    distances: range
    lags: int


class _Work(SpectralWork):
    """A tile by kernels whose spectra are kept, or a direct one, in pieces of whole programs."""

    def __init__(
        self,
        tiles: TritonTiles,
        form: str,
        tile: Tile,
        history: Tensor,
        pending: Tensor,
        kept: KeptSpectra,
        elements: int | None,
    ):
        self._tiles, self._form, self._kept, self._history = tiles, form, kept, history
        self._outputs = pending[:, :, tile.outputs.start : tile.outputs.stop]
        batch, inputs = history.shape[:2]
        outputs, missing = pending.shape[1], []
        if form == "direct":
            costs = 0.0, 2.0 * batch * len(tile.inputs) * len(tile.outputs) * tiles.mean
        else:
            far = [distance for _, distance in tile.blocks]
            self._spectra = tiles.distant(form, tile.side, range(far[-1], far[0] + 1))
            missing = kept.reserve(tile, [start for start, _ in tile.blocks], self._new_ring())
            forward, combining = operations_of(tile, batch, fresh=False)
            costs = forward, forward + (combining - forward) * tiles.mean
        width = max(inputs, outputs) if elements is None else chunk_width(2 * tile.side * batch, elements)
        super().__init__(tile, missing, inputs, outputs, -(-width // _QUANTUM) * _QUANTUM, *costs)

    def _new_ring(self) -> Callable[[int], Tensor]:
        batch, inputs = self._history.shape[:2]
        shape = self._spectra.shape[2:]

        def new(rows: int) -> Tensor:
            with torch.inference_mode(False):
                return self._spectra.new_empty(rows, batch, inputs, *shape)

        return new

    def _transform(self, start: int, first: int, last: int) -> None:
        inputs = self._history[:, first:last, start : start + self.tile.side]
        kept = self._kept.of(self.tile.side, start)[:, first:last]
        self._tiles._by_kept.keep_spectra_gpu(kept, inputs, self._tiles.precision)

    def _combine(self, first: int, last: int) -> None:
        tile, (source, filter_index, _), fan = self.tile, self._tiles.maps, self._tiles.fan
        outputs = self._outputs[:, first:last]
        # Pairs count from the first of all: what a piece of the outputs reads lies anywhere.
        mine, fan = (slice(first, last), None) if fan is None else (slice(None), fan.channels(first, last))
        places = [None if index is None else index[mine] for index in (source, filter_index)]
        of_inputs = mine if source is None else slice(None)
        of_filters = mine if filter_index is None else slice(None)
        if self._form == "direct":
            inputs = self._history[:, of_inputs, tile.inputs.start : tile.inputs.stop]
            lags = self._tiles.lags(tile.gap + len(tile.inputs) + len(tile.outputs))[tile.gap :, of_filters]
            self._tiles._direct.add_tile_direct_gpu(outputs, inputs, lags, *places, fan)
            return
        ring, spectra = self._kept.ring(tile.side)[:, :, of_inputs], self._spectra[of_filters]
        oldest = self._kept.row(tile.side, tile.inputs.start)
        count, precision = len(tile.blocks), self._tiles.precision
        self._tiles._by_kept.add_kept_gpu(outputs, ring, oldest, count, spectra, *places, fan, precision)
