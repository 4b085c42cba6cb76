"""What lives beside long convolutions, in spellings of published models: attention, retention, outputs, selections."""

import pytest
import torch
from torch import nn

import fi_compile
from decoding import EAGER, decoded, features, gap, ids


def decodes(model: nn.Module, x: torch.Tensor, kinds: set[str], prompt: int = 5) -> fi_compile.Decoder:
    model = model.double().eval()
    dec = fi_compile.decoder(model, x, options={**EAGER, "capacity": 64})
    with torch.no_grad():
        for length in (1, 2, x.shape[1]):
            part = x[:, :length]
            assert (
                gap(decoded(dec, part, min(prompt, length)), model(part)[:, min(prompt, length) - 1 :])
                < 1e-12
            )
    assert {m.kind + "/" + m.lowering for m in dec.report.mixers} == kinds
    return dec


class MergedHeads(nn.Module):
    """[B, s, 8]: attention with rows and heads in one dimension, and a bias by key repeated for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(8, 24)

    def forward(self, x):
        batch, n, _ = x.shape
        query, key, value = self.all(x).view(batch, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        query, key, value = (a.reshape(batch * 2, n, 4) for a in (query, key, value))
        slopes = torch.tensor([0.5, 0.25], dtype=x.dtype)
        bias = (slopes[:, None, None] * torch.arange(n)).repeat(batch, 1, 1)
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=0.5).view(batch, 2, n, n)
        later = torch.arange(n)[None] > torch.arange(n)[:, None]
        weights = scores.masked_fill(later, float("-inf")).softmax(-1).view(batch * 2, n, n)
        return x + torch.bmm(weights, value).view(batch, 2, n, 4).transpose(1, 2).reshape(batch, n, 8)


def test_rows_and_heads_in_one_dimension():
    torch.manual_seed(0)
    x = features(3, 40, 8)
    model = MergedHeads()
    dec = decodes(model, x, {"attention/kv_cache"})
    dec.prefill(x[:, :7])
    dec.reorder(torch.tensor([2, 2, 0]))  # rows stay apart: beams are no refusal
    with torch.no_grad():
        picked = x[[2, 2, 0]]
        assert gap(dec.step(picked[:, 7]), model(picked)[:, 7]) < 1e-12


class FilledDecay(nn.Module):
    """[B, s, 6]: retention whose decay is a number to the power of integers, what is no number in it filled."""

    def __init__(self, future: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.future = future

    def forward(self, x):
        n = torch.arange(x.shape[1])
        lag = n[:, None] - n[None]
        decay = (0.9375**lag) * (lag >= (-1 if self.future else 0)).double()
        decay[decay != decay] = 0
        return x + ((self.query(x) @ self.key(x).transpose(1, 2)) * decay) @ self.value(x)


def test_a_power_of_integers_filled_where_it_is_no_number():
    """In the twin it must be a power in double precision, though nothing in it is floating."""
    torch.manual_seed(0)
    model = FilledDecay().double().eval()
    x = features(2, 40, 6)
    dec = fi_compile.decoder(model, x, options={**EAGER, "capacity": 64})
    assert {m.lowering for m in dec.report.mixers} == {"recurrence"}
    with torch.no_grad():
        # The model rounds its decay to single precision.
        assert gap(decoded(dec, x, 5), model(x)[:, 4:]) < 1e-6
    with pytest.raises(fi_compile.Unsupported, match="non_causal"):
        fi_compile.decoder(FilledDecay(future=True).double().eval(), x, options=EAGER)


class Newest(nn.Module):
    """ids [B, s] -> logits of one or some positions."""

    def __init__(self, pick) -> None:
        super().__init__()
        self.embed, self.head, self.pick = nn.Embedding(11, 6), nn.Linear(6, 11), pick

    def forward(self, tokens):
        x = torch.tanh(self.embed(tokens).cumsum(1))
        return self.head(self.pick(x))


def test_the_newest_row_by_a_list_of_one():
    torch.manual_seed(0)
    model = Newest(lambda x: x[:, [-1], :]).double().eval()
    x = ids(2, 20)
    dec = fi_compile.decoder(model, x, options=EAGER)
    dec.prefill(x[:, :3])
    with torch.no_grad():
        for t in range(3, 20):
            assert gap(dec.step(x[:, t]), model(x[:, : t + 1])) < 1e-12


class WrittenBatch(nn.Module):
    """[B, s, 6]: running means after a first row of zeros; the batch is a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 6)

    def forward(self, x):
        batch, n = int(x.shape[0]), x.shape[1]
        first = torch.zeros(batch, 1, 6, dtype=x.dtype)
        shifted = torch.cat([first, self.project(x)], 1).view(batch, n + 1, 3, 2)
        return x + shifted[:, :-1].reshape(batch, n, 6)


def test_a_batch_that_is_a_number_is_described_too():
    x = features(2, 40, 6)
    dec = decodes(WrittenBatch(), x, {"short_conv/window"})
    assert 0 < dec.report.state_bytes < dec.state_bytes


class LoopOverPositions(nn.Module):
    """[B, s, 6]: a leaky sum in a Python loop, as it is written beside its derivation."""

    def forward(self, x):
        state, rows = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = 0.9 * state + x[:, t]
            rows.append(state)
        return torch.stack(rows, 1)


def test_a_loop_over_positions_is_named():
    with pytest.raises(fi_compile.Unsupported, match="loops over positions") as caught:
        fi_compile.decoder(LoopOverPositions(), features(2, 40, 6), options=EAGER)
    assert [r.kind for r in caught.value.refusals] == ["static_length"]
