"""Two models that look causal and are not: what flashinf says, and the repair.

    python examples/refused_model.py

The first lets a filter wrap around the FFT, the second normalises its filter by the length at
hand. Neither computes the same thing for a text and for its beginning, so no incremental decoder
can agree with it, and flashinf refuses instead of being wrong. One line mends each.
"""

import argparse
import warnings

import torch
from check import assert_same
from torch import Tensor, nn

import fi_compile

LONGEST = 512


class Convolution(nn.Module):
    """A long convolution over u [B, D, L]; subclasses say which filter [D, ≤ LONGEST] it uses."""

    def __init__(self, width: int):
        super().__init__()
        decay = torch.exp(-torch.arange(LONGEST) / torch.logspace(0.5, 2, width)[:, None])
        self.kernel = nn.Parameter(torch.randn(width, LONGEST) * decay / 2)

    def filter(self, length: int) -> Tensor:
        raise NotImplementedError

    def forward(self, u: Tensor) -> Tensor:
        length = u.shape[-1]
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(self.filter(length), n=2 * length)
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length]


class Wraps(Convolution):
    """Wrong: 2 L points hold L inputs and a filter of at most L + 1. The rest comes round again."""

    def filter(self, length: int) -> Tensor:
        return self.kernel


class WrapsMended(Convolution):
    """Right: a filter no longer than the input."""

    def filter(self, length: int) -> Tensor:
        return self.kernel[:, :length]


class Normalised(Convolution):
    """Wrong: every filter value changes when the text grows by one position."""

    def filter(self, length: int) -> Tensor:
        kernel = self.kernel[:, :length]
        return kernel / kernel.abs().sum(-1, keepdim=True)


class NormalisedMended(Convolution):
    """Right: the norm of the whole filter, whatever the length."""

    def filter(self, length: int) -> Tensor:
        kernel = self.kernel / self.kernel.abs().sum(-1, keepdim=True)
        return kernel[:, :length]


class Model(nn.Module):
    """ids [B, L] -> logits [B, L, vocab], around one convolution."""

    def __init__(self, convolution: type[Convolution], vocab: int = 31, width: int = 24):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.mixer = convolution(width)
        self.head = nn.Linear(width, vocab)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.mixer(x.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(x))


@torch.inference_mode()
def disagreement(model: nn.Module, ids: Tensor) -> float:
    """How far the logits of the first half move when the second half is there too."""
    half = ids.shape[1] // 2
    return float((model(ids)[:, :half] - model(ids[:, :half])).abs().max())


def show_refusal(model: nn.Module, ids: Tensor) -> None:
    """Every way to ask for a decoder ends in the reason, never in a wrong answer."""
    try:
        fi_compile.decoder(model, ids, max_length=LONGEST)
    except fi_compile.Unsupported as refusal:
        print(f"  fi_compile.decoder raises Unsupported:\n{refusal}")
    else:
        raise AssertionError("this model has no exact decoder, and got one")
    refusals = fi_compile.explain(model, ids).refusals
    assert refusals, "explain() found nothing wrong"
    for refusal in refusals:
        print(f"  explain: {refusal.kind}: {refusal.reason} ({refusal.source}); {refusal.hint}")

    compiled = torch.compile(model, backend="flashinf", dynamic=True, options={"fallback": "eager"})
    with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(compiled(ids), model(ids))
    assert caught, "torch.compile did not say that it runs the model as it is"
    print(f"  torch.compile runs the model as it is and warns: {caught[0].message}")


def show_decoded(model: nn.Module, ids: Tensor) -> None:
    """The mended model's decoder, checked at every position."""
    decoder = fi_compile.decoder(model, ids, max_length=LONGEST)
    logits = [decoder.prefill(ids[:, :1])]
    logits += [decoder.step(token) for token in ids[:, 1:].unbind(1)]
    ratio = assert_same(model, ids, torch.stack(logits, dim=1))
    print(f"  decoded; error {ratio:.2f} times that of the plain forward")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="See two models refused, and mended.")
    parser.add_argument("--length", type=int, default=120)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    for wrong, right in ((Wraps, WrapsMended), (Normalised, NormalisedMended)):
        ids = torch.randint(0, 31, (2, args.length))
        broken, mended = Model(wrong).eval(), Model(right).eval()
        print(f"{wrong.__name__}: a longer text moves its own past by {disagreement(broken, ids):.2g}")
        show_refusal(broken, ids)
        print(f"{right.__name__}: by {disagreement(mended, ids):.2g}")
        show_decoded(mended, ids)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
