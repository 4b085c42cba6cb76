"""Write text with the trained Hyena model, byte by byte, and check every byte.

    python examples/generate_text.py --prompt "1:1 And God said unto Moses, " --tokens 4000

Two ways to the text: an explicit decoder, and the loop people already have (the whole prefix at
every call) through `torch.compile(model, backend="flashinf", dynamic=True)`. Each result is
compared with plain forwards over the finished text, and timed beside the naive loop.
"""

import argparse
import codecs
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from check import assert_same
from hyena import HyenaLM, encode, load
from torch import Tensor

import fi_compile
from fi_compile.generate import sample


class Run(NamedTuple):
    """A text and how it came about: ids [1, P + n], the logits [n, V] drawn from, their times."""

    ids: Tensor
    logits: Tensor
    times: list[float]

    def speed(self) -> str:
        """Bytes a second, apart from the first few: those also compile."""
        skip = min(8, (len(self.times) - 1) // 2)
        seconds = self.times[-1] - self.times[skip]
        steps = len(self.times) - 1 - skip
        return f"{steps / seconds:,.0f} bytes/s" if steps else "one byte, no speed"


class Recorder:
    """A decoder around another that keeps the logits it hands out and the times."""

    def __init__(self, decoder):
        self.decoder = decoder
        self.logits: list[Tensor] = []
        self.times: list[float] = []

    def keep(self, logits: Tensor) -> Tensor:
        self.logits.append(logits)
        self.times.append(time.perf_counter())
        return logits

    def prefill(self, prompt: Tensor) -> Tensor:
        return self.keep(self.decoder.prefill(prompt))

    def step(self, token: Tensor) -> Tensor:
        return self.keep(self.decoder.step(token))


def decoder_loop(decoder, prompt: Tensor, tokens: int, seed: int, shown: bool, **settings) -> Run:
    """The explicit way; prints the text as it comes."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    show = lambda token: print(utf8.decode(bytes(token.tolist())), end="", flush=True)  # noqa: E731
    recorder = Recorder(decoder)
    ids = fi_compile.generate(
        recorder, prompt, tokens, seed=seed, on_token=show if shown else None, **settings
    )
    return Run(ids, torch.cat(recorder.logits), recorder.times)


@torch.inference_mode()
def prefix_loop(model: Callable[[Tensor], Tensor], ids: Tensor, tokens: int, seed: int, **settings):
    """The way without an API: the model is called on the whole text every time."""
    generator = torch.Generator().manual_seed(seed)
    logits, times = [], []
    for _ in range(tokens):
        logits.append(model(ids)[:, -1].clone())  # a view would keep the logits of all positions
        times.append(time.perf_counter())
        token = sample(logits[-1], generator=generator, **settings)
        ids = torch.cat([ids, token[:, None]], dim=1)
    return Run(ids, torch.cat(logits), times)


@torch.inference_mode()
def verify(model: HyenaLM, run: Run, seed: int, **settings) -> str:
    """Compare a text, and the logits it was drawn from, with plain forwards over all of it.

    Raises AssertionError if a logit is off by more than rounding, or if drawing from the plain
    logits gives other bytes.
    """
    tokens, read = len(run.logits), run.ids[:, :-1]
    ratio = assert_same(model, read, run.logits[None])
    generator = torch.Generator().manual_seed(seed)
    plain = model(read)[0, -tokens:]
    drawn = torch.cat([sample(row[None], generator=generator, **settings) for row in plain])
    same = int((drawn == run.ids[0, -tokens:]).sum())
    # A draw within a rounding error of the border between two bytes may fall on either side.
    assert tokens - same <= tokens // 1000, f"only {same} of {tokens} bytes are the plain model's"
    return f"error {ratio:.2f} of the plain forward's own; {same} of {tokens} bytes reproduced"


@torch.inference_mode()
def naive_seconds(model: HyenaLM, ids: Tensor, tokens: int, samples: int = 8) -> float:
    """Estimated time of the naive loop's last `tokens` calls: the midpoint rule over lengths."""
    samples, total = min(samples, tokens), 0.0
    for i in range(samples):
        length = ids.shape[1] - tokens + int((i + 0.5) * tokens / samples)
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            model(ids[:, :length])
            runs.append(time.perf_counter() - start)
        total += sorted(runs)[1] * tokens / samples
    return total


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write and check text with a Hyena model.")
    parser.add_argument("--prompt", default="1:1 And the LORD spake unto Moses, saying, ")
    parser.add_argument("--tokens", type=int, default=4000, help="bytes to write")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="do not print the text")
    args = parser.parse_args(argv)

    model, prompt = load(), encode(args.prompt)
    total = prompt.shape[1] + args.tokens
    if not args.prompt or args.tokens < 1 or total > model.cfg.l_max:
        parser.error(f"a prompt, 1 byte or more, {model.cfg.l_max} in all; asked for {total}")
    how = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}

    start = time.perf_counter()
    decoder = fi_compile.decoder(model, prompt, max_length=total)
    print(f"decoder derived in {time.perf_counter() - start:.1f} s")
    print(args.prompt, end="", flush=True)
    explicit = decoder_loop(decoder, prompt, args.tokens, shown=not args.quiet, **how)

    fast = torch.compile(model, backend="flashinf", dynamic=True)
    transparent = prefix_loop(fast, prompt, args.tokens, **how)
    print("\n")
    for name, run in (("decoder", explicit), ("torch.compile", transparent)):
        print(f"{name}: {verify(model, run, **how)}; {run.speed()}")
    naive = args.tokens / naive_seconds(model, explicit.ids, args.tokens)
    print(f"naive loop: {naive:,.0f} bytes/s (estimated from calls at a few lengths)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
