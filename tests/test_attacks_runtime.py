"""Attacks on how a step runs: layers that look alike, outputs in one memory, modes, wide accumulators."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fi_compile
from decoding import Net, decoded, gap
from fi_compile.layers import split_layers
from fi_compile.lower import CompiledStep
from fi_compile.weights import checksum


class Normed(nn.Module):
    """A layer whose norm has a scale alone, or a shift alone, or neither."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        self.width, self.kind = width, kind
        self.value = nn.Parameter(torch.randn(width))
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (self.value if self.kind == k else None for k in ("scale", "shift"))
        h = F.layer_norm(x, [self.width], scale, shift, 1e-6)
        h = F.silu(self.a(h)).cumsum(1)
        return x + self.b(torch.tanh(h) * torch.sigmoid(h) + h.sin() * h.cos())


class Stack(nn.Module):
    def __init__(self, kinds: tuple[str, ...]):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.Sequential(*(Normed(8, kind) for kind in kinds))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.table(ids))


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    torch.manual_seed(0)


@pytest.mark.parametrize("kinds", [("scale", "shift"), ("scale", "neither")])
def test_layers_that_differ_in_what_they_leave_out(kinds):
    model = Stack(kinds * 2).double().eval()
    ids = torch.randint(0, 11, (2, 12))
    dec = fi_compile.decoder(model, ids, options={"step": "eager"})
    lane = dec._lanes[0][0]
    graph = CompiledStep(lane.derived.step, lane.tensors, "eager").graph_module.graph
    layers = split_layers(graph)  # the layers of a kind may be one part, those of two kinds may not
    operators = [n for part in layers.parts for n in part.graph.nodes if "layer_norm" in str(n.target)]
    assert len(operators) >= 2
    assert gap(decoded(dec, ids, 3), model(ids)[:, 2:]) < 1e-10


class Doubled(nn.Module):
    """The same value as two outputs."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.head(torch.tanh(self.table(ids).cumsum(1)))
        return y, y.clone()


def test_equal_outputs_are_two_tensors():
    model, ids = Doubled().eval(), torch.randint(0, 9, (2, 6))
    dec = fi_compile.decoder(model, ids, options={"step": "inductor"})
    dec.prefill(ids)
    a, b = dec.step(ids[:, 0])
    kept = b.clone()
    a.zero_()
    assert torch.equal(b, kept)


class Phase(nn.Module):
    """A float32 model that sums up in float64."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.sin((x.double() + 3).cumsum(1)) * self.weight).float()


def test_wide_accumulators_stay_wide():
    model, x = Phase(), torch.randn(1, 900, 4)
    dec = fi_compile.decoder(model, x[:, :5], options={"step": "eager"})
    assert gap(decoded(dec, x, 450), model(x)[:, 449:]) < 1e-6


@pytest.mark.parametrize("prompt", [3, 900])
def test_running_sums_of_what_stays_as_it_is(prompt):
    """Each step of a sum in float32 would round the same way: a hundred times what the model itself loses."""
    net, x = (
        Net(lambda net, x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]),
        torch.full((1, 1800, 2), 0.1),
    )
    dec = fi_compile.decoder(net, x[:, :5], max_length=1800, options={"step": "eager"})
    assert [m.lowering for m in dec.report.mixers] == ["running_sum"]
    assert gap(decoded(dec, x, prompt), net(x)[:, prompt - 1 :]) < 4e-7


@pytest.mark.parametrize(
    ("name", "former", "new"),
    [("act", torch.tanh, torch.relu), ("gains", np.array([1.0, 2.0, 3.0]), np.array([3.0, 1.0, 2.0]))],
    ids=["function", "array"],
)
def test_settings_that_are_exchanged(name, former, new):
    net = Net(lambda net, x: net.act(x * torch.as_tensor(net.gains)).cumsum(1))
    net.act, net.gains = torch.tanh, np.ones(3)
    x = torch.randn(1, 9, 3, dtype=torch.float64)
    setattr(net, name, former)
    dec = fi_compile.decoder(net, x, max_length=16, options={"step": "eager"})
    assert gap(dec.prefill(x), net(x)[:, -1]) < 1e-12
    setattr(net, name, new)
    assert gap(dec.prefill(x), net(x)[:, -1]) < 1e-12


def test_training_mode_is_another_model():
    net = Net(lambda net, x: (x if net.training else 2 * x).cumsum(1)).eval()
    x = torch.randn(1, 9, 3, dtype=torch.float64)
    dec = fi_compile.decoder(net, x, max_length=16, options={"step": "eager"})
    for training in (False, True, False):
        net.train(training)
        assert gap(dec.prefill(x), net(x)[:, -1]) < 1e-12


def test_decoders_cross_inference_mode():
    model, ids = Stack(("scale",)).eval(), torch.randint(0, 11, (2, 9))
    with torch.inference_mode():
        dec = fi_compile.decoder(model, ids[:, :4], options={"step": "eager"})
        dec.prefill(ids[:, :4])
        branch = dec.fork()
        other = dec.fork()
        other.reorder([1, 0])
    expected = model(ids)
    assert gap(dec.step(ids[:, 4]), expected[:, 4]) < 1e-5
    assert gap(branch.step(ids[:, 4]), expected[:, 4]) < 1e-5
    assert gap(other.step(ids[[1, 0], 4]), expected[[1, 0], 4]) < 1e-5


def test_another_table_of_another_size():
    model, ids = Stack(("scale",)).eval(), torch.randint(0, 11, (1, 5))
    dec = fi_compile.decoder(model, ids, options={"step": "eager"})
    model.table = nn.Embedding(20, 8)
    dec.reset()
    ids = ids + 9
    assert gap(dec.prefill(ids), model(ids)[:, -1]) < 1e-5
    model.table = nn.Embedding(5, 8)
    dec.reset()
    with pytest.raises(fi_compile.InputError, match="0 … 4"):
        dec.prefill(ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_checksums_see_signs_and_places(dtype):
    """In float64 a sign is the highest bit of a word, which even weights would shift out."""
    value = torch.arange(-63 * 6, 63 * 6).to(dtype)
    seen = [-value, value.flip(0), torch.cat([value, value[:1] * 0]), value[:-1]]
    for i, j in ((0, 1), (2, 63), (1, 126)):
        swapped, negated = value.clone(), value.clone()
        swapped[[i, j]], negated[j] = value[[j, i]], -value[j]
        seen += [swapped, negated]
    sums = [checksum(v) for v in seen]
    assert checksum(value) == checksum(value.clone())
    assert checksum(value) not in sums


def test_weights_negated_behind_autograds_back():
    net = Stack(("scale", "shift")).double().eval()
    ids = torch.randint(11, (1, 6))
    dec = fi_compile.decoder(net, ids, max_length=16, options={"step": "eager"})
    dec.prefill(ids)
    net.table.weight.data[1].neg_()
    ids = torch.full_like(ids, 1)
    assert gap(dec.prefill(ids), net(ids)[:, -1]) < 1e-12
