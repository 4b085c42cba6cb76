"""A Hugging Face model without a cache: model.generate() with its forward compiled.

The model is an ordinary PreTrainedModel of long convolutions: no past_key_values, no cache class. Eager,
generate() runs the whole prefix for every token; compiled with backend="flashinf" each call is answered from
the session of its prefix, for greedy search, sampling and beams alike. Needs the package transformers.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LongConvConfig(PretrainedConfig):
    model_type = "long_conv_example"

    def __init__(self, vocab_size=50, hidden_size=32, num_hidden_layers=2, longest=4096, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.longest = num_hidden_layers, longest
        super().__init__(**kwargs)


class LongConv(nn.Module):
    """A gated causal long convolution of [B, L, D]."""

    def __init__(self, width: int, longest: int):
        super().__init__()
        decay = torch.exp(-torch.arange(longest)[:, None] / torch.logspace(1, 3, width))
        self.filter = nn.Parameter(torch.randn(longest, width) * decay / decay.norm(dim=0))
        self.into, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        u, gate = self.into(x).chunk(2, dim=-1)
        spectrum = torch.fft.rfft(u, 2 * n, dim=1) * torch.fft.rfft(self.filter[:n], 2 * n, dim=0)
        return self.out(torch.fft.irfft(spectrum, 2 * n, dim=1)[:, :n] * torch.sigmoid(gate))


class LongConvForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = LongConvConfig

    def __init__(self, config: LongConvConfig):
        super().__init__(config)
        width = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, width)
        self.mixers = nn.ModuleList(LongConv(width, config.longest) for _ in range(config.num_hidden_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are drawn where the layers are made."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
        **unused: object,
    ) -> CausalLMOutput:
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1)
        states = [x]
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
            states.append(x)
        logits = self.head(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        hidden = tuple(states) if output_hidden_states else None
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=hidden)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of the prompt")
    parser.add_argument("--step", choices=("auto", "aot", "inductor", "eager"), default="auto")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = LongConvForCausalLM(LongConvConfig()).eval()
    prompt = torch.randint(50, (2, args.prompt))
    ways = {"greedy": {}, "sampled": {"do_sample": True, "top_k": 10}, "four beams": {"num_beams": 4}}
    settings = {"max_new_tokens": args.new_tokens, "use_cache": False, "pad_token_id": 0}

    def generate(way: str) -> tuple[Tensor, float]:
        torch.manual_seed(1)
        start = time.perf_counter()
        mask = torch.ones_like(prompt)
        ids = model.generate(prompt, attention_mask=mask, **settings, **ways[way])  # type: ignore[misc]
        return ids, time.perf_counter() - start

    eager = {way: generate(way) for way in ways}
    model.forward = torch.compile(
        model.forward, backend="flashinf", dynamic=True, options={"step": args.step}
    )
    for way, (expected, before) in eager.items():
        generate(way)  # compiles
        ids, after = generate(way)
        assert torch.equal(ids, expected), way
        print(f"{way:10}: equal ids; {before:.2f} s eager, {after:.2f} s compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
