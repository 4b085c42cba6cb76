"""Outputs of a growing sequence, handed out again and again without copying them where that is safe.

An output with a sequence axis gains rows; each call returns all of them, in a tensor of exactly the strides
that the model's own output has. Where the sequence axis is outermost in memory that tensor may be a piece of
a longer buffer. Two buffers alternate, because a caller usually still holds the previous result while
computing the next; a buffer is written and lent again only when nobody else holds its memory and nobody wrote
to it meanwhile. A write is seen by the version, one that bumps none (``.data``, DLPack, a storage) by the first
and the last row and one between them, which are compared, and memory that NumPy was given is not lent again; a
write that bumps no version, to few rows alone, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .inputs import same_bits

# A lent buffer lags behind the newest rows by at most this many, else it is forgotten.
_LAG = 64
_STRIDE = 617  # rows from one compared row to the next


class _Buffer:
    """Memory that is lent to callers: ``filled`` rows of it are known to be right."""

    def __init__(self, rows: int, row_elements: int, like: Tensor) -> None:
        self.flat = torch.empty(rows * row_elements, dtype=like.dtype, device=like.device)
        self.filled = 0
        self.row = row_elements
        self._storage = self.flat.untyped_storage()
        self._between = 0
        self._holders = self._uses()
        self._seal()

    def _uses(self) -> int:
        return torch._C._storage_Use_Count(self._storage._cdata)

    def _seal(self) -> None:
        """Note the version, and three rows: writes through ``.data`` or DLPack change no version."""
        self._version = self.flat._version
        last = max(self.filled - 1, 0)
        self._between = (self._between + _STRIDE) % (last + 1)
        self._places = torch.tensor([0, self._between, last], device=self.flat.device)
        self._seen = self._looked_at()

    def _looked_at(self) -> Tensor:
        return self.flat.view(-1, self.row).index_select(0, self._places)

    @property
    def free(self) -> bool:
        """Whether nobody but us holds the memory."""
        return self._uses() == self._holders

    @property
    def intact(self) -> bool:
        """Whether nobody wrote to the memory since it was lent, or freed it, or showed it to NumPy."""
        if not self._storage.resizable() or self._storage.nbytes() < self.flat.nbytes:
            return False
        return self.flat._version == self._version and same_bits(self._looked_at(), self._seen)

    def window(self, shape: Sequence[int], strides: Sequence[int], start: int = 0) -> Tensor:
        return self.flat.as_strided(shape, strides, start * self.row)

    def lend(self, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        self._seal()
        return self.window(shape, strides).detach()


Layout = Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]]


class Growing:
    """The known rows of one output along its sequence ``axis``.

    ``layout(length)`` gives the shape and strides the model's own output has at that length. ``private``
    keeps the rows to itself and hands out copies; so does an output whose first rows do not lie together in
    memory.
    """

    def __init__(self, axis: int, layout: Layout, private: bool = False) -> None:
        self.axis, self.layout = axis, layout
        self.private = private or not _outermost(axis, layout)
        self.length = 0
        self._master: Tensor | None = None  # [capacity, …], sequence axis first; private only
        self._buffers: list[_Buffer] = []
        self._recent: list[tuple[int, Tensor]] = []  # rows some buffer may lack: (position, [n, …])

    @property
    def nbytes(self) -> int:
        """Bytes held for this output."""
        held = [b.flat.nbytes for b in self._buffers] + [rows.nbytes for _, rows in self._recent]
        return sum(held) + (self._master.nbytes if self._master is not None else 0)

    def append(self, new: Tensor) -> None:
        """Add rows (sequence axis in place); nobody may write to ``new`` later."""
        rows = new.detach().movedim(self.axis, 0)
        if self.private:
            self._store(rows)
        else:
            self._recent.append((self.length, rows))
        self.length += rows.shape[0]

    def truncate(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        self.length = min(self.length, length)
        for buffer in self._buffers:
            buffer.filled = min(buffer.filled, self.length)
        self._recent = [(start, rows[: length - start]) for start, rows in self._recent if start < length]

    def read(self, length: int) -> Tensor | None:
        """The first ``length`` rows in the model's layout; None where a caller's writes have lost them."""
        shape, strides = self.layout(length)
        if self.private:
            assert self._master is not None
            return laid_out(self._master[:length].movedim(0, self.axis), strides)
        buffer = self._lendable(strides[self.axis])
        if buffer is None:
            return None
        for start, rows in self._recent:
            skipped = max(buffer.filled - start, 0)
            if skipped < rows.shape[0]:
                part = rows[skipped:].movedim(0, self.axis)
                buffer.window(part.shape, strides, start + skipped).copy_(part)
                buffer.filled = start + rows.shape[0]
        self._drop_recent()
        return buffer.lend(shape, strides)

    def copy(self) -> Growing | None:
        """The same rows, kept privately and apart from these; None where they were lost."""
        new = Growing(self.axis, self.layout, private=True)
        if self._master is not None:
            new._store(self._master[: self.length])
        elif self.length:
            whole = self.read(self.length)
            if whole is None:
                return None
            new._store(whole.movedim(self.axis, 0))
        new.length = self.length
        return new

    def reorder(self, index: Tensor, batch_axis: int, layout: Layout) -> Growing | None:
        """The rows of the batch at ``index`` (int64 [B']), kept privately; None where they were lost."""
        old = self.copy()
        if old is None or old._master is None:
            return None
        new = Growing(self.axis, layout, private=True)
        rows = old._master[: old.length].movedim(0, self.axis).index_select(batch_axis, index)
        new.append(rows)
        return new

    def _store(self, rows: Tensor) -> None:
        needed = self.length + rows.shape[0]
        if self._master is None or needed > self._master.shape[0]:
            bigger = rows.new_empty((_room(needed), *rows.shape[1:]))
            if self._master is not None:
                bigger[: self.length] = self._master[: self.length]
            self._master = bigger
        self._master[self.length : needed] = rows

    def _lendable(self, row: int) -> _Buffer | None:
        """A buffer nobody holds that has room: one of ours, or a new one filled from ours."""
        first = self._recent[0][0] if self._recent else self.length
        self._buffers = [b for b in self._buffers if b.filled >= first]
        for buffer in self._buffers:
            if buffer.free and self.length * row <= buffer.flat.numel() and buffer.intact:
                return buffer
        self._buffers = [b for b in self._buffers if b.intact]
        source = max(self._buffers, key=lambda b: b.filled, default=None)
        if source is None and first > 0:
            return None
        new = _Buffer(_room(self.length), row, source.flat if source else self._recent[0][1])
        if source is not None:
            new.flat[: source.filled * row] = source.flat[: source.filled * row]
            new.filled = source.filled
        self._buffers = [*self._buffers[-1:], new]
        return new

    def _drop_recent(self) -> None:
        """Forget rows that every buffer has, and buffers that lag far behind."""
        self._buffers = [b for b in self._buffers if self.length - b.filled <= _LAG]
        known = min(b.filled for b in self._buffers)
        self._recent = [(start, rows) for start, rows in self._recent if start + rows.shape[0] > known]


def _outermost(axis: int, layout: Layout) -> bool:
    """Whether an output's first rows lie together in memory at any length; axes of size 1 do not matter."""
    (shape, strides), (_, longer) = layout(5), layout(6)
    others = [i for i, size in enumerate(shape) if i != axis and size > 1]
    reach = sum((shape[i] - 1) * strides[i] for i in others)
    same = all(strides[i] == longer[i] for i in (axis, *others))
    return same and all(strides[i] > 0 for i in others) and reach < strides[axis]


def laid_out(value: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy of ``value`` with exactly these strides; an axis of stride 0 repeats its first entry."""
    kept = value
    for axis, stride in enumerate(strides):
        if stride == 0:
            kept = kept.narrow(axis, 0, 1)
    out = torch.empty_strided(kept.shape, strides, dtype=value.dtype, device=value.device)
    return out.copy_(kept).as_strided(value.shape, strides).detach()


def _room(rows: int) -> int:
    return max(64, rows + rows // 2)
