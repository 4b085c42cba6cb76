"""What of an exported graph is decomposed where it stands: the same graph as torch's own two further traces."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from fi_compile.exporting import _decompositions
from fi_compile.spelled_out import spell_out


class Coarse(nn.Module):
    """Operators without a meaning of their own, on sizes that move and on sizes that do not."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        gate, value = self.linear(self.dropout(x)).repeat(1, 1, 2).chunk(2, dim=-1)
        heads = value.reshape(b, s, 3, d // 3).transpose(1, 2)
        scores = (heads @ heads.mT).tril().flatten(0, 1)
        mixed = scores.reshape(b, 3, s, -1) @ heads
        merged = mixed.transpose(1, 2).contiguous().reshape(b, s, d)
        spectrum = torch.fft.fft(x.to(torch.float64), dim=-1)
        return gate * merged + spectrum.real + spectrum.imag.to(x.dtype)


class CutOff(nn.Module):
    """As far as its table, at any length."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 12))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.sym_min(x.shape[1], 64)
        y = nn.functional.pad(x, (0, 0, 2, 0))[:, :length].chunk(2, -1)[0]
        return y * self.table[:length, :6]


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(-1, 12).clone()
        y[0] = 1.0
        return y.view_as(x)


class Switches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return x.reshape(-1, 12) + 1


def exported(model: nn.Module) -> ExportedProgram:
    dims = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return export(model.eval(), (torch.randn(3, 17, 12),), dynamic_shapes=(dims,), strict=False)


def operators(program: ExportedProgram) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def guards(program: ExportedProgram) -> set[str]:
    fake = next(n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor))
    return {str(guard.expr) for guard in fake.fake_mode.shape_env.guards}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_the_graph_is_the_one_that_torch_makes(without_gradients):
    model = Coarse()
    ours, theirs = exported(model), exported(model).run_decompositions(_decompositions())
    lines = {node.meta["stack_trace"] for node in ours.graph.nodes if "reshape" in node.name}
    assert spell_out(ours, _decompositions())
    without = operators(theirs) - Counter({"aten.clone.default": 1})  # of the dropout
    assert operators(ours) == without
    assert guards(ours) <= guards(theirs)
    views = [node for node in ours.graph.nodes if "view" in node.name]
    assert lines <= {node.meta["stack_trace"] for node in views}
    for batch, length in ((3, 17), (2, 5), (4, 40)):
        x = torch.randn(batch, length, 12)
        expected = model(x)
        assert torch.allclose(ours.module()(x), expected)
    sizes = [node.meta["val"] for node in ours.graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)]
    assert len({str(size) for size in sizes}) == len(sizes)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_lengths_are_those_of_one_piece(without_gradients):
    ours, theirs = exported(CutOff()), exported(CutOff()).run_decompositions(_decompositions())
    assert spell_out(ours, _decompositions())
    assert guards(ours) == guards(theirs)
    assert any("< 64" in guard for guard in guards(ours))


@pytest.mark.parametrize("model", [Writes(), Switches()])
def test_what_writes_or_calls_graphs_is_left_to_torch(model, without_gradients):
    program = exported(model)
    before = program.graph_module.code
    assert not spell_out(program, _decompositions())
    assert program.graph_module.code == before
