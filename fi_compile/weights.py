"""Watch the live weights: identity and version on every call, a checksum when a sequence starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from operator import attrgetter, is_
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .extension import between
from .program import Kind, Program

_VERSION = attrgetter("_version")
_TABLES = ("_parameters", "_buffers", "_modules")  # of a module
_WORDS = 64  # of 32 bits that make one of 64 in a checksum
_ROWS = 1 << 12  # of them at once, in a processor's cache


@dataclass(frozen=True)
class _Watched:
    owner: dict[str, Any]  # a module's own table of parameters, buffers or attributes
    key: str
    name: str  # of the program's input
    kind: Kind


class WeightWatch:
    """Strong references to every tensor a program read from its model, with their versions, and where and how they lie.

    ``unchanged()`` is cheap enough for every step. Writes that bump no version (through ``.data``, NumPy, fused
    optimisers) are seen only by ``changed()``. ``native``: whether the extension may look, where there is one.
    ``sealed``: nobody exchanges what the model's modules hold; what the tensors hold may change all the same.
    """

    def __init__(
        self, program: Program, model: nn.Module | None, *, native: bool = False, sealed: bool = False
    ) -> None:
        self.program, self.model, self._native, self._sealed = program, model, native, sealed
        self.remember()

    def remember(self) -> None:
        """Take the present tensors and versions as the known ones."""
        self.watched = self._found()
        self._known = [(w.owner, w.key, t := w.owner[w.key], _version(t)) for w in self.watched]
        self._sums = [checksum(tensor) for _, _, tensor, _ in self._known]
        aliases = [] if self.model is None else list(_other_names(self.model, self.watched))
        held = [] if self._sealed else [*self._modules(), *aliases, *(known[:3] for known in self._known)]
        self._places = tuple(owner for owner, _, _ in held), tuple(key for _, key, _ in held)
        self._objects = tuple(value for _, _, value in held)
        flags = [tensor for _, _, tensor in aliases if is_flag(tensor) and not tensor.is_inference()]
        known = [tensor for _, _, tensor, version in self._known if version is not None]
        self._versioned = (*known, *flags)
        self._versions = tuple(tensor._version for tensor in self._versioned)
        self._layouts = tuple(map(_layout, self._versioned))
        self._structure = self._shape_of_model()
        self._looking: Callable[[], bool] | None = None  # the extension's own, once it is asked

    def unchanged(self) -> bool:
        """Whether every watched tensor, and every module on the way to one, is the same object as it was.

        Of tensors, also the version, and where and how their data lie.
        """
        looking = self._looking
        if looking is None:
            extension = between() if self._native else None
            if extension is None:
                return self._looks_unchanged()
            known = self._versioned, self._versions, self._layouts
            looking = self._looking = extension.Watch(*self._places, self._objects, *known)
        return looking()

    def _looks_unchanged(self) -> bool:
        return (
            all(map(is_, map(dict.get, *self._places), self._objects))
            and tuple(map(_VERSION, self._versioned)) == self._versions
            and tuple(map(_layout, self._versioned)) == self._layouts
        )

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

    def restructured(self) -> bool:
        """Whether modules were exchanged, hooked, switched or given other settings, or weights tied: trace again.

        Settings are a module's own numbers, strings, flags and loose tensors, in containers too, and which other
        objects it keeps, such as functions; what those keep is not seen.
        """
        return self._shape_of_model() != self._structure

    def _shape_of_model(self) -> tuple[Any, ...]:
        if self.model is None:
            return ()
        modules = tuple((name, _Same(m), _python_side(m)) for name, m in self.model.named_modules())
        paths: dict[int, list[str]] = {}
        for name, tensor in (
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ):
            paths.setdefault(id(tensor), []).append(name)
        return modules, frozenset(tuple(names) for names in paths.values())

    def copy(self) -> WeightWatch:
        """An independent watch that knows what this one knows."""
        twin = object.__new__(WeightWatch)
        twin.__dict__.update(self.__dict__)
        return twin

    def current(self) -> dict[str, Tensor]:
        """The model's present tensors by program input."""
        return {w.name: w.owner[w.key] for w in self._found()}

    def _modules(self) -> Iterable[tuple[dict[str, Any], str, Any]]:
        """Every module on the way to a watched tensor, and the tables of each, with what holds them."""
        if self.model is not None:
            below = list(_submodules(self.program, self.model))
            yield from below
            for module in (self.model, *(module for _, _, module in below)):
                yield from ((vars(module), table, vars(module).get(table)) for table in _TABLES)

    def _found(self) -> list[_Watched]:
        return [] if self.model is None else list(_find(self.program, self.model))


def _python_side(module: nn.Module) -> tuple[Any, ...]:
    """What a forward may read besides parameters: its mode, settings, tensors in containers, flags, hooks."""
    own = {k: v for k, v in vars(module).items() if k not in _TORCH_OWN}
    flags = tuple((name, b.item()) for name, b in module._buffers.items() if is_flag(b))
    return (
        module.training,
        _settings(own),
        flags,
        tuple(module._forward_hooks),
        tuple(module._forward_pre_hooks),
    )


_TORCH_OWN = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, type(None))


def _settings(value: Any, depth: int = 3) -> Any:
    """A comparable image of plain values and tensors, in containers too."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return _Same(value), _version(value)
    if depth and isinstance(value, dict):
        return tuple((str(k), _settings(v, depth - 1)) for k, v in value.items())
    if depth and isinstance(value, (list, tuple)):
        return tuple(_settings(v, depth - 1) for v in value)
    return _Same(value)


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to another reference to the same object, which it keeps alive."""

    what: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.what is self.what

    def __hash__(self) -> int:
        return id(self.what)


def is_flag(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a buffer holds one whole number or truth value: what a forward may branch on."""
    if tensor is None or tensor.numel() != 1 or tensor.is_meta:
        return False
    return not (tensor.is_floating_point() or tensor.is_complex())


def _layout(tensor: Tensor) -> tuple[int, ...]:
    """Where the data of a tensor lie, and how: its sizes and strides; nothing of a subclass, which may have none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and torch._C._has_storage(tensor)
    return (tensor.data_ptr(), *tensor.shape, *tensor.stride()) if plain else ()


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


def _other_names(
    model: nn.Module, watched: Iterable[_Watched]
) -> Iterable[tuple[dict[str, Any], str, Tensor]]:
    """Parameters and buffers under names the trace did not keep: tied to a watched one, or unused."""
    known = {(id(w.owner), w.key) for w in watched}
    for module in model.modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None and (id(owner), key) not in known:
                    yield owner, key, tensor


def _submodules(program: Program, model: nn.Module) -> Iterable[tuple[dict[str, Any], str, nn.Module]]:
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
    """A fingerprint of the contents: sums of 32-bit words by random 64-bit weights, and of these sums, to the last.

    Multilinear hashing (Carter and Wegman, JCSS 1979): two contents collide with a probability of about 2**-32 a
    level, whatever they are; negated and exchanged entries are other contents.
    """
    data = tensor.detach()
    if data.is_complex():
        data = torch.view_as_real(data)
    words = data.contiguous().flatten().view(torch.uint8)
    words = torch.nn.functional.pad(words, (0, -words.numel() % 4)).view(torch.int32)
    factors, number = _hash_factors(data.device), tensor.numel()
    while words.numel() > 2:
        whole = words[: words.numel() // _WORDS * _WORDS].view(-1, _WORDS)
        rest = words[whole.numel() :]
        sums = [(part * factors).sum(1) for part in whole.split(_ROWS)]
        words = torch.cat([*sums, (rest * factors[: rest.numel()]).sum(0, keepdim=True)]).view(torch.int32)
    return hash((number, *words.tolist()))


@cache
def _hash_factors(device: torch.device) -> Tensor:
    """Fixed random 64-bit numbers, int64 [_WORDS]."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randint(-(2**63), 2**63 - 1, (_WORDS,), generator=generator).to(device)
