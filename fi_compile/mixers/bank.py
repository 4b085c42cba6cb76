"""The filters of all long convolutions of a model as one bank, and what runs their tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fi_compile.costs import piece_elements
from fi_compile.kernels.block import block_table
from fi_compile.kernels.prefix import write_prefix
from fi_compile.schedule import SLACK, Schedule, Tile

from .lane_tiles import LaneTiles
from .pairs import count_pairs
from .tile_work import KeptSpectra, TileWork
from .tiles import TorchTiles
from .triton_tiles import TritonTiles

TILES = {"torch": TorchTiles, "native": LaneTiles, "triton": TritonTiles}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model of `dtype` keeps its state: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class FilterBank:
    """The filters of a stack at one capacity: immutable, a copy of what it was given.

    filters: [F, capacity], float32 or float64, lag 0 first, in one tensor or in several that are put together.
    source: int64 [Cout], the input channel of each output channel; None where they are the same. filter_index: int64
    [Cout], the filter of each output channel; None where each has its own. block: the base block K. target: int64 [P],
    ascending, where output channels read several inputs each: `source` and `filter_index` then count pairs, and pair p
    belongs to output channel `target[p]`; None where a pair is an output channel. kernels: `torch`, `native`
    or `triton`, what runs the tiles (see `tiles`); precision: of their products on matrix units.

    reach: the number of lags from the first to the last that is not zero, where a sequence may go on beyond the
    capacity; None where it ends there. A state then drops inputs that no filter reaches any more, and keeps
    capacity // 2 >= reach + SLACK - 1 at least.

    radix, deferred: the tiling, see `Schedule`. Where tiles are deferred a step sums two base blocks of K/2 positions,
    K even, the current one and the one before.

    keep_history: whether all inputs stay at hand. Else `capacity` is half of the `total` positions that the filters
    reach, in whole blocks: half way a state gives up its inputs for what they contribute to the second half. Not with
    deferred tiles or a reach; where less than two blocks can be saved everything is kept.

    block_table [2K, P] is what `kernels.block.block_sum` reads; skip [P] is lag 0. Raises
    ValueError for shapes, indices or dtypes that do not fit together.
    """

    def __init__(
        self,
        filters: Tensor | Sequence[Tensor],
        source: Tensor | None = None,
        filter_index: Tensor | None = None,
        target: Tensor | None = None,
        *,
        channels_in: int,
        block: int,
        reach: int | None = None,
        kernels: str = "torch",
        precision: str = "float32",
        radix: int = 2,
        deferred: bool = False,
        keep_history: bool = True,
    ):
        parts = [filters] if isinstance(filters, Tensor) else list(filters)
        for part in parts:
            if part.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"filters are float32 or float64, found {part.dtype}")
            if part.ndim != 2 or part.shape[1] < 1:
                raise ValueError(f"filters are [F, capacity], found {list(part.shape)}")
        count = sum(len(part) for part in parts)
        if block < 1:
            raise ValueError(f"a base block has at least one position, found {block}")
        if deferred and block % 2:
            raise ValueError(f"deferred tiles need two equal blocks, found {block} positions")
        if not keep_history and (deferred or reach is not None):
            raise ValueError("a history is not given up with deferred tiles, nor where filters have a reach")
        pairs = count_pairs(source, filter_index, channels_in, count)
        if target is not None and (target.numel() != pairs or bool((target.diff() < 0).any())):
            raise ValueError(
                f"target is ascending, one value for each of {pairs} pairs; found {target.numel()}"
            )
        # Ordinary tensors of our own, also under inference mode: they outlive the call.
        with torch.inference_mode(False), torch.no_grad():
            self.filters = torch.cat([part.detach() for part in parts])
            self.source = None if source is None else source.detach().clone()
            self.filter_index = None if filter_index is None else filter_index.detach().clone()
            self.target = None if target is None else target.detach().clone()
            self.block_table = block_table(self.filters, block, self.filter_index)
            lag0 = self.filters[:, 0]
            index = self.filter_index
            self.skip = lag0.clone() if index is None else lag0.index_select(0, index)
        half = -(-self.total // (4 * block)) * 2 * block
        self.capacity = self.total if keep_history or half + 2 * block > self.total else half
        self.channels_in = channels_in
        self.channels_out = pairs if target is None else int(target[-1]) + 1
        self.block = block
        self.hop = block // 2 if deferred else block
        self.reach = reach
        if reach is not None and (self.capacity // 2 < reach + SLACK - 1 or self.capacity % (2 * block)):
            raise ValueError(
                f"filters that reach {reach} lags need a capacity of two halves, each of whole blocks and"
                f" of {reach + SLACK - 1} positions or more; found {self.capacity}"
            )
        chosen = "torch" if target is not None and kernels == "native" else kernels  # it knows no pairs
        if precision != "float32" and chosen != "triton":
            raise ValueError(f"tiles by {chosen!r} compute in the dtype of the filters, not in {precision!r}")
        lower = {} if precision == "float32" else {"precision": precision}
        maps = self.source, self.filter_index, self.target
        self.tiles = TILES[chosen](self.filters[:, : self.capacity], *maps, **lower)
        self.radix, self.deferred = radix, deferred
        if deferred:
            # Made now: on first use it would hold up a single position.
            self.tiles.prepare(self.schedule(0))

    @property
    def total(self) -> int:
        """The number of positions the filters reach."""
        return self.filters.shape[1]

    @property
    def halved(self) -> bool:
        """Whether a state gives up its inputs half way."""
        return self.capacity < self.total

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of filters and state."""
        return self.filters.dtype

    def schedule(self, origin: int) -> Schedule:
        """The tiling of the positions from `origin` on."""
        return Schedule(self.hop, self.capacity, origin, self.radix, self.deferred)

    @property
    def in_place(self) -> bool:
        """Whether inputs and what is pending of outputs can share memory: each channel has one of both."""
        return self.source is None and self.target is None and self.channels_in == self.channels_out

    @property
    def nbytes(self) -> int:
        """Bytes of filters, tables and what the tiles have made of them so far."""
        return self.own_bytes + self.tiles.nbytes

    @property
    def own_bytes(self) -> int:
        """Bytes of filters and tables."""
        tensors = [self.filters, self.block_table, self.skip]
        tensors += [t for t in (self.source, self.filter_index, self.target) if t is not None]
        return sum(t.nbytes for t in tensors)

    def predict_bytes(self, batch: int = 1) -> dict[str, int]:
        """Bytes of a state and of this bank once a whole sequence was decoded: what they are, and how many."""
        spectra, kept = self.tiles.predict_bytes(self.schedule(0), batch, self.channels_in)
        rows = self.channels_in + self.channels_out
        large = self.capacity * (self.channels_in if self.in_place else rows)
        state = batch * self.dtype.itemsize * (large + self.block * rows)
        return {
            "state": state,
            "spectra of inputs": kept,
            "filters": self.own_bytes,
            "spectra of filters": spectra,
        }

    def add_tile(self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra) -> None:
        """Add to pending [B, Cout, capacity] what a tile's inputs in history contribute."""
        self.tiles.add(tile, history, pending, kept)

    def begin_tile(self, tile: Tile, history: Tensor, pending: Tensor, kept: KeptSpectra) -> TileWork:
        """The same in pieces, none of which has run yet."""
        elements = piece_elements(self.schedule(0), self.channels_out * history.shape[0])
        return self.tiles.begin(tile, history, pending, kept, elements)

    def write_prefix(self, history: Tensor, pending: Tensor, length: int) -> None:
        """Make pending[..., length:] what the first `length` inputs contribute, and no more."""
        filters = self.filters[:, : self.capacity]
        inputs, outputs = history[:, :, :length], pending[:, :, length:]
        write_prefix(outputs, inputs, filters, self.source, self.filter_index, self.target)

    def write_rest(self, inputs: Tensor, pending: Tensor) -> None:
        """Make pending what `inputs` [B, Cin, P] contribute to the positions from P on, at most `capacity` of them.

        The two may share memory where channels map one to one: a chunk of channels is read before it is written.
        """
        rest = self.total - inputs.shape[-1]
        write_prefix(pending[:, :, :rest], inputs, self.filters, self.source, self.filter_index, self.target)
        pending[:, :, rest:] = 0
