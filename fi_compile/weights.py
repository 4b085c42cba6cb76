"""Watch the live weights: identity and version on every call, a checksum when a sequence starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .program import Kind, Program


@dataclass(frozen=True)
class _Watched:
    owner: Mapping[str, Any]  # a module's own table of parameters, buffers or attributes
    key: str
    name: str  # of the program's input
    kind: Kind


class WeightWatch:
    """Strong references to every tensor a program read from its model, with their versions.

    ``unchanged()`` is cheap enough for every step. Writes that bump no version (``.data``, NumPy, fused optimisers)
    are seen only by ``changed()``.
    """

    def __init__(self, program: Program, model: nn.Module | None) -> None:
        self.program, self.model = program, model
        self.remember()

    def remember(self) -> None:
        """Take the present tensors and versions as the known ones."""
        self.watched = self._found()
        self._modules = [] if self.model is None else list(_submodules(self.program, self.model))
        self._known = [(w.owner, w.key, t := w.owner[w.key], _version(t)) for w in self.watched]
        self._sums = [checksum(tensor) for _, _, tensor, _ in self._known]

    def unchanged(self) -> bool:
        """Whether every watched tensor, and every module on the way to one, is the same object and version."""
        for owner, key, module in self._modules:
            if owner.get(key) is not module:
                return False
        for owner, key, tensor, version in self._known:
            if owner.get(key) is not tensor or (version is not None and tensor._version != version):
                return False
        return True

    def changed(self) -> list[str]:
        """Program inputs whose tensor, version or contents are no longer the known ones."""
        current = self.current()
        return [
            watched.name
            for watched, (_, _, tensor, version), known in zip(
                self.watched, self._known, self._sums, strict=True
            )
            if current.get(watched.name) is not tensor
            or (version is not None and tensor._version != version)
            or checksum(tensor) != known
        ]

    def copy(self) -> WeightWatch:
        """An independent watch that knows what this one knows."""
        twin = object.__new__(WeightWatch)
        twin.__dict__.update(self.__dict__)
        return twin

    def current(self) -> dict[str, Tensor]:
        """The model's present tensors by program input."""
        return {w.name: w.owner[w.key] for w in self._found()}

    def _found(self) -> list[_Watched]:
        return [] if self.model is None else list(_find(self.program, self.model))


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _find(program: Program, model: nn.Module) -> Iterable[_Watched]:
    for spec in program.inputs:
        if spec.path is None or spec.kind is Kind.SEQUENCE:
            continue
        path, _, key = spec.path.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        for owner in (module._parameters, module._buffers, vars(module)):
            if isinstance(owner.get(key), Tensor):
                yield _Watched(owner, key, spec.name, spec.kind)
                break


def _submodules(program: Program, model: nn.Module) -> Iterable[tuple[Mapping[str, Any], str, nn.Module]]:
    """Every module on the way to a watched tensor, with the table and key its parent holds it under."""
    paths = {spec.path.rpartition(".")[0] for spec in program.inputs if spec.path is not None}
    steps = {".".join(path.split(".")[: i + 1]) for path in paths if path for i in range(path.count(".") + 1)}
    for step in sorted(steps):
        parent, _, key = step.rpartition(".")
        try:
            owner = model.get_submodule(parent)
            yield owner._modules, key, owner.get_submodule(key)
        except AttributeError:
            continue


def checksum(tensor: Tensor) -> int:
    """A fingerprint of the contents: a position-weighted sum of the bits."""
    data = tensor.detach()
    if data.is_complex():
        data = torch.view_as_real(data)
    bits = data.contiguous().flatten().view(torch.uint8)
    whole = bits[: bits.numel() // 8 * 8].view(torch.int64)
    folded = whole[: whole.numel() // 63 * 63].view(-1, 63)
    rest = bits[folded.numel() * 8 :].to(torch.int64)
    rows = (folded * torch.arange(1, 64, dtype=torch.int64, device=data.device)).sum(1)
    mixed = (rows * (2 * torch.arange(rows.numel(), device=data.device) + 1)).sum()
    tail = (rest * torch.arange(1, rest.numel() + 1, device=data.device)).sum()
    return int(mixed * 31 + tail)
