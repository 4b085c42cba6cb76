"""How the examples compare what a decoder said with the model it came from."""

import copy

import torch
from torch import Tensor, nn

LIMIT = 16.0  # a wrong filter, gate or position is off by thousands


@torch.inference_mode()
def error_ratio(model: nn.Module, ids: Tensor, logits: Tensor) -> float:
    """Largest error of `logits` in units of the plain forward's own rounding error.

    `model` maps ids [B, L] to [B, L, V]; `logits` [B, n, V] claim to be its last n positions. The
    truth is the model in float64. The unit is the largest error of the plain float32 forward
    against it, at least the machine epsilon times the largest logit.
    """
    last = logits.shape[1]
    plain = model(ids)[:, -last:]
    exact = copy.deepcopy(model).double()(ids)[:, -last:]
    epsilon = torch.finfo(plain.dtype).eps * exact.abs().max()
    unit = torch.maximum((plain - exact).abs().max(), epsilon)
    return float((logits - exact).abs().max() / unit)


def assert_same(model: nn.Module, ids: Tensor, logits: Tensor) -> float:
    """`error_ratio`, or an AssertionError where it is not a matter of rounding."""
    ratio = error_ratio(model, ids, logits)
    if not ratio <= LIMIT:  # NaN fails too
        raise AssertionError(f"off by {ratio:.1f} times the plain forward's own rounding error")
    return ratio
