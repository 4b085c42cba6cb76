"""The model that is decoded end to end, its truth in float64, and decoders of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import fi_compile
from examples.hyena import HyenaConfig, HyenaLM

VOCAB = 256
BOUND = 10.0  # a decoder's error in units of the plain float32 forward's own


@lru_cache(maxsize=2)
def hyena(width: int, layers: int, length: int) -> HyenaLM:
    """A Hyena language model (Poli et al. 2023) with weights at random, and filters that matter up to its length."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = HyenaLM(
        HyenaConfig(VOCAB, width, layers, l_max=length, longest_memory=max(4.0, length / 8))
    ).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1 and "filter" not in name and "embed" not in name:
                value.mul_(2)  # a fresh model is nearly inert
    torch.random.set_rng_state(state)
    return model


def random_ids(batch: int, length: int) -> Tensor:
    """Ids at random [B, L]: what is decoded, so that any two ways compute the same numbers."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


@lru_cache(maxsize=1)
def _truth(model: nn.Module, batch: int, length: int) -> tuple[Tensor, float]:
    ids = random_ids(batch, length)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(ids)
        own = (model(ids).double() - exact).abs().max()
    return exact, float(own)


def check_logits(
    model: nn.Module, rows: Tensor, positions: Sequence[int] | None = None
) -> tuple[float, float, str]:
    """Logits [B, m, V] of `random_ids` at positions (default: all) against the model's float64 forward.

    Returns error, bound and what it was compared with, as `Section.check` takes them. The bound is BOUND times the
    error of the model's own float32 forward.
    """
    batch, length = rows.shape[0], rows.shape[1] if positions is None else max(positions) + 1
    exact, own = _truth(model, batch, length)
    exact = exact if positions is None else exact[:, list(positions)]
    error = float((rows.double() - exact).abs().max()) if bool(torch.isfinite(rows).all()) else float("inf")
    return error, BOUND * own, f"the forward in float64 at {rows.shape[1]} of {length} positions"


def decoder_for(model: nn.Module, length: int, batch: int = 1, **options: Any) -> fi_compile.Decoder:
    """A decoder at position 0, compiled: the first step is done and forgotten."""
    decoder = fi_compile.decoder(model, random_ids(batch, 16), max_length=length, options=options)
    decoder.step(random_ids(batch, 1)[:, 0])
    decoder.reset()
    return decoder


def weights_in_step(model: nn.Module, report: fi_compile.Report) -> int:
    """Bytes of the weights that a step reads: all but those that only long filters are computed from."""
    of_filters = {name for mixer in report.mixers if mixer.kind == "long_conv" for name in mixer.depends_on}
    return sum(p.nbytes for name, p in model.named_parameters() if name not in of_filters)
