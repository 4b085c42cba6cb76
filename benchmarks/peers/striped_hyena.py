"""The published package `stripedhyena`: its own cached decode beside flashinf's decoder of the same model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fi_compile
from benchmarks.decoding import decode
from benchmarks.setup import Bench
from examples.zoo.package import INSTALLED, striped_hyena_package

VOCAB, PROMPT, STEPS = 24, 64, 256  # its cache begins with a prompt
BOUND = 1e-4  # of the largest logit; the model computes its filters in float32 only


class CachedDecode:
    """The package's own generation, after a prompt [1, P]."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model, self.cache = model, model.initialize_inference_params()
        self.model(prompt, inference_params_dict=self.cache)
        self.position = prompt.shape[1]

    def step(self, token: Tensor) -> Tensor:
        """The next id, [1]: logits [1, V]."""
        for part in self.cache.values():
            part.seqlen_offset = self.position
        logits, self.cache = self.model(token[:, None], inference_params_dict=self.cache)
        self.position += 1
        return logits[:, -1]


def measure(bench: Bench) -> None:
    """Steps of both: the filters are short sums of exponentials, so cost does not grow with the position."""
    if not INSTALLED:
        bench.say("the package stripedhyena is not installed: left out")
        return
    sizes, section = bench.sizes, bench.section
    bench.say("the package stripedhyena")
    torch.manual_seed(0)
    model = striped_hyena_package(sizes.width, sizes.layers).eval()
    ids = torch.randint(VOCAB, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(3))
    prompt, rest = ids[:, :PROMPT], ids[:, PROMPT:]
    truth = model(ids)[0][:, PROMPT:]
    theirs = CachedDecode(model, prompt)
    decoder = fi_compile.decoder(model, prompt, max_length=512)
    decoder.prefill(prompt)
    steps = {
        "stripedhyena's cached decode": theirs.step,
        "flashinf of stripedhyena": lambda t: decoder.step(t)[0],
    }
    mean = {}
    for name, step in steps.items():
        found = decode(step, rest)
        error = float((found.logits - truth).abs().max() / truth.abs().max())
        section.check(name, error, BOUND, "the model's forward")
        mean[name] = found.quantile(0.5)
        section.figure(name, 1e6 * mean[name], "µs", name, note="median step")
    first, second = mean
    section.figure(f"{first} / flashinf", mean[first] / mean[second], "×", (first, second))
