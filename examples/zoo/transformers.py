"""Transformers: GPT-2's layout, Llama's, a sliding window, ALiBi, and mixtures of experts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import LanguageModel


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head, self.n_embd = n_head, n_embd
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class GPT(nn.Module):
    """ids [B, T] -> logits; learned positions, tied head (Radford et al. 2019)."""

    def __init__(
        self, n_embd: int = 12, n_head: int = 2, n_layer: int = 2, vocab: int = 23, block_size: int = 256
    ):
        super().__init__()
        self.block_size = block_size
        self.wte, self.wpe = nn.Embedding(vocab, n_embd), nn.Embedding(block_size, n_embd)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(n_embd),
                    "attn": CausalSelfAttention(n_embd, n_head),
                    "ln_2": nn.LayerNorm(n_embd),
                    "mlp": nn.Sequential(
                        nn.Linear(n_embd, 4 * n_embd),
                        nn.GELU(),
                        nn.Linear(4 * n_embd, n_embd),
                        nn.Dropout(0.1),
                    ),
                }
            )
            for _ in range(n_layer)
        )
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        _, t = idx.size()
        assert t <= self.block_size, f"cannot forward a sequence of length {t}"
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(pos))
        for block in self.h:
            x = x + block["attn"](block["ln_1"](x))
            x = x + block["mlp"](block["ln_2"](x))
        return self.lm_head(self.ln_f(x))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x).type_as(x) * self.weight


def precompute_freqs_cis(dim: int, end: int, theta: float = 100.0) -> Tensor:
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))
    return torch.polar(torch.ones(end, dim // 2), torch.outer(torch.arange(end), freqs))


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    x_ = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(x_ * freqs_cis[None, :, None, :]).flatten(3).type_as(x)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    bs, slen, n_kv_heads, head_dim = x.shape
    x = x[:, :, :, None, :].expand(bs, slen, n_kv_heads, n_rep, head_dim)
    return x.reshape(bs, slen, n_kv_heads * n_rep, head_dim)


class LlamaAttention(nn.Module):
    """Grouped queries, rotary positions as complex numbers, an additive mask; `window`: how far back it looks."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, window: int | None = None):
        super().__init__()
        self.head_dim, self.n_rep, self.window = dim // n_heads, n_heads // n_kv_heads, window
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq, xk, xv = (w(x).view(bsz, seqlen, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        xq, xk = apply_rotary_emb(xq, freqs_cis), apply_rotary_emb(xk, freqs_cis)
        keys, values = repeat_kv(xk, self.n_rep), repeat_kv(xv, self.n_rep)
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = F.softmax(scores + mask, dim=-1).type_as(xq)
        output = torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        return self.wo(output)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden_dim, bias=False), nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Llama(nn.Module):
    """ids [B, L] -> logits (Touvron et al. 2023, arXiv 2302.13971); `window` as in Mistral (arXiv 2310.06825)."""

    def __init__(
        self, dim: int = 16, n_layers: int = 2, vocab: int = 23, l_max: int = 256, window: int | None = None
    ):
        super().__init__()
        self.window = window
        self.tok_embeddings = nn.Embedding(vocab, dim)
        self.attention = nn.ModuleList(LlamaAttention(dim, 4, 2) for _ in range(n_layers))
        self.attention_norm = nn.ModuleList(RMSNorm(dim) for _ in range(n_layers))
        self.feed_forward = nn.ModuleList(SwiGLU(dim, 24) for _ in range(n_layers))
        self.ffn_norm = nn.ModuleList(RMSNorm(dim) for _ in range(n_layers))
        self.norm, self.output = RMSNorm(dim), nn.Linear(dim, vocab, bias=False)
        self.register_buffer("freqs_cis", precompute_freqs_cis(dim // 4, l_max), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        _, seqlen = tokens.shape
        h = self.tok_embeddings(tokens)
        freqs_cis = self.freqs_cis[:seqlen].to(h.device)
        mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device)
        mask = torch.triu(mask, diagonal=1)
        if self.window is not None:
            mask = mask + torch.tril(torch.full_like(mask, float("-inf")), diagonal=-self.window)
        mask = mask.type_as(h)
        for i in range(len(self.attention)):
            h = h + self.attention[i](self.attention_norm[i](h), freqs_cis, mask)
            h = h + self.feed_forward[i](self.ffn_norm[i](h))
        return self.output(self.norm(h))


class AlibiAttention(nn.Module):
    """Biases linear in the distance, built once and cut (Press et al. 2022, arXiv 2108.12409)."""

    def __init__(self, d_model: int, n_heads: int = 4, max_len: int = 256):
        super().__init__()
        self.n_heads = n_heads
        slopes = torch.tensor([2 ** (-8 / n_heads * (i + 1)) for i in range(n_heads)])
        alibi = slopes.view(n_heads, 1, 1) * torch.arange(1 - max_len, 1).view(1, 1, max_len)
        mask = torch.triu(torch.full((max_len, max_len), float("-inf")), 1)
        self.register_buffer("bias", alibi + mask)
        self.Wqkv, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.Wqkv(x).chunk(3, dim=-1)
        q, k, v = (y.reshape(B, T, self.n_heads, C // self.n_heads).permute(0, 2, 1, 3) for y in (q, k, v))
        att = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(k.size(-1)))
        att = F.softmax(att + self.bias[:, :T, :T], dim=-1)
        return self.out_proj((att @ v).transpose(1, 2).reshape(B, T, C))


def alibi(d_model: int = 12) -> nn.Module:
    return LanguageModel((AlibiAttention(d_model) for _ in range(2)), d_model)


class MixtureOfExperts(nn.Module):
    """Each position goes to its two best experts (Jiang et al. 2024, arXiv 2401.04088); all experts are run."""

    def __init__(self, dim: int, num_experts: int = 4, top_k: int = 2):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(dim, 16) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        routing_weights = F.softmax(self.gate(x), dim=-1)
        routing_weights, selected = torch.topk(routing_weights, self.top_k, dim=-1)
        routing_weights = routing_weights / routing_weights.sum(dim=-1, keepdim=True)
        mixture = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            weight = (routing_weights * (selected == i)).sum(-1, keepdim=True)
            mixture = mixture + weight * expert(x)
        return mixture


class CapacityRouter(nn.Module):
    """Each expert takes its first `capacity` positions, counted over the whole batch; the others are dropped.

    After the switch transformer (Fedus et al. 2021, arXiv 2101.03961): what a row gets depends on other rows, so no
    row can be decoded by itself.
    """

    def __init__(self, dim: int, num_experts: int = 4, capacity: int = 9):
        super().__init__()
        self.capacity = capacity
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(dim, 16) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        probabilities, chosen = F.softmax(self.router(tokens), dim=-1).max(dim=-1)
        one_hot = F.one_hot(chosen, len(self.experts))
        place = torch.cumsum(one_hot, dim=0) * one_hot
        kept = one_hot * (place <= self.capacity)
        mixed = torch.stack([expert(tokens) for expert in self.experts], dim=-1)
        return (mixed * (kept * probabilities.unsqueeze(-1)).unsqueeze(1)).sum(-1).view_as(x)


class MoeTransformer(nn.Module):
    """ids [B, L] -> logits; attention, then a mixture of experts."""

    def __init__(self, moe: type[nn.Module], dim: int = 12, n_layers: int = 2, vocab: int = 23):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.attention = nn.ModuleList(CausalSelfAttention(dim, 2) for _ in range(n_layers))
        self.moe = nn.ModuleList(moe(dim) for _ in range(n_layers))
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(2 * n_layers))
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i in range(len(self.moe)):
            x = x + self.attention[i](self.norms[2 * i](x))
            x = x + self.moe[i](self.norms[2 * i + 1](x))
        return self.head(x)
