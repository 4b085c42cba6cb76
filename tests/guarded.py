"""Operands between guard bands: a kernel that reads or writes past them is seen."""

import torch
from torch import Tensor


def rand(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal values, the same for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def channels_last(values: Tensor, gap: int = 0, fill: float = float("nan")) -> tuple[Tensor, Tensor]:
    """Values [B, C, T] as a view with contiguous channels, and the memory around it filled with `fill`.

    `gap` more channels, one more row and three positions lie on either side of the view's.
    """
    b, c, t = values.shape
    around = values.new_full((t + 6, b + 2, c + 2 * gap), fill)
    view = around[3 : 3 + t, 1 : 1 + b, gap : gap + c].permute(1, 2, 0)
    view.copy_(values)
    return view, around


def fenced(values: Tensor) -> tuple[Tensor, Tensor]:
    """The same for outputs: around them lie sevens, which a kernel that adds would change and NaN would hide."""
    return channels_last(values, gap=2, fill=7.0)


def untouched(around: Tensor, view: Tensor) -> bool:
    """Whether everything around a view made by `fenced` is as it was."""
    after = around.clone()
    torch.as_strided(after, view.shape, view.stride(), view.storage_offset()).fill_(7.0)
    return bool((after == 7).all())


def assert_close(actual: Tensor, expected: Tensor, scale: float, units: float) -> None:
    """Error at most `units` times eps of the dtype times `scale`, which is ‖inputs‖ · ‖filter‖ plus what was there."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max()
    assert error <= units * torch.finfo(actual.dtype).eps * scale, float(error)
