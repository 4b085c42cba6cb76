"""How a bank of filters runs its tiles: by torch here, compiled for a CPU (`lane_tiles`), by Triton (`triton_tiles`).

All take the state of a stack, history and pending [B, C, capacity], and add what one tile contributes. They differ
in how that state lies in memory: transforms on a CPU want positions contiguous, Triton's kernels channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fi_compile.errors import InputError
from fi_compile.extension import lanes
from fi_compile.kernels.channels import chunk_width, on_host, take, transform
from fi_compile.kernels.tile import add_products, add_tile_direct, add_tile_fft, tile_cost, tile_spectrum
from fi_compile.schedule import Schedule, Tile

from .tile_work import KeptSpectra, SpectralWork, TileWork, operations_of


def choose_kernels(option: str, device: torch.device) -> str:
    """`torch`, `native` or `triton` for a device: what the option says, for `auto` the fastest of those that run.

    Raises InputError where what is asked for cannot run.
    """
    if option == "native" or (option == "auto" and device.type == "cpu"):
        if device.type == "cpu" and lanes() is not None:
            return "native"
        if option == "native":
            raise InputError(
                f"option kernels='native': expected a model on the CPU and a C++ compiler (g++), found {device.type!r}"
                f"{'' if lanes() else ' and none that builds the tiles'}; use kernels='auto'"
            )
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


def check_precision(precision: str, kernels: str, dtype: torch.dtype) -> None:
    """Raise InputError where a lower precision is asked for and nothing would be computed in it."""
    if precision == "float32":
        return
    if kernels != "triton":
        raise InputError(
            f"option precision={precision!r} is of matrix units, which Triton kernels use: expected"
            f" kernels='triton' on a GPU, found {kernels!r}; use precision='float32'"
        )
    if dtype == torch.float64:
        raise InputError(
            f"option precision={precision!r}: a float64 model computes in float64 throughout; use precision='float32',"
            " or convert the model"
        )


# Values from which on transposing a matrix is faster than writing columns.
_MATRIX = 1 << 15


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
        if target is not None:
            on_host(target)
        self._made: dict[tuple[str, int, int], Tensor] = {}

    def new_state(self, batch: int, channels: int) -> Tensor:
        """Zeros [B, C, capacity], positions contiguous."""
        return self.filters.new_zeros(batch, channels, self.filters.shape[1])

    def select_rows(self, state: Tensor, index: Tensor) -> Tensor:
        """Rows `index` of a state, int64 [B'], laid out as `new_state` does."""
        return state.index_select(0, index)

    def write_columns(self, columns: Tensor, rows: Tensor) -> None:
        """Positions of a state [B, C, n] from a block's rows [n, B, C]."""
        if columns.stride(2) == 1 and rows.numel() >= _MATRIX:
            # Transposed as one matrix, and only then spread over rows a capacity apart.
            columns.copy_(rows.flatten(1).t().contiguous().view(columns.shape))
        else:
            columns.copy_(rows.permute(1, 2, 0))

    def read_columns(self, rows: Tensor, columns: Tensor) -> None:
        """A block's rows [n, B, C] from positions of a state [B, C, n]."""
        if columns.stride(2) == 1:
            # Compact first: transposing out of rows a capacity apart misses the cache at every value.
            columns = columns.contiguous()
        rows.copy_(columns.permute(2, 0, 1))

    def new_spectra(self, rows: int, batch: int, channels: int, side: int) -> Tensor:
        """Room for the spectra of so many blocks of `side` inputs, complex [R, B, C, side + 1]."""
        with torch.inference_mode(False):
            dtype = self.filters.dtype.to_complex()
            return self.filters.new_empty(rows, batch, channels, side + 1, dtype=dtype)

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
        form = self.form(tile)
        if self._at_once(form, tile):
            inputs = history[:, :, tile.inputs.start : tile.inputs.stop]
            self._run(form, tile, pending[:, :, tile.outputs.start : tile.outputs.stop], inputs)
        else:
            self.begin(tile, history, pending, kept).run_all()

    def begin(
        self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra, elements: int | None = None
    ) -> TileWork:
        """The same in pieces, none of which has run yet; elements: values that a piece works on."""
        return _Work(self, tile, history, pending, kept, elements)

    def _at_once(self, form: str, tile: Tile) -> bool:
        """Whether a tile runs in one call: directly, or by transforms that need no spectra of inputs beside its own."""
        return form == "direct" or (tile.alone and not self.meets_once(tile.side, 1 + tile.gap // tile.side))

    def _run(self, form: str, tile: Tile, outputs: Tensor, inputs: Tensor) -> None:
        if form == "direct":
            add_tile_direct(outputs, inputs, self.filters, *self.maps, tile.gap)
        else:
            spectrum = self.spectrum(tile.side, 1 + tile.gap // tile.side)
            add_tile_fft(outputs, inputs, spectrum, *self.maps)

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


class _Work(SpectralWork):
    """A tile by torch's transforms: those of the newest block with the products where only this tile meets it.

    elements: values of a transform that one piece works on.
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
        self._tiles, self._kept, self._history = tiles, kept, history
        self._outputs = pending[:, :, tile.outputs.start : tile.outputs.stop]
        batch, inputs = history.shape[:2]
        side, starts = tile.side, [start for start, _ in tile.blocks]
        kept_starts = starts if tile.reused else starts[:-1]
        missing = kept.reserve(tile, kept_starts, lambda rows: tiles.new_spectra(rows, batch, inputs, side))
        # What is known of each block: the spectra of its inputs, None where only this tile needs them, and of filters.
        self._met = [
            (kept.of(side, start) if start in kept_starts else None, self._filters(tile, distance), distance)
            for start, distance in tile.blocks
        ]
        width, costs = chunk_width(2 * side * batch, elements), operations_of(tile, batch, not tile.reused)
        super().__init__(tile, missing, inputs, tiles.pairs(pending), width, *costs)

    def _transform(self, start: int, first: int, last: int) -> None:
        side = self.tile.side
        inputs = self._history[:, first:last, start : start + side]
        self._kept.of(side, start)[:, first:last] = torch.fft.rfft(inputs, n=2 * side)

    def _filters(self, tile: Tile, distance: int) -> Tensor | None:
        once = self._tiles.meets_once(tile.side, distance)
        return None if once else self._tiles.spectrum(tile.side, distance)

    def _combine(self, first: int, last: int) -> None:
        side, (source, filter_index, target) = self.tile.side, self._tiles.maps
        pairs, met = (first, last), []
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
