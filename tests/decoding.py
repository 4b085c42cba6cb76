"""Helpers for tests of the decoder: models, sequences, decoders, and how errors are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fi_compile
from corpus import OTHERS, SPELLINGS, LanguageModel, scale_weights

EAGER = {"step": "eager"}
VOCAB = 11


def by_speed(names: Iterable[Any], is_quick: Callable[[Any], bool]) -> list[Any]:
    """What to parametrize a test with; those that are not quick run with `-m slow`."""
    return [pytest.param(n, marks=() if is_quick(n) else pytest.mark.slow) for n in names]


def one_in(count: int, names: Iterable[str]) -> list[Any]:
    """The same where one in ``count`` is quick, so that all kinds are among them."""
    chosen = set(list(names)[::count])
    return by_speed(names, chosen.__contains__)


def language_model(
    *mixers: str,
    width: int = 6,
    l_max: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **style: Any,
) -> nn.Module:
    """A model of the named mixers, ids [B, L] -> logits, with weights under which every mixer matters."""
    table = {**SPELLINGS, **OTHERS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [table[name](width, l_max) for name in mixers]
        model = LanguageModel(blocks, width, VOCAB, l_max=l_max, mlp=False, **style)
    return scale_weights(model, seed).to(dtype).eval()


def module(factory: Callable[[int, int], nn.Module], width: int, l_max: int, seed: int = 0) -> nn.Module:
    """A mixer by itself, float32, features [B, L, width] -> the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return scale_weights(factory(width, l_max), seed).eval()


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ids [B, L]; a longer one begins with the shorter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (length, batch), generator=generator).T.contiguous()


def features(batch: int, length: int, width: int, seed: int = 1) -> Tensor:
    """Random features [B, L, width], float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def decoder(model: nn.Module, example: Tensor, *, max_length: int | None = None, **options: Any):
    """A decoder whose step is interpreted: no compiler."""
    return fi_compile.decoder(model, example, max_length=max_length, options={**EAGER, **options})


def decoded(dec: fi_compile.Decoder, sequence: Tensor, prompt: int) -> Any:
    """Outputs at positions prompt-1 … L-1 by prefill and steps, stacked along axis 1."""
    rows = [dec.prefill(sequence[:, :prompt])]
    rows += [dec.step(sequence[:, t]) for t in range(prompt, sequence.shape[1])]
    return stacked(rows)


def stacked(rows: Sequence[Any]) -> Any:
    """Outputs of several single positions as one output, [B, n, …]."""
    return pytree.tree_map(
        lambda *values: torch.stack(values, 1) if isinstance(values[0], Tensor) else values[0], *rows
    )


def goes_back(
    net: nn.Module, dec: fi_compile.Decoder, sequence: Tensor, places: Sequence[int], steps: int
) -> None:
    """From each of these positions in turn the decoder goes on exactly, for so many steps."""
    for back in places:
        dec.rewind(back)
        rest = [dec.step(sequence[:, t]) for t in range(back, back + steps)]
        assert gap(stacked(rest), net(sequence)[:, back : back + steps]) < 1e-12


def forks_and_beams(net: nn.Module, dec: fi_compile.Decoder, width: int) -> None:
    """A fork goes its own way, and rows that are picked go on, both exactly; leaves 41 positions of two rows."""
    one, two = features(2, 50, width, seed=3), features(2, 50, width, seed=4)
    two[:, :20] = one[:, :20]
    dec.prefill(one[:, :20])
    other = dec.fork()
    a = b = one
    for t in range(20, 40):
        a, b = dec.step(one[:, t]), other.step(two[:, t])
    assert gap(a, net(one)[:, 39]) < 1e-12
    assert gap(b, net(two)[:, 39]) < 1e-12
    dec.reorder(torch.tensor([1, 1]))
    picked = one[[1, 1]]
    assert gap(dec.step(picked[:, 40]), net(picked)[:, 40]) < 1e-12


def kinds(dec: fi_compile.Decoder) -> set[str]:
    return {mixer.kind for mixer in dec.report.mixers}


def follows_prompts(net: nn.Module, dec: fi_compile.Decoder, width: int, bound: float) -> None:
    """Prompts of several lengths and all steps after them."""
    sequence = features(2, 150, width)
    expected = net(sequence)
    for prompt in (1, 7, 100):
        assert gap(decoded(dec, sequence, prompt), expected[:, prompt - 1 :]) < bound


def keeps_keys_and_values(net: nn.Module, width: int) -> None:
    """No linear attention is found, and what is decoded is exact."""
    dec = decoder(net, features(2, 20, width), max_length=160)
    assert "linear_attention" not in kinds(dec)
    assert dec.engine.plan.histories
    sequence = features(2, 150, width)
    assert gap(decoded(dec, sequence, 7), net(sequence)[:, 6:]) < 1e-12


class Net(nn.Module):
    """``function(self, x)`` with buffers."""

    def __init__(self, function: Callable[..., Tensor], **buffers: Tensor):
        super().__init__()
        self.function = function
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype == expected.dtype
    if not found.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def rounding(
    dec: fi_compile.Decoder, model: nn.Module, double: nn.Module, sequence: Tensor, prompt: int
) -> float:
    """The decoder's error in units of what float32 allows, over positions prompt-1 … L-1.

    max over positions of error / max(the full forward's own error against float64, eps·‖u‖₂·‖k‖₂), u the input
    and k the filter of a long convolution. Errors are measured against the float64 model.
    """
    with torch.no_grad():
        truth = double(sequence.double())[:, prompt - 1 :]
        own = (model(sequence)[:, prompt - 1 :].double() - truth).abs().max()
    found = decoded(dec, sequence, prompt)
    assert found.dtype == torch.float32
    scale = torch.finfo(torch.float32).eps * convolution_scale(dec, sequence)
    return float((found.double() - truth).abs().max() / max(float(own), scale))


def convolution_scale(dec: fi_compile.Decoder, sequence: Tensor) -> float:
    """The largest ‖u‖₂·‖k‖₂ over the channels of the model's convolutions; 0 without any."""
    engine = dec.engine
    derived = engine.derived(sequence.shape[0], engine.capacity_for(sequence.shape[1]))
    _, taps = engine.forward(sequence, derived)
    scales = [0.0]
    for mixer in derived.step.mixers:
        if mixer.kind in ("long_conv", "short_conv"):
            u = mixer.layout_in.flatten(taps[mixer.x.name]).double().norm(dim=-1)[:, mixer.source]
            k = derived.references[mixer.name]["kernel"][:, : sequence.shape[1]].double().norm(dim=-1)
            scales.append(float((u * k).max()))
    return max(scales)


def lanes(dec: fi_compile.Decoder) -> list[Any]:
    """The lanes of a decoder: rows in lockstep, with their state."""
    return [lane for lane, _ in dec._lanes]
