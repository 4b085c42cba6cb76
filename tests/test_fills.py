"""What masks are filled with: beside such numbers all others must count as much as without them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus import scale_weights
from decoding import decoded, decoder, features, gap
from fi_compile.passes.propose_consistency import agrees

WIDTH, HEADS = 8, 2
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


@pytest.mark.parametrize("fill", [LOWEST, -1e9, -1e4, 1e30])
@pytest.mark.parametrize("added", [False, True], ids=["instead", "added"])
def test_ordinary_entries_keep_their_scale_beside_fills(fill: float, added: bool):
    scores = features(1, 9, 9)[0]
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    masked = scores + later * fill if added else scores.masked_fill(later, fill)
    wrong = masked.clone()
    wrong[5, 2] += 1e-6
    assert agrees(masked * (1 + 1e-14), masked)
    assert not agrees(wrong, masked)
    assert not agrees(wrong[5:6], masked[5:6], 1e-9, masked)
    wrong = masked.clone()
    wrong[2, 5] *= 1 + 1e-6
    assert not agrees(wrong, masked)


def test_rounding_beside_one_large_number_is_none_of_them():
    whole = torch.zeros(12, dtype=torch.float64)
    whole[3:5] = 1e5  # as transforms leave it: exact beside noise of its size
    noisy = whole + 1e-11 * features(1, 12, 1)[0, :, 0]
    assert agrees(noisy, whole + 1e-11 * features(1, 12, 1, seed=2)[0, :, 0])


class BiasByKey(nn.Module):
    """A bias for each key, in a mask that is filled for later ones: the same to every query but for the fill."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        i = torch.arange(length)
        slopes = torch.tensor([0.5, 0.25], dtype=x.dtype)
        bias = (slopes[:, None] * (i % 7)).view(1, HEADS, 1, length).expand(batch, -1, -1, -1)
        mask = bias.masked_fill(i > i[:, None], LOWEST)
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


def test_a_bias_by_key_in_a_filled_mask():
    torch.manual_seed(0)
    net = scale_weights(BiasByKey(), 0).double().eval()
    dec = decoder(net, features(2, 9, WIDTH), max_length=60)
    assert {m.lowering for m in dec.report.mixers} == {"kv_cache"}
    sequence = features(2, 60, WIDTH)
    for prompt in (1, 30):
        assert gap(decoded(dec, sequence, prompt), net(sequence)[:, prompt - 1 :]) < 1e-12
