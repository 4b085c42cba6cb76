"""The certificate: what must be proved, what must not, and what a proof says about each node."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fft import irfft, rfft

from corpus.false_alarms import FALSE_ALARMS
from corpus.others import OTHERS
from corpus.spellings import SPELLINGS
from corpus.traps import TRAPS
from fi_compile.capture import trace_module
from fi_compile.errors import Unsupported
from fi_compile.passes.prove_prefix import prove_prefix
from fi_compile.program import Program, operator_name
from fi_compile.proof import Proof
from fi_compile.rules import RULES

WIDTH, CAPACITY, L_MAX = 6, 48, 64

# Exact, but out of the rules' reach; each with the reason.
BEYOND = {
    "fft_real_arithmetic": "a complex product spelled in real and imaginary parts",
    "direct_toeplitz_index_select": "an index that takes the length as a value where it is masked",
    "spectrum_buffer": "a stored spectrum: its taps are known only by value, to rounding",
    "zero_times_future": "zero times a mean over all positions",
}


class Model(nn.Module):
    """A function of (x [B, L, D], table k [D, L_max]) as a module."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.function = function
        self.k = nn.Parameter(torch.randn(WIDTH, L_MAX))
        self.register_buffer("mask", torch.ones(L_MAX, L_MAX).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.k)


def traced(function: Callable[[Tensor, Tensor], Tensor], length: int = CAPACITY) -> Program:
    torch.manual_seed(0)
    return trace_module(Model(function).eval(), torch.randn(2, 21, WIDTH), length=length)


def proof_of(function: Callable[[Tensor, Tensor], Tensor], capacity: int = CAPACITY) -> Proof:
    return prove_prefix(traced(function, capacity), capacity)


def accepted(proof: Proof) -> bool:
    return all(proof.proved(o) or proof.newest(o) for o in proof.program.outputs)


def consistent(program: Program, lengths: tuple[int, ...] = (11, 12, 23, 41, 46)) -> bool:
    """The oracle: V_s(x)[:r] == V_r(x[:r]) in float64."""
    values = {k: v.double() if v.is_floating_point() else v for k, v in program.values.items()}
    x = torch.randn(2, max(lengths), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = {s: program.run(x[:, :s].contiguous(), values) for s in lengths}
    return all(
        torch.allclose(out[s][:, :r], out[r], rtol=1e-9, atol=1e-9, equal_nan=True)
        for r, s in itertools.combinations(lengths, 2)
    )


def node(proof: Proof, name: str, last: bool = True):
    found = [n for n in proof.program.graph.nodes if operator_name(n.target) == name]
    return found[-1 if last else 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPELLINGS, *OTHERS, *FALSE_ALARMS])
def test_corpus_is_proved(name: str) -> None:
    factory = {**SPELLINGS, **OTHERS, **FALSE_ALARMS}[name]
    factory = factory[0] if isinstance(factory, tuple) else factory
    torch.manual_seed(0)
    try:
        program = trace_module(factory(8, L_MAX).eval(), torch.randn(2, 21, 8), length=L_MAX)
    except Unsupported as refused:
        pytest.skip(f"not traced: {refused}")
    proof = prove_prefix(program, L_MAX)
    assert accepted(proof) == (name not in BEYOND), [str(r) for r in proof.refusals]
    assert accepted(proof) or proof.refusals or not program.lengths.upto(L_MAX).size


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_no_trap_is_proved(name: str) -> None:
    factory = TRAPS[name][0] if isinstance(TRAPS[name], tuple) else TRAPS[name]
    torch.manual_seed(0)
    try:
        program = trace_module(factory(8, 128).eval(), torch.randn(2, 21, 8), length=128)
    except Unsupported as refused:
        pytest.skip(f"not traced: {refused}")
    proof = prove_prefix(program, 128)
    if (
        program.lengths.minimum > 64
    ):  # traced beyond where it goes wrong: nothing is claimed of shorter lengths
        assert program.lengths.upto(64).size == 0
        return
    assert not accepted(proof)
    assert proof.refusals
    assert all(r.reason and r.nodes for r in proof.refusals)


def strictly_masked(x: Tensor, k: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    scores = (x @ x.mT).masked_fill(i >= i[:, None], -1e30)  # row 0 is masked as a whole: uniform over all
    return scores.softmax(-1) @ x


def overflowing(x: Tensor, k: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    growth = torch.exp(400 * (i - i[:, None]) * k[0, 0].abs())  # inf above the diagonal: 0 · inf
    return (torch.tril(torch.ones_like(growth)) * growth) @ x


def masked_late(x: Tensor, k: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    hidden = (i > i[:, None]) & (i[:, None] < 30)
    return (x @ x.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ x


def fft_with(n: Callable[[int], int], start: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    def conv(x: Tensor, k: Tensor) -> Tensor:
        length = x.shape[1]
        y = irfft(rfft(x.mT, n=n(length)) * rfft(k[:, :length], n=n(length)), n=n(length))
        return y[..., start : length + start].mT

    return conv


def swapped_views(x: Tensor, k: Tensor) -> Tensor:
    b, length, d = x.shape
    return x.reshape(b * length, d).view(length, b, d).transpose(0, 1)


LOWEST = torch.finfo(torch.float32).min


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(x.shape[1])
    return i[:, None], i


def hidden_by(
    order: Callable[[Tensor], Tensor], value: float = float("-inf")
) -> Callable[[Tensor, Tensor], Tensor]:
    """Attention whose mask compares ``order(positions)``."""

    def attend(x: Tensor, k: Tensor) -> Tensor:
        i = order(torch.arange(x.shape[1]))
        return (x @ x.mT).masked_fill(i > i[:, None], value).softmax(-1) @ x

    return attend


def late_rows_masked(value: float, start: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Attention whose rows from ``start`` on see nothing: no key at all is left open."""

    def attend(x: Tensor, k: Tensor) -> Tensor:
        q, key = positions(x)
        scores = (x @ x.mT).masked_fill(key > q, value)
        return scores.masked_fill((key <= q) & (q - key >= start), value).softmax(-1) @ x

    return attend


def late_rows_lowered(x: Tensor, k: Tensor) -> Tensor:
    q, key = positions(x)
    return ((x @ x.mT) - 1e33 * (q >= 40)).masked_fill(key > q, -1e32).softmax(-1) @ x


def first_row_of_mask(broadcast: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def attend(x: Tensor, k: Tensor) -> Tensor:
        q, key = positions(x)
        low = torch.full((), -1e38)
        mask = broadcast(torch.where(key > q, low, torch.zeros(()))[:1], x.shape[1])
        return (x @ x.mT + mask + torch.where((key == 0) & (q >= 40), low, torch.zeros(()))).softmax(-1) @ x

    return attend


def padded_spectrum(x: Tensor, k: Tensor) -> Tensor:
    n = 2 * x.shape[1]
    return irfft(F.pad(rfft(x.mT, n=n), (0, 4)), n=n)[..., : x.shape[1]].mT


def read_by_two_indices(positions: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Attention masked by position ids [B, s] that are read as transformers libraries do: by row and place."""

    def function(x: Tensor, k: Tensor) -> Tensor:
        i, rows = torch.arange(x.shape[1]), torch.arange(x.shape[0])[:, None, None]
        ids = positions(i).expand(x.shape[0], -1)
        later = ids[rows, i[None, None, :]] > ids[rows, i[None, :, None]]
        return (x @ x.mT).masked_fill(later, LOWEST).softmax(-1) @ x

    return function


def one_document(before: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows weighted by the number of the document they are in, a new one where positions do not go on by one."""

    def function(x: Tensor, k: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        document = (torch.diff(ids, prepend=before(ids)) != 1).cumsum(1)
        return x * (document + 1).unsqueeze(-1)

    return function


REFUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transform one short": fft_with(lambda s: 2 * s - 2),
    "transform too short late": fft_with(lambda s: s + torch.sym_min(s, 30)),
    "window late": fft_with(lambda s: 2 * s, 1),
    "autocorrelation": lambda x, k: (
        irfft(rfft(x.mT, n=2 * x.shape[1]) * rfft(x.mT, n=2 * x.shape[1]).conj(), n=2 * x.shape[1])[
            ..., : x.shape[1]
        ].mT
    ),
    "threshold of the length": lambda x, k: x * (1 + torch.sym_max(0, x.shape[1] - 40)),
    "divided by the length": lambda x, k: x.cumsum(1) / x.shape[1],
    "full of the length": lambda x, k: x + torch.full((x.shape[1], 1), x.shape[1]),
    "norm not undone": lambda x, k: (
        irfft(
            rfft(x.mT, n=2 * x.shape[1], norm="forward") * rfft(k, n=2 * x.shape[1]),
            n=2 * x.shape[1],
            norm="forward",
        )[..., : x.shape[1]].mT
    ),
    "mask that ends at 30": masked_late,
    "finite mask of -3": lambda x, k: (
        torch.where(torch.arange(x.shape[1]) > torch.arange(x.shape[1])[:, None], -3.0, x @ x.mT).softmax(-1)
        @ x
    ),
    "whole row masked": strictly_masked,
    "late rows masked, finite": late_rows_masked(LOWEST, 0),
    "late rows lowered": late_rows_lowered,
    "first row of a mask broadcast": first_row_of_mask(lambda row, s: row),
    "first row of a mask expanded": first_row_of_mask(lambda row, s: row.expand(s, s)),
    "8-bit positions wrap": hidden_by(lambda i: (i * 8).to(torch.uint8)),
    "8-bit products wrap": hidden_by(lambda i: i.to(torch.int8) * 3),
    "64-bit products wrap": hidden_by(lambda i: i * 2**58),
    "truncated positions": hidden_by(lambda i: (i.double() * 0.5).long()),
    "boolean positions": hidden_by(lambda i: i.bool().long()),
    "rounded positions": hidden_by(lambda i: i.float() + (2.0**24 - 20)),
    "half precision positions": hidden_by(lambda i: i.to(torch.bfloat16) + 240),
    "positions in pairs": hidden_by(lambda i: i // 2),
    "positions modulo": hidden_by(lambda i: i % 32),
    "zero times infinity": overflowing,
    "softmax over queries": lambda x, k: (
        torch.softmax(
            (x @ x.mT).masked_fill(
                torch.arange(x.shape[1]) > torch.arange(x.shape[1])[:, None], float("-inf")
            ),
            -2,
        )
        @ x
    ),
    "transposed mask": lambda x, k: torch.tril(x @ x.mT).mT @ x,
    "negative index wraps": lambda x, k: x[:, torch.arange(x.shape[1]) - 1],
    "index from data": lambda x, k: x[:, -(x[0, :, 0] > 0).long()],
    "reversed positions read by two indices": read_by_two_indices(lambda i: -i),
    "differences from another start": lambda x, k: (
        x * torch.diff(x.shape[1] - torch.arange(x.shape[1]), prepend=torch.zeros(1).long())[:, None]
    ),
    "newest row repeated": lambda x, k: x + x[:, -1:].expand(-1, x.shape[1], -1),
    "newest row broadcast": lambda x, k: x * x[:, -1:],
    "views in another order": swapped_views,
    "positions from the end": lambda x, k: x * k[0, torch.arange(x.shape[1] - 1, -1, -1)][:, None],
    "cumsum flipped once": lambda x, k: x.flip(1).cumsum(1).flip(1),
    "unflipped kernel": lambda x, k: (
        F.conv1d(F.pad(x.mT, (x.shape[1] - 1, 0)), k[:, None, : x.shape[1]], groups=WIDTH).mT
    ),
    "same padding": lambda x, k: F.conv1d(x.mT, k[:, None, :3], padding=1, groups=WIDTH).mT,
    "rolled": lambda x, k: x.roll(1, 1),
    "layer norm over time": lambda x, k: F.layer_norm(x.mT, (x.shape[1],)).mT,
    "group norm": lambda x, k: F.group_norm(x.mT, 2).mT,
    "sorted": lambda x, k: x.sort(1).values,
    "maximum over time": lambda x, k: x - x.amax(1, keepdim=True),
}

PROVED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "positions read by two indices": read_by_two_indices(lambda i: i + 3),
    "one document": one_document(lambda p: p[:, :1] - 1),
    "transform exactly long enough": fft_with(lambda s: 2 * s - 1),
    "self convolution": lambda x, k: irfft(
        rfft(x.mT, n=2 * x.shape[1]) * rfft(x.mT, n=2 * x.shape[1]), n=2 * x.shape[1]
    )[..., : x.shape[1]].mT,
    "scale cancels": lambda x, k: 2 * x.shape[1] * irfft(
        rfft(x.mT, n=2 * x.shape[1], norm="forward") * rfft(k[:, : x.shape[1]], n=2 * x.shape[1]),
        n=2 * x.shape[1],
    )[..., : x.shape[1]].mT,
    "finite filter": lambda x, k: irfft(
        rfft(x.mT, n=x.shape[1] + 30) * rfft(k[:, :30], n=x.shape[1] + 30), n=x.shape[1] + 30
    )[..., : x.shape[1]].mT,
    "first row": lambda x, k: x * x[:, :1],
    "table by arange": lambda x, k: x * k.mT[torch.arange(x.shape[1])],
    "cumsum flipped twice": lambda x, k: x.flip(1).flip(1).cumsum(1),
    "dilated": lambda x, k: F.conv1d(F.pad(x.mT, (8, 0)), k[:, None, :5], dilation=2, groups=WIDTH).mT,
    "merged and unmerged": lambda x, k: F.gelu(x.reshape(-1, WIDTH) @ k[:, :WIDTH]).view(x.shape),
    "window of keys": lambda x, k: (x @ x.mT).masked_fill(
        (torch.arange(x.shape[1]) > torch.arange(x.shape[1])[:, None])
        | (torch.arange(x.shape[1]) < torch.arange(x.shape[1])[:, None] - 9), float("-inf")
    ).softmax(-1) @ x,
    "finite mask": hidden_by(lambda i: i, LOWEST),
    "8-bit positions that fit": hidden_by(lambda i: (i * 2).to(torch.uint8)),
    "halves of positions": hidden_by(lambda i: i.float() * 0.5 + 3),
    "whole positions through floats": hidden_by(lambda i: (i.float() * 2 + 1).long()),
    "mask expanded": lambda x, k: (x @ x.mT).masked_fill(
        (torch.arange(x.shape[1]) > torch.arange(x.shape[1])[:, None]).expand(x.shape[0], -1, -1), LOWEST
    ).softmax(-1) @ x,
    "two attentions": lambda x, k: hidden_by(lambda i: i, LOWEST)(hidden_by(lambda i: i, LOWEST)(x, k), k),
    "products of lower triangles": lambda x, k: torch.tril(x @ x.mT) @ torch.tril(x @ x.mT, -1) @ x,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_inconsistent_programs_are_refused(name: str) -> None:
    proof = proof_of(REFUSED[name])
    assert not consistent(proof.program), "the test's own claim: this program is not prefix-consistent"
    assert not accepted(proof)
    assert proof.refusals


@pytest.mark.parametrize("name", PROVED)
def test_consistent_programs_are_proved(name: str) -> None:
    proof = proof_of(PROVED[name])
    assert consistent(proof.program), "the test's own claim: this program is prefix-consistent"
    assert accepted(proof), [str(r) for r in proof.refusals]
    assert proof.rows_independent


def test_alias_refusal_has_numbers_and_the_source_line() -> None:
    (refusal, *_) = proof_of(REFUSED["transform too short late"]).refusals
    assert refusal.kind == "alias"
    assert "transform length" in refusal.reason
    assert refusal.source is not None
    assert "test_prove.py" in refusal.source


def test_unknown_operators_are_named() -> None:
    proof = proof_of(lambda x, k: torch.linalg.qr(x).Q)
    assert [r.kind for r in proof.refusals] == ["unknown_operator"]
    assert "linalg_qr" in proof.refusals[0].reason


def test_newest_row_is_certified_but_not_proved() -> None:
    proof = proof_of(lambda x, k: torch.tanh(x.cumsum(1)[:, -1]))
    (output,) = proof.program.outputs
    assert proof.newest(output)
    assert not proof.proved(output)
    assert not proof.newest(node(proof, "cumsum"))


def test_row_local_is_denied_where_rows_mix() -> None:
    proof = proof_of(lambda x, k: torch.tril(F.gelu(x) @ x.mT) @ x + F.pad(x, (0, 0, 1, 0))[:, :-1])
    assert proof.row_local(node(proof, "gelu"))
    assert not proof.row_local(node(proof, "matmul"))
    assert not proof.row_local(node(proof, "pad"))


def test_linearity_of_single_operators() -> None:
    proof = proof_of(lambda x, k: F.linear(F.gelu(x) * x + x.cumsum(1), k[:, :WIDTH], k[0, :WIDTH]))
    mul, add, gelu, linear = (node(proof, n) for n in ("mul", "add", "gelu", "linear"))
    assert proof.linear_in(mul, {gelu})
    assert not proof.linear_in(mul, set(mul.all_input_nodes))
    assert proof.linear_in(add, set(add.all_input_nodes))
    assert not proof.linear_in(add, {mul})
    assert proof.affine_in(add, {mul})
    assert proof.affine_in(linear, {add})
    assert not proof.linear_in(linear, {add})
    assert not proof.affine_in(gelu, set(gelu.all_input_nodes))


def test_shift_invariance_follows_the_data_path() -> None:
    proof = proof_of(fft_with(lambda s: 2 * s))
    assert proof.shift_invariant(node(proof, "slice"))
    proof = proof_of(PROVED["self convolution"])
    assert proof.proved(node(proof, "slice"))
    assert not proof.shift_invariant(node(proof, "slice"))
    proof = proof_of(PROVED["table by arange"])
    assert not proof.shift_invariant(node(proof, "mul"))


def test_masks_held_as_tables_are_read_and_reported() -> None:
    class Masked(Model):
        def forward(self, x: Tensor) -> Tensor:
            s = x.shape[1]
            return (x @ x.mT).masked_fill(~self.mask[:s, :s], float("-inf")).softmax(-1) @ x

    program = trace_module(Masked(lambda x, k: x).eval(), torch.randn(2, 21, WIDTH), length=CAPACITY)
    proof = prove_prefix(program, CAPACITY)
    assert accepted(proof), [str(r) for r in proof.refusals]
    assert any("mask" in name for name in proof.values_read)
    program.values[next(iter(proof.values_read))][2, 45] = True  # one key of the future
    assert not accepted(prove_prefix(program, CAPACITY))


def test_batch_rows_that_meet_are_reported() -> None:
    proof = proof_of(lambda x, k: x - x.mean(0, keepdim=True))
    assert accepted(proof)
    assert not proof.rows_independent


def test_capacity_decides() -> None:
    fixed = fft_with(lambda s: 90)
    assert accepted(proof_of(fixed, 45))
    assert not accepted(proof_of(fixed, 60))


BATCH_VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "factor": lambda x, k: x * (k[0, 0] / x.shape[0]),
    "product": lambda x, k: x * x.shape[0],
    "term": lambda x, k: x + x.shape[0],
    "fill": lambda x, k: x * torch.full((1, 1, 1), x.shape[0]),
    "bound": lambda x, k: x.clamp(max=x.shape[0]),
    "comparison": lambda x, k: x * (x > x.shape[0]),
    "first position": lambda x, k: x * torch.arange(x.shape[0], x.shape[0] + WIDTH),
    "count of ones": lambda x, k: x * torch.ones(x.shape[0]).sum(),
    "minimum of batch and length": lambda x, k: x * torch.sym_min(x.shape[0], x.shape[1]),
    "row by number": lambda x, k: x * k[:, x.shape[0]].sum(),
    "rows up to the batch": lambda x, k: x * k[:, : x.shape[0]].mean(),
    "numbers counted down": lambda x, k: x * torch.arange(x.shape[0]).flip(0)[:, None, None],
}


BOUNDS_THE_BATCH = {"row by number", "rows up to the batch"}


@pytest.mark.parametrize("name", BATCH_VALUES)
def test_the_batch_size_is_no_value(name: str) -> None:
    proof = proof_of(BATCH_VALUES[name])
    assert isinstance(proof.program.batch, int) == (name in BOUNDS_THE_BATCH)
    if name in BOUNDS_THE_BATCH:  # traced for the example's rows alone
        return
    assert not accepted(proof)
    assert "batch_as_value" in [r.kind for r in proof.refusals]


MIXED_ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda x, k: x - x.mean(0, keepdim=True),
    "softmax": lambda x, k: x.softmax(0),
    "running sum": lambda x, k: x.cumsum(0),
    "sort": lambda x, k: x.sort(0).values,
    "flip": lambda x, k: x + x.flip(0),
    "roll": lambda x, k: x + x.roll(1, 0),
    "first row": lambda x, k: x + x[:1],
    "contraction": lambda x, k: torch.einsum("bsd,csd,cse->bse", x, x, x),
    "attention over the batch": lambda x, k: F.scaled_dot_product_attention(
        x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1)
    ).transpose(0, 1),
    "index": lambda x, k: x.index_select(0, (x[:, 0, 0] > 0).long()),
    "row numbers": lambda x, k: x * (torch.arange(x.shape[0]) + 1)[:, None, None],
    "group norm": lambda x, k: F.group_norm(x[:, 0].T, 1).T[:, None] + x,
}


@pytest.mark.parametrize("name", MIXED_ROWS)
def test_rows_that_meet_are_not_independent(name: str) -> None:
    assert not proof_of(MIXED_ROWS[name]).rows_independent


@pytest.mark.parametrize(
    "function",
    [
        lambda x, k: x * torch.ones(x.shape[0], 1, 1),
        lambda x, k: x + k[0, :WIDTH].expand(x.shape[0], x.shape[1], -1),
        lambda x, k: x.view(x.shape[0], x.shape[1], 2, 3).flatten(2) + x.new_zeros(x.shape[0], 1, WIDTH),
        lambda x, k: torch.einsum("bsd,bse->bsde", x, x).sum(-1),
        lambda x, k: torch.cat([x, k[:, :1].mT.expand(x.shape[0], x.shape[1], -1)], -1),
    ],
)
def test_sizes_of_the_batch_keep_rows_independent(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    proof = proof_of(function)
    assert accepted(proof), [str(r) for r in proof.refusals]
    assert proof.rows_independent


def test_one_row_of_the_sequence_is_not_read_row_by_row() -> None:
    proof = proof_of(lambda x, k: F.gelu(x) - F.gelu(x)[:, :1] + x[:, :, :1])
    slices = [n for n in proof.program.graph.nodes if operator_name(n.target) == "slice"]
    local = {n.args[1]: proof.row_local(n) for n in slices if n.args[3] == 1}
    assert local == {1: False, 2: True}
    proof = proof_of(lambda x, k: F.gelu(x) - F.gelu(x).narrow(1, 0, 1))
    narrowed = [n for n in proof.program.graph.nodes if operator_name(n.target) in ("narrow", "slice")]
    assert not any(proof.row_local(n) for n in narrowed if n.args[1] == 1)
    proof = proof_of(lambda x, k: x * k[0, : x.shape[1]][:, None])
    assert proof.row_local(node(proof, "slice"))


@pytest.mark.parametrize("value", [LOWEST, float("-inf")])
def test_rows_that_may_be_masked_as_a_whole_are_refused(value: float) -> None:
    def padded(x: Tensor, k: Tensor) -> Tensor:
        q, key = positions(x)
        return (x @ x.mT).masked_fill((key > q) | (x[:, None, :, 0] > 0), value).softmax(-1) @ x

    assert not accepted(proof_of(padded))


def test_a_padded_spectrum_is_refused() -> None:
    assert [r.kind for r in proof_of(padded_spectrum).refusals] == ["spectrum"]


def test_an_exception_in_a_rule_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: object) -> None:
        raise TypeError("not prepared for this")

    monkeypatch.setitem(RULES, "gelu", replace(RULES["gelu"], apply=broken))
    assert [r.kind for r in proof_of(lambda x, k: F.gelu(x)).refusals] == ["internal"]


def conv_by_weight(x: Tensor, w: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.mT, (w.shape[-1] - 1, 0)), w.unsqueeze(1), groups=WIDTH).mT


# Tables cut from their end, and tables summed over keys.
TABLES_RIGHT = {
    "the end of a table as weight": lambda x, k: conv_by_weight(x, k[:, -x.shape[1] :]),
    "the end of a part of a table": lambda x, k: conv_by_weight(x, k[:, :60][:, 60 - x.shape[1] : 60]),
    "the end flipped to a filter": lambda x, k: x * k[:, -x.shape[1] :].flip(-1).mT,
    "a table's row sums": lambda x, k: x * causal_table(x).sum(-1, keepdim=True),
}
TABLES_WRONG = {
    "the end of a table in its order": lambda x, k: x * k[:, -x.shape[1] :].mT,
    "the end flipped as weight": lambda x, k: conv_by_weight(x, k[:, -x.shape[1] :].flip(-1)),
    "column sums": lambda x, k: x * causal_table(x).sum(-2).unsqueeze(-1),
    "row sums of a whole table": lambda x, k: (
        x * table_lag(x).double().cos().sum(-1, keepdim=True).to(x.dtype)
    ),
    "row sums that look ahead late": lambda x, k: (
        x * torch.where((table_lag(x) >= 0) | (table_lag(x) < -40), 1.0, 0.0).sum(-1, keepdim=True)
    ),
}


def table_lag(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return i[:, None] - i


def causal_table(x: Tensor) -> Tensor:
    """Decided by value alone: zeros above the diagonal that come out of an exponential."""
    return torch.exp(table_lag(x).masked_fill(table_lag(x) < 0, 0) * -0.1) * (table_lag(x) >= 0).sqrt()


@pytest.mark.parametrize("name", TABLES_RIGHT)
def test_tables_that_are_right_are_proved(name: str) -> None:
    proof = proof_of(TABLES_RIGHT[name])
    assert consistent(proof.program)
    assert accepted(proof), proof.refusals


@pytest.mark.parametrize("name", TABLES_WRONG)
def test_tables_that_are_wrong_are_refused(name: str) -> None:
    assert not accepted(proof_of(TABLES_WRONG[name]))


def test_a_template_is_no_part_of_the_data_path() -> None:
    proof = proof_of(lambda x, k: (x.cumsum(1) * 2).type_as(x.double()))
    template = node(proof, "type_as")
    assert proof.affine_in(template, set(template.all_input_nodes))
    assert not proof.linear_in(template, {template.args[1]})
