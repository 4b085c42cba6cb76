"""Train the example's Hyena language model on the text in `data/`: ten minutes on two idle cores.

    python examples/train_hyena.py [--steps 2000] [--out examples/weights/hyena_kjv.safetensors]

Prints the loss on the way; at the end the bits per byte of the held-out text (the last 5 %), at
the training length and at lengths the model was never trained on.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from hyena import WEIGHTS, HyenaConfig, HyenaLM, decode, encode, load, save
from torch import Tensor

DATA = Path(__file__).parent / "data" / "kjv.txt"


def corpus(held_out: float = 0.05) -> tuple[Tensor, Tensor]:
    """The text's bytes [N], split into training and held-out text."""
    text = encode(DATA.read_text())[0]
    cut = int(len(text) * (1 - held_out))
    return text[:cut], text[cut:]


@torch.inference_mode()
def bits_per_byte(model: HyenaLM, text: Tensor, length: int, limit: int = 65536) -> float:
    """Mean of -log2 p(next byte) over `text`, read in separate windows of `length` bytes."""
    windows = min(len(text) - 1, limit) // length
    if windows == 0:
        raise ValueError(f"a text of {len(text)} bytes has no window of {length} and a target")
    inputs = text[: windows * length].view(windows, length)
    targets = text[1 : windows * length + 1].view(windows, length)
    total = 0.0
    at_once = max(1, 16384 // length)
    for x, y in zip(inputs.split(at_once), targets.split(at_once), strict=True):
        total += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / targets.numel() / math.log(2)


def make_optimizer(model: HyenaLM, lr: float) -> torch.optim.AdamW:
    """AdamW; weight decay on the matrices outside the implicit filters only."""
    matrices = {name for name, p in model.named_parameters() if p.ndim >= 2 and ".filter." not in name}
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in matrices], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if n not in matrices]},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth: a factor of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(model: HyenaLM, text: Tensor, steps: int, batch: int, context: int, lr: float) -> float:
    """Train in place on random windows of `text`; the mean loss of the last tenth, in bits."""
    optimizer = make_optimizer(model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, steps))
    losses, start = [], time.perf_counter()
    for step in range(steps):
        begin = torch.randint(0, len(text) - context, (batch, 1))
        ids = text[begin + torch.arange(context + 1)]
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / math.log(2))
        if step % 50 == 0 or step == steps - 1:
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(
                f"step {step:5d}  {recent:.3f} bits  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    text, held_out = corpus()
    model = HyenaLM(HyenaConfig())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of text")
    train(model, text, args.steps, args.batch, args.context, args.lr)

    save(model, args.out)
    model = load(args.out)  # what is reported is what was saved: float16
    for length in (args.context, 4 * args.context, 16 * args.context):
        if length <= model.cfg.l_max:
            bits = bits_per_byte(model, held_out, length)
            print(f"held out, windows of {length}: {bits:.3f} bits per byte")
    print(repr(decode(held_out[:60])), "...")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
