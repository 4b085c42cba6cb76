"""The generation loop against decoders whose every answer is known."""

import math
import sys
from collections import OrderedDict
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fi_compile.generate import candidates, generate, sample


class Counting:
    """Predicts (sum of all tokens so far) mod V, and records what it was asked."""

    def __init__(self, vocab: int = 11, wrap=lambda logits: logits):
        self.vocab, self.wrap = vocab, wrap
        self.calls: list[Tensor] = []

    def answer(self) -> object:
        return self.wrap(10.0 * torch.nn.functional.one_hot(self.total % self.vocab, self.vocab))

    def prefill(self, prompt: Tensor) -> object:
        self.calls = [prompt.clone()]
        self.total = prompt.sum(1)
        return self.answer()

    def step(self, token: Tensor) -> object:
        assert token.dtype == torch.int64
        self.calls.append(token.clone())
        self.total = self.total + token
        return self.answer()


class Fixed:
    """The same logits [B, V] at every position."""

    def __init__(self, logits: Tensor):
        self.logits = logits

    def prefill(self, prompt: Tensor) -> Tensor:
        return self.logits

    def step(self, token: Tensor) -> Tensor:
        return self.logits


def counting_reference(prompt: Tensor, n: int, vocab: int = 11) -> Tensor:
    rows = prompt.tolist()
    for row in rows:
        for _ in range(n):
            row.append(sum(row) % vocab)
    return torch.tensor(rows)


PROMPT = torch.tensor([[1, 2, 4], [3, 3, 3]])


@pytest.mark.parametrize("n", [1, 2, 9])
def test_greedy_follows_the_decoder_and_skips_the_last_step(n: int):
    dec = Counting()
    out = generate(dec, PROMPT, n)
    assert torch.equal(out, counting_reference(PROMPT, n))
    assert torch.equal(dec.calls[0], PROMPT)
    assert [c.tolist() for c in dec.calls[1:]] == out[:, 3:-1].T.tolist()


def test_no_new_tokens_returns_a_copy_and_asks_nothing():
    dec, prompt = Counting(), PROMPT.clone()
    out = generate(dec, prompt, 0)
    prompt.zero_()
    assert torch.equal(out, PROMPT)
    assert dec.calls == []


def test_finished_rows_repeat_their_stop_id():
    free = counting_reference(PROMPT, 8)  # 7 3 6 1 2 4 8 5 | 9 7 3 6 1 2 4 8
    assert free[:, 3:].tolist() == [[7, 3, 6, 1, 2, 4, 8, 5], [9, 7, 3, 6, 1, 2, 4, 8]]
    dec = Counting()
    out = generate(dec, PROMPT, 8, stop_ids=[6, 2])
    # Row 0 stops at 6 after three tokens, row 1 at 6 after four: the fourth column is the last.
    assert out[:, 3:].tolist() == [[7, 3, 6, 6], [9, 7, 3, 6]]
    # What the decoder reads is what was returned, also in a row that has finished.
    assert [c.tolist() for c in dec.calls[1:]] == out[:, 3:-1].T.tolist()
    out = generate(dec, PROMPT, 8, stop_ids=[1])
    assert out[:, 3:].tolist() == [[7, 3, 6, 1, 1], [9, 7, 3, 6, 1]]


def test_stop_ids_in_the_prompt_do_not_stop():
    assert generate(Counting(), PROMPT, 4, stop_ids=[4]).shape == (2, 7)


def test_stop_in_one_row_only_runs_to_the_end():
    out = generate(Counting(), PROMPT, 5, stop_ids=[8, 7, 9])
    assert out[:, 3:].tolist() == [[7], [9]]
    out = generate(Counting(), PROMPT, 4, stop_ids=[9])
    assert out[:, 3:].tolist() == [[7, 3, 6, 1], [9, 9, 9, 9]]
    out = generate(Counting(), PROMPT, 6, stop_ids=[3, 9])
    assert out[:, 3:].tolist() == [[7, 3], [9, 9]]


def test_on_token_streams_columns_it_may_keep_and_change():
    seen = []

    def take(token: Tensor) -> bool:
        seen.append(token.tolist())
        token.fill_(0)
        return True  # ignored

    out = generate(Counting(), PROMPT, 5, on_token=take)
    assert torch.equal(out, counting_reference(PROMPT, 5))
    assert seen == out[:, 3:].T.tolist()


def test_interrupt_propagates_and_the_decoder_stays_usable():
    dec, seen = Counting(), []

    def interrupt(token: Tensor) -> None:
        seen.append(token)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(dec, PROMPT, 8, on_token=interrupt)
    assert len(dec.calls) == 3
    assert torch.equal(generate(dec, PROMPT, 4), counting_reference(PROMPT, 4))


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"hidden": torch.zeros(2, 5), "logits": x},
        lambda x: OrderedDict(loss=torch.zeros(()), scores=x),
        lambda x: (torch.zeros(2, 5, 1), x, torch.zeros(2, 3)),
        lambda x: Output(torch.zeros(2, 5), x),
    ],
)
def test_logits_are_found_in_any_output(wrap):
    dec = Counting(wrap=lambda x: wrap(x.float()))
    assert torch.equal(generate(dec, PROMPT, 4), counting_reference(PROMPT, 4))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda x: x[:, None].float(), r"\[2, V\].*\[2, 1, 11\]"),
        (lambda x: x[:1].float(), r"\[2, V\].*\[1, 11\]"),
        (lambda x: x.long(), "floating"),
        (lambda x: {"states": x[0]}, "dict.*'logits'"),
        (lambda x: None, "NoneType"),
    ],
)
def test_other_outputs_are_refused(wrap, message: str):
    with pytest.raises(ValueError, match=message):
        generate(Counting(wrap=wrap), PROMPT, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"prompt": torch.tensor([1, 2])}, r"\[B, P\]"),
        ({"prompt": torch.zeros(1, 3)}, "int64"),
        ({"prompt": torch.zeros(1, 3, dtype=torch.int32)}, "int64"),
        ({"prompt": torch.zeros(2, 0, dtype=torch.int64)}, "empty"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments: dict, message: str):
    dec = Counting()
    with pytest.raises(ValueError, match=message):
        generate(**({"model_or_decoder": dec, "prompt": PROMPT, "max_new_tokens": 1} | arguments))
    assert dec.calls == []


def test_capacity_counts_the_positions_read():
    class Limited(Counting):
        capacity = 7

    dec = Limited()
    assert generate(dec, PROMPT, 5).shape == (2, 8)
    with pytest.raises(ValueError, match=r"holds 7 positions.*need 8"):
        generate(dec, PROMPT, 6)


def test_a_model_is_turned_into_a_decoder_of_just_the_capacity_needed(monkeypatch):
    model, asked = torch.nn.Identity(), []

    def decoder(model, example, *, max_length):
        asked.append((model, example.shape, max_length))
        return Counting()

    module = ModuleType("fi_compile.decoder")
    monkeypatch.setattr(module, "decoder", decoder, raising=False)
    monkeypatch.setitem(sys.modules, "fi_compile.decoder", module)
    assert torch.equal(generate(model, PROMPT, 6), counting_reference(PROMPT, 6))
    # The last token is never read: 3 + 6 - 1.
    assert asked == [(model, (2, 3), 8)]


def test_what_is_neither_model_nor_decoder_is_refused():
    with pytest.raises(TypeError, match="prefill and step, got function"):
        generate(lambda ids: ids, PROMPT, 2)  # type: ignore[arg-type]


def test_nan_is_refused():
    logits = torch.zeros(2, 4)
    logits[1, 2] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN"):
            sample(logits, temperature=temperature)
    with pytest.raises(ValueError, match="-inf"):
        sample(torch.full((1, 3), -torch.inf), temperature=1.0)


def test_a_seed_decides_the_result_and_the_global_generator_is_left_alone():
    dec = Fixed(torch.randn(2, 50, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    runs = [generate(dec, PROMPT, 30, temperature=1.0, seed=s) for s in (1, 1, 2, None, None)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[3], runs[4])
    # The rows are independent draws: equal logits must not give equal rows.
    same = generate(Fixed(torch.zeros(2, 50)), PROMPT[:1].expand(2, 3), 30, temperature=1.0, seed=1)
    assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.7, "top_k": 4, "top_p": 0.8},
    ],
)
def test_draws_follow_the_distribution(options: dict):
    """Chi-square against the reference distribution, at 10⁻⁶; the seed is fixed."""
    logits = torch.tensor([[1.0, -torch.inf, 0.3, 2.0, 1.7, -1.0]])
    draws = 20_000
    tokens = sample(logits.expand(draws, -1), generator=torch.Generator().manual_seed(0), **options)
    expected = reference(logits[0].tolist(), **options)
    observed = torch.bincount(tokens, minlength=6).tolist()
    assert all(o == 0 for o, e in zip(observed, expected, strict=True) if e == 0)
    statistic = sum((o - draws * e) ** 2 / (draws * e) for o, e in zip(observed, expected, strict=True) if e)
    assert statistic < 35.9  # upper 10⁻⁶ point for 5 degrees of freedom


def reference(
    logits: list[float], temperature: float, top_k: int | None = None, top_p: float | None = None
) -> list[float]:
    """The distribution by definition, in plain Python: try every set size in turn."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    top = logits[order[0]]
    weights = {i: math.exp((logits[i] - top) / temperature) for i in order}
    if top_p is not None:
        total = sum(weights.values())
        size = next(
            (n for n in range(1, len(order) + 1)
             if math.fsum(weights[i] for i in order[:n]) >= top_p * total),
            len(order),
        )  # fmt: skip
        weights = {i: weights[i] for i in order[:size]}
    total = math.fsum(weights.values())
    return [weights.get(i, 0.0) / total for i in range(len(logits))]


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-400, 400), min_size=1, max_size=12, unique=True),
    temperature=st.floats(0.05, 20),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.001, 1),
)
def test_candidates_are_the_reference_sets(logits, temperature, top_k, top_p):
    values = [x / 64 for x in logits]
    probs, ids = candidates(torch.tensor([values]), temperature=temperature, top_k=top_k, top_p=top_p)
    got = torch.zeros(1, len(values), dtype=torch.float64).scatter(1, ids, probs)[0]
    want = torch.tensor(reference(values, temperature, top_k, top_p), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_ties_and_extremes():
    flat = torch.zeros(1, 8)
    assert (candidates(flat, top_k=3)[0] > 0).sum() == 3
    assert (candidates(flat, top_p=0.5)[0] > 0).sum() == 4  # exactly the mass asked for
    assert (candidates(flat, top_p=0.5 + 1e-9)[0] > 0).sum() == 5
    assert (candidates(flat, top_p=1e-12)[0] > 0).sum() == 1
    assert (candidates(flat, top_p=1.0)[0] > 0).sum() == 8
    assert candidates(flat, top_k=100)[0].shape == (1, 8)
    cold = torch.tensor([[1e30, 0.0, -1e30]])
    assert sample(cold, temperature=1e-300).tolist() == [0]
    with pytest.raises(ValueError, match="greedy"):
        candidates(flat, temperature=0.0)


def test_progress_goes_to_stderr_and_changes_nothing(capsys):
    out = generate(Counting(), PROMPT, 4, progress=True)
    assert torch.equal(out, counting_reference(PROMPT, 4))
    assert capsys.readouterr().out == ""
