"""The published package `stripedhyena`, unmodified, with poles that remember (its own draw is nearly zero)."""

import math
from importlib.util import find_spec

import torch
from torch import nn

INSTALLED = find_spec("stripedhyena") is not None


def striped_hyena_package(
    hidden_size: int = 16, num_layers: int = 3, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """ids [B, L] -> (logits, None); attention blocks need a CUDA extension, so all blocks are convolutions."""
    from stripedhyena.model import StripedHyena  # type: ignore[import-not-found]
    from stripedhyena.utils import dotdict  # type: ignore[import-not-found]

    config = dotdict(
        vocab_size=24,
        hidden_size=hidden_size,
        num_filters=hidden_size,
        num_layers=num_layers,
        attn_layer_idxs=[],
        hyena_layer_idxs=list(range(num_layers)),
        num_attention_heads=2,
        short_filter_length=3,
        short_filter_bias=True,
        state_size=4,
        mlp_init_method="torch.nn.init.zeros_",
        inner_size_multiple_of=8,
        model_parallel_size=1,
        pipe_parallel_size=1,
        make_vocab_size_divisible_by=8,
        rotary_emb_base=10000,
        eps=1e-6,
        params_dtype=dtype,
        hyena_block_dtype=dtype,
        mlp_dtype=dtype,
        use_flashfft=False,
        use_flash_rmsnorm=False,
        use_flash_depthwise=False,
        tie_embeddings=False,
        final_norm=True,
        column_split_hyena=True,
        proj_groups=1,
        hyena_filter_groups=1,
        inference_mode=False,
        prefill_style="fft",
        seqlen=512,
    )
    model = StripedHyena(config)
    with torch.no_grad():
        for block in model.blocks:
            poles = block.filter.poles
            radius = torch.linspace(0.8, 0.99, poles.shape[1])[:, None].expand(poles.shape[:-1])
            angle = math.pi * torch.rand(poles.shape[:-1])
            poles.copy_(torch.stack([radius * angle.cos(), radius * angle.sin()], -1))
            block.filter.residues.div_(2)
            block.filter.D.normal_()
    return model
