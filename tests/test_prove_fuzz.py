"""Break proved programs one node at a time: a mutant that is no longer prefix-consistent must lose its proof.

The oracle is numeric, in float64, at several lengths; mutants found harmless are skipped.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fft import ifft, irfft, rfft

from fi_compile.capture import trace_module
from fi_compile.passes.prove_prefix import prove_prefix
from fi_compile.program import Program, is_integer, is_tensor, operator_name

aten = torch.ops.aten
CAPACITY = 48
LENGTHS = (11, 23, 24, 38, 45)
WIDTH = 6


class Mixer(nn.Module):
    """x [B, L, D] → [B, L, D] through one function of (u [B, D, L], k [D, L_max])."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.mix = mix
        self.k = nn.Parameter(torch.randn(WIDTH, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(x.transpose(1, 2), self.k)).transpose(1, 2)


def fft_conv(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n) * rfft(k[:, : u.shape[-1]], n=n) / n, n=n, norm="forward")[..., : u.shape[-1]]


def complex_conv(u: Tensor, k: Tensor) -> Tensor:
    n = u.shape[-1] + 64
    return ifft(torch.fft.fft(u, n=n) * torch.fft.fft(k, n=n), n=n).real[..., : u.shape[-1]]


def correlated(u: Tensor, k: Tensor) -> Tensor:
    n, k = 2 * u.shape[-1], k[:, : u.shape[-1]]
    y = irfft(rfft(u, n=n) * rfft(k.flip(-1), n=n).conj(), n=n)
    return y.roll(u.shape[-1] - 1, -1)[..., : u.shape[-1]]


def direct(u: Tensor, k: Tensor) -> Tensor:
    k = k[:, : u.shape[-1]]
    return F.conv1d(F.pad(u, (u.shape[-1] - 1, 0)), k.flip(-1).unsqueeze(1), groups=WIDTH)


def short(u: Tensor, k: Tensor) -> Tensor:
    return F.conv1d(u, k[:, None, :5], padding=4, groups=WIDTH)[..., : u.shape[-1]]


def toeplitz(u: Tensor, k: Tensor) -> Tensor:
    i = torch.arange(u.shape[-1], device=u.device)
    lag = i[:, None] - i
    return torch.einsum("bcj,cij->bci", u, torch.where(lag >= 0, k[:, : u.shape[-1]][:, lag], 0.0))


def attention(u: Tensor, k: Tensor) -> Tensor:
    u = u.transpose(1, 2)
    i = torch.arange(u.shape[1], device=u.device)
    scores = (u @ u.transpose(1, 2)).masked_fill(i[None, :] > i[:, None], float("-inf"))
    return (scores.softmax(-1) @ u).transpose(1, 2)


def fused_attention(u: Tensor, k: Tensor) -> Tensor:
    u = u.transpose(1, 2)
    return F.scaled_dot_product_attention(u, u, u, is_causal=True).transpose(1, 2)


def linear_attention(u: Tensor, k: Tensor) -> Tensor:
    u = u.transpose(1, 2)
    weights = torch.tril(u @ u.transpose(1, 2))
    return (weights @ u / (1 + weights.abs().sum(-1, keepdim=True))).transpose(1, 2)


def scan(u: Tensor, k: Tensor) -> Tensor:
    count = torch.arange(1, u.shape[-1] + 1, device=u.device)
    return u.cumsum(-1) / count + F.pad(u, (1, 0))[..., :-1] * u.softmax(1)


def positions(u: Tensor, k: Tensor) -> Tensor:
    x = u.transpose(1, 2).reshape(-1, WIDTH)
    x = F.layer_norm(x, (WIDTH,)).view(u.shape[0], u.shape[2], WIDTH).transpose(1, 2)
    return x * k[:, torch.arange(u.shape[-1], device=u.device)] + torch.cat([u[..., :1], u[..., :-1]], -1)


MIXERS = (fft_conv, complex_conv, correlated, direct, short, toeplitz, attention, fused_attention,
          linear_attention,           scan, positions)  # fmt: skip


def consistent(program: Program) -> bool:
    """Whether V_s(x)[:r] == V_r(x[:r]) for all pairs of sample lengths, in float64."""
    values = {k: v.double() if v.is_floating_point() else v for k, v in program.values.items()}
    x = torch.randn(2, max(LENGTHS), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = {s: program.run(x[:, :s].contiguous(), values) for s in LENGTHS}
    return all(
        out[s].shape[1] == s and torch.allclose(out[s][:, :r], out[r], rtol=1e-9, atol=1e-9, equal_nan=True)
        for r, s in itertools.combinations(LENGTHS, 2)
    )


def insert(node: fx.Node, target: Callable, *args: object, **kwargs: object) -> bool:
    """Put ``target(node, *args)`` between a node and its users."""
    users = list(node.users)
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, (node, *args), kwargs)
    for user in users:
        user.replace_input_with(node, new)
    return bool(users)


def axis_of(program: Program, node: fx.Node) -> list[int]:
    """Dimensions of a tensor node whose size follows the length."""
    return [
        d
        for d, size in enumerate(node.meta["val"].shape)
        if isinstance(size, torch.SymInt) and program.length in size.node.expr.free_symbols
    ]


def replace_arg(node: fx.Node, index: int, value: object) -> bool:
    args = list(node.args)
    if index >= len(args) or args[index] == value:
        return False
    args[index] = value
    node.args = tuple(args)  # type: ignore[assignment]
    return True


def changed_number(node: fx.Node, index: int, by: int) -> bool:
    """An integer argument (a number or a node) moved by ``by``."""
    if index >= len(node.args) or node.args[index] is None:
        return False
    value = node.args[index]
    if isinstance(value, fx.Node):
        with node.graph.inserting_before(node):
            value = node.graph.call_function(operator.add, (value, by))
        return replace_arg(node, index, value)
    return isinstance(value, int) and abs(value) < 1 << 40 and replace_arg(node, index, value + by)


def mutations(program: Program, node: fx.Node) -> Iterator[Callable[[fx.Node, fx.Node], bool]]:
    """Changes of one node, as functions of (the node, the copied program's length node)."""
    name = operator_name(node.target)
    if is_tensor(node):
        for d in axis_of(program, node):
            yield lambda n, s, d=d: insert(n, aten.flip.default, [d])
            yield lambda n, s, d=d: insert(n, aten.roll.default, [-1], [d])
            yield lambda n, s, d=d: insert(n, aten.roll.default, [1], [d])
            if node.meta["val"].is_floating_point():
                yield lambda n, s, d=d: insert_mean(n, d)
                yield lambda n, s, d=d: insert(n, aten.softmax.int, d)
                yield lambda n, s, d=d: insert(n, aten.cumsum.default, d)
        yield lambda n, s: insert(n, aten.mul.Tensor, s)
        if node.meta["val"].is_floating_point():
            yield lambda n, s: insert(n, aten.add.Tensor, s)
            yield lambda n, s: insert(n, aten.div.Tensor, s)
            yield lambda n, s: insert_threshold(n, s)
    if name in ("flip", "_conj", "clone", "tanh", "roll", "where", "masked_fill"):
        yield lambda n, s: bypass(n)
    if name == "slice":
        for index, by in itertools.product((2, 3), (-1, 1, 3)):
            yield lambda n, s, i=index, by=by: changed_number(n, i, by)
        yield lambda n, s: changed_number(n, 2, 1) & changed_number(n, 3, 1)
        yield lambda n, s: changed_number(n, 2, 2) & changed_number(n, 3, 2)
    if name in ("roll",):
        yield lambda n, s: replace_arg(n, 1, [3])
    if name in ("fft_rfft", "fft_fft", "fft_irfft", "fft_ifft"):
        for by in (-1, 1, -20):
            yield lambda n, s, by=by: shift_all(n, by)
            yield lambda n, s, by=by: changed_number(n, 1, by)
        yield lambda n, s: replace_arg(n, 1, s)
    if name in ("constant_pad_nd", "pad"):
        yield lambda n, s: replace_arg(n, 1, list(reversed(n.args[1])))  # type: ignore[arg-type]
    if name in ("gt", "ge", "lt", "le"):
        for other in (aten.gt, aten.ge, aten.lt, aten.le):
            overload = node.target._overloadname  # type: ignore[union-attr]
            yield lambda n, s, t=other, o=overload: retarget(n, getattr(t, o))
        yield lambda n, s: insert(n, aten.logical_not.default)
    if name == "softmax":
        yield lambda n, s: replace_arg(n, 1, -2)
    if name == "scaled_dot_product_attention":
        yield lambda n, s: drop_causal(n)
    if name == "arange":
        yield lambda n, s: insert(n, aten.add.Tensor, s)
        yield lambda n, s: insert(n, aten.sub.Tensor, 1)
        yield lambda n, s: insert(n, aten.mul.Tensor, -1)
    if name == "conv1d":
        yield lambda n, s: replace_arg(n, 4, [2])


def insert_mean(node: fx.Node, dim: int) -> bool:
    users = list(node.users)
    with node.graph.inserting_after(node):
        mean = node.graph.call_function(aten.mean.dim, (node, [dim], True))
    with node.graph.inserting_after(mean):
        new = node.graph.call_function(aten.add.Tensor, (node, mean))
    for user in users:
        user.replace_input_with(node, new)
    return bool(users)


def insert_threshold(node: fx.Node, length: fx.Node) -> bool:
    """x * (1 + max(0, s - 40)): shows at long sequences only."""
    users = list(node.users)
    with node.graph.inserting_after(node):
        below = node.graph.call_function(operator.sub, (length, 40))
    with node.graph.inserting_after(below):
        over = node.graph.call_function(torch.sym_max, (0, below))
    with node.graph.inserting_after(over):
        factor = node.graph.call_function(operator.add, (over, 1))
    with node.graph.inserting_after(factor):
        new = node.graph.call_function(aten.mul.Tensor, (node, factor))
    for user in users:
        user.replace_input_with(node, new)
    return bool(users)


def bypass(node: fx.Node) -> bool:
    source = next(
        (a for a in node.all_input_nodes if is_tensor(a) and a.meta["val"].dtype == node.meta["val"].dtype),
        None,
    )
    if source is None:
        return False
    node.replace_all_uses_with(source)
    return True


def retarget(node: fx.Node, target: Callable) -> bool:
    changed = node.target is not target
    node.target = target
    return changed


def drop_causal(node: fx.Node) -> bool:
    node.args = node.args[:3]
    node.kwargs = {}
    return True


def shift_all(node: fx.Node, by: int) -> bool:
    """Another transform length for every transform that shares this node's."""
    if len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
        return False
    n = node.args[1]
    users = [u for u in n.users if operator_name(u.target).startswith("fft")]
    with node.graph.inserting_after(n):
        new = node.graph.call_function(operator.add, (n, by))
    for user in users:
        user.replace_input_with(n, new)
    return True


def mutant(program: Program, index: int, change: Callable[[fx.Node, fx.Node], bool]) -> Program | None:
    """The program with one node changed and its sizes derived again; ``None`` where that cannot be."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(program.graph, copies)
    graph.output(output)
    nodes = list(program.graph.nodes)
    sequence = copies[program.sequence]
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]):
        length = graph.call_function(aten.sym_size.int, (sequence, 1))
    graph.lint()
    if not change(copies[nodes[index]], length):
        return None
    fake = program.sequence.meta["val"].fake_mode
    guards = len(fake.shape_env.guards)
    try:
        with fake, enable_python_dispatcher():
            for node in graph.nodes:
                if node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda a: a.meta["val"])
                    node.meta["val"] = node.target(*args, **kwargs)
        if len(fake.shape_env.guards) != guards:
            return None
        graph.lint()
        changed = replace(program, module=fx.GraphModule(nn.Module(), graph))
        list(changed.outputs)
        return changed
    except Exception:
        return None


def trace(mix: Callable[[Tensor, Tensor], Tensor]) -> Program:
    torch.manual_seed(0)
    return trace_module(Mixer(mix).eval(), torch.randn(2, 21, WIDTH), length=CAPACITY)


@pytest.mark.parametrize("mix", MIXERS, ids=lambda m: m.__name__)
def test_broken_programs_lose_their_proof(mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    program = trace(mix)
    proof = prove_prefix(program, CAPACITY)
    assert all(proof.proved(o) for o in program.outputs), proof.refusals
    assert consistent(program)
    broken = 0
    for index, node in enumerate(program.graph.nodes):
        if node.op != "call_function" or is_integer(node):
            continue
        for number, change in enumerate(mutations(program, node)):
            changed = mutant(program, index, change)
            if changed is None:
                continue
            try:
                fine = consistent(changed)
            except (RuntimeError, IndexError, ValueError, TypeError):
                continue
            if fine:
                continue
            broken += 1
            claim = prove_prefix(changed, CAPACITY)
            assert not all(claim.proved(o) for o in changed.outputs), (
                f"{mix.__name__}: mutation {number} of {node.format_node()} is inconsistent but proved\n"
                f"{changed.graph}"
            )
    assert broken >= 10
