"""The transparent mode as a user meets it: torch.compile(model, backend="flashinf")."""

import gc
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fi_compile
from corpus import SPELLINGS, TRAPS, LanguageModel, scale_weights
from corpus.models import register_output
from fi_compile import sessions
from fi_compile.doors import FlashinfWarning
from fi_compile.lane import Lane
from transparent import Runs, assert_like, compiled

VOCAB = 11


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo):
    pass


def language_model(*mixers: str, width: int = 6, l_max: int = 128, seed: int = 0, **kwargs) -> LanguageModel:
    names = mixers or ("fft_scale_on_filter",)
    blocks = [SPELLINGS[name](width, l_max) for name in names]
    model = LanguageModel(blocks, width, VOCAB, l_max=l_max, **kwargs)
    return scale_weights(model, seed).eval()


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length))


def extended(ids: Tensor, more: int = 1) -> Tensor:
    return torch.cat([ids, random_ids(ids.shape[0], more).to(ids.dtype)], 1)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def decode(fast: Callable, model: Callable, ids: Tensor, calls: int) -> Tensor:
    """Call both on a growing prefix and compare; the prefix of the next call."""
    for _ in range(calls):
        assert_like(fast(ids), model(ids))
        ids = extended(ids)
    return ids


# -- a growing prefix --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("batch", [1, 2])
def test_growing_prefix_equals_the_model_at_every_length(counted: Runs, dynamic: bool | None, batch: int):
    model = language_model("fft_scale_on_filter", "short_conv1d_3", gating=True)
    fast, ids = compiled(model, dynamic=dynamic), random_ids(batch, 1)
    with torch.inference_mode():
        for _ in range(70):
            assert_like(fast(ids), model(ids))
            ids = extended(ids)
    assert counted.plain <= 4, "the first calls (s = 1, static, B = s, the first dynamic one) and no more"


def test_prompts_and_chunks(counted: Runs):
    model = language_model()
    fast, ids = compiled(model), random_ids(1, 20)
    with torch.no_grad():
        for more in (1, 3, 1, 30, 2):
            assert_like(fast(ids), model(ids))
            ids = extended(ids, more)
        assert_like(fast(ids), model(ids))
    assert counted.plain == 1


def test_float64_is_exact():
    model = language_model().double()
    fast, ids = compiled(model), random_ids(2, 5)
    with torch.inference_mode():
        for _ in range(40):
            assert_like(fast(ids), model(ids), 1e-10)
            ids = extended(ids)


def test_features(counted: Runs):
    model = language_model().body
    fast, x = compiled(model), torch.randn(2, 4, 6)
    with torch.inference_mode():
        for _ in range(30):
            assert_like(fast(x), model(x))
            x = torch.cat([x, torch.randn(2, 1, 6)], 1)
    assert counted.plain == 1


@pytest.mark.slow
def test_inductor_step():
    model = language_model()
    fast, ids = compiled(model, step="inductor"), random_ids(1, 5)
    with torch.inference_mode():
        for _ in range(12):
            assert_like(fast(ids), model(ids))
            ids = extended(ids)


@pytest.mark.parametrize("output", ["tuple", "dict", "dataclass", "hidden"])
def test_output_structures(output: str, counted: Runs):
    if output == "dataclass":
        register_output()
    model = language_model(output=output)  # type: ignore[arg-type]
    fast, ids = compiled(model), random_ids(2, 4)
    with torch.inference_mode():
        for _ in range(10):
            found, expected = fast(ids), model(ids)
            assert type(found) is type(expected)
            leaves = torch.utils._pytree.tree_leaves((found, expected))
            half = len(leaves) // 2
            for a, b in zip(leaves[:half], leaves[half:], strict=True):
                assert (a is None) == (b is None)
                if b is not None:
                    assert_like(a, b)
            ids = extended(ids)
    assert counted.plain == 1


class Last(nn.Module):
    """Only the last position's logits, and the length."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor):
        return self.model(ids)[:, -1], ids.shape[1]


def test_last_position_only_keeps_no_outputs(counted: Runs):
    model = Last(language_model())
    fast, ids = compiled(model), random_ids(2, 4)
    with torch.inference_mode():
        for _ in range(20):
            (found, length), (expected, _) = fast(ids), model(ids)
            assert_like(found, expected)
            assert length == ids.shape[1]
            assert_like(fast(ids)[0], expected)  # the same sequence again
            ids = extended(ids)
    assert counted.plain == 2
    (session,) = door_of(model).sessions
    assert session.outputs == [None]


class Swapped(nn.Module):
    """Outputs whose memory does not begin with the batch."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor):
        logits = self.model(ids)
        return logits.mT.contiguous().mT, logits.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("batch", [1, 2])
def test_strides_are_the_models(batch: int, counted: Runs):
    model = Swapped(language_model())
    fast, ids = compiled(model), random_ids(batch, 4)
    kept = []
    with torch.inference_mode():
        for _ in range(20):
            found = fast(ids)
            kept.append((found, model(ids)))
            ids = extended(ids)
    for found, expected in kept:
        for a, b in zip(found, expected, strict=True):
            assert_like(a, b)
    assert counted.plain == 1


def door_of(model: nn.Module):
    doors = [d for p in model.parameters() for d in getattr(p, "_flashinf_doors", {}).values()]
    return doors[-1]


# -- what is returned is the caller's ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize(
    "write",
    [
        lambda out: out.zero_(),
        lambda out: out[:, -1].mul_(3),
        lambda out: out.data.mul_(3),
        lambda out: out.numpy().fill(7),
        lambda out: out[:, :2].fill_(float("nan")),
    ],
    ids=["all", "last", "data", "numpy", "first"],
)
def test_writes_to_outputs_do_not_reach_later_ones(mode: Callable, write: Callable, counted: Runs):
    model = language_model()
    fast, ids = compiled(model), random_ids(1, 4)
    with mode():
        for n in range(12):
            found = fast(ids)
            assert_like(found, model(ids))
            if n % 3 == 1:
                write(found)
            ids = extended(ids)
    assert counted.plain == 1


def test_outputs_kept_by_the_caller_never_change(counted: Runs):
    model = language_model()
    fast, ids, kept = compiled(model), random_ids(1, 4), []
    with torch.inference_mode():
        for n in range(16):
            found = fast(ids)
            kept.append((found, found.clone(), found[:, -1], found[:, -1].clone()))
            if n == 8:
                kept[3][0].zero_()  # the caller's own tensor, which shares no memory with the others
                kept.pop(3)
            ids = extended(ids, 1 + n % 2) if n % 5 != 4 else ids[:, :-1].clone()
    for found, copy, last, last_copy in kept:
        assert torch.equal(found, copy)
        assert torch.equal(last, last_copy)
    assert counted.plain == 1


def test_an_input_edited_in_place_is_another_input(counted: Runs):
    model = language_model()
    fast, ids = compiled(model), random_ids(1, 40)
    with torch.inference_mode():
        for length in range(20, 40):
            assert_like(fast(ids[:, :length]), model(ids[:, :length]))
            if length % 4 == 0:
                ids[:, length - 2] = (ids[:, length - 2] + 1) % VOCAB
            assert_like(fast(ids[:, :length]), model(ids[:, :length]))
    assert counted.plain <= 2


def test_an_output_may_enter_a_gradient_computation():
    model = language_model()
    fast, ids = compiled(model), random_ids(1, 4)
    weight = torch.ones(VOCAB, requires_grad=True)
    for _ in range(4):
        with torch.no_grad():
            found, expected = fast(ids), model(ids)
        found.mul_(weight)
        found.sum().backward()
        assert torch.allclose(weight.grad, expected.sum((0, 1)), atol=1e-4)
        weight.grad = None
        ids = extended(ids)


# -- other prompts -----------------------------------------------------------------------------------------


def test_changed_and_shrinking_prefixes(counted: Runs):
    model = language_model("fft_scale_on_filter", "short_conv1d_3")
    fast, ids = compiled(model), random_ids(2, 30)
    with torch.inference_mode():
        for length in (28, 30, 29, 12, 11, 30, 16):
            assert_like(fast(ids[:, :length]), model(ids[:, :length]))
        for changed in (29, 27, 15, 1):
            ids = ids.clone()
            ids[1, changed] = (ids[1, changed] + 1) % VOCAB
            assert_like(fast(ids), model(ids))
    assert counted.plain == 2, "the first call, and the prompt that differs almost from its start"


def test_two_models_of_one_class_interleaved(counted: Runs):
    models = [language_model(seed=seed) for seed in (1, 2)]
    fast = [compiled(model) for model in models]
    ids = random_ids(1, 4)
    with torch.inference_mode():
        for _ in range(10):
            for model, run in zip(models, fast, strict=True):
                assert_like(run(ids), model(ids))
            ids = extended(ids)
    assert counted.plain == 2


def test_alternating_prompts(counted: Runs):
    model = language_model()
    fast = compiled(model)
    prompts = [random_ids(1, 6) for _ in range(3)]
    with torch.inference_mode():
        for _ in range(10):
            for i, ids in enumerate(prompts):
                assert_like(fast(ids), model(ids))
                prompts[i] = extended(ids)
    assert counted.plain == 3


def test_beams_are_followed(counted: Runs):
    model = language_model("fft_scale_on_filter", "short_conv1d_3")
    fast, ids = compiled(model), random_ids(1, 6)
    with torch.inference_mode():
        assert_like(fast(ids), model(ids))
        ids = extended(ids.repeat(3, 1))
        for _ in range(12):
            assert_like(fast(ids), model(ids))
            ids = extended(ids[torch.randint(0, 3, (3,))])
    assert counted.plain == 2, "one row, three rows: Dynamo makes a graph for each"


def test_a_common_beginning_is_forked(counted: Runs):
    model = language_model()
    fast, header = compiled(model), random_ids(1, 30)
    with torch.inference_mode():
        fast(header)
        branches = [extended(header) for _ in range(2)]
        for _ in range(14):
            for i, ids in enumerate(branches):
                assert_like(fast(ids), model(ids))
                branches[i] = extended(ids)
    assert counted.plain == 1
    assert len(door_of(model).sessions) == 2


def test_plain_evaluation_builds_no_state(counted: Runs):
    model = language_model()
    fast = compiled(model)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (9, 17, 12, 12, 30, 31, 32, 8, 21, 22, 23):
            ids = random_ids(2, length)
            assert_like(fast(ids), model(ids))
    assert counted.plain == 11
    assert all(s.decoder is None for s in door_of(model).sessions)
    assert len(door_of(model).sessions) <= 8


def test_repeated_misses_warn_once():
    model = language_model()
    fast = compiled(model)

    def evaluate() -> None:
        for length in range(5, 20):
            ids = random_ids(2, length)
            assert_like(fast(ids), model(ids))

    with torch.inference_mode(), pytest.warns(FlashinfWarning, match="none continues") as found:
        evaluate()
    assert len(found) == 1


# -- weights -----------------------------------------------------------------------------------------------


def test_weights_changed_in_mid_sequence(counted: Runs):
    model, other = language_model(), language_model(seed=5)
    fast, ids = compiled(model), random_ids(1, 5)

    def decode(calls: int) -> None:
        nonlocal ids
        with torch.inference_mode():
            for _ in range(calls):
                assert_like(fast(ids), model(ids))
                ids = extended(ids)

    decode(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    decode(4)
    model.load_state_dict(other.state_dict())
    decode(4)
    assert counted.plain == 1
    with torch.no_grad():
        model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))
    decode(4)
    model.load_state_dict(other.state_dict(), assign=True)
    decode(4)
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.3
    decode(4)


def test_a_model_cast_in_between():
    model = language_model()
    fast, ids = compiled(model), random_ids(1, 5)
    with torch.inference_mode():
        for cast in (model.double, model.float):
            cast()
            for _ in range(4):
                assert_like(fast(ids), model(ids), 1e-4)
                ids = extended(ids)


def test_state_is_freed_with_the_model():
    model = language_model()
    fast, ids = compiled(model), random_ids(1, 5)
    with torch.inference_mode():
        for _ in range(5):
            fast(ids)
            ids = extended(ids)
    gc.collect()
    held = sessions.state_bytes()
    assert held >= door_of(model).sessions[0].nbytes > 0
    report = fi_compile.last_report()
    assert report is not None
    with torch.inference_mode():
        assert_like(report.snapshots[0].run(ids)[0], model(ids))
    del model, fast, report
    gc.collect()
    assert sessions.state_bytes() < held
    report = fi_compile.last_report()
    assert report is not None
    assert report.verdict == "proved"
    assert report.snapshots[0].graph is None


def test_doors_are_not_saved_or_copied(tmp_path):
    import copy

    model = language_model()
    fast, ids = compiled(model), random_ids(1, 5)
    with torch.inference_mode():
        fast(ids)
        fast(extended(ids))
    assert sum(len(getattr(p, "_flashinf_doors", ())) for p in model.parameters()) == 1
    torch.save(dict(model.named_parameters()), tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert not any(getattr(p, "_flashinf_doors", None) for p in loaded.values())
    assert not any(getattr(p, "_flashinf_doors", None) for p in copy.deepcopy(model).parameters())


# -- limits ------------------------------------------------------------------------------------------------


def state_bytes(model: LanguageModel) -> int:
    """Bytes of state of one sequence."""
    return fi_compile.decoder(model, random_ids(1, 5), options={"step": "eager", "block": 8}).state_bytes


def test_memory_limit_runs_the_fallback_and_says_so(counted: Runs):
    model = language_model()
    limit = state_bytes(model) // 2
    fast, ids = compiled(model, memory_limit=limit), random_ids(1, 5)
    with torch.inference_mode(), pytest.warns(FlashinfWarning, match="memory_limit") as found:
        decode(fast, model, ids, 6)
    assert len(found) == 1
    assert counted.plain == 6
    assert sum(s.nbytes for s in door_of(model).sessions) <= limit


def test_memory_limit_drops_the_session_used_longest_ago():
    gc.collect()
    model = language_model()
    limit = 5 * state_bytes(model)
    fast, prompts = compiled(model, memory_limit=limit), []
    with torch.inference_mode():
        for _ in range(4):
            ids = random_ids(1, 5)
            for _ in range(3):
                assert_like(fast(ids), model(ids))
                ids = extended(ids)
            prompts.append(ids)
        decoded = [s for s in door_of(model).sessions if s.decoder is not None]
        assert 1 <= len(decoded) < 4
        assert sum(s.nbytes for s in decoded) <= limit
        assert torch.equal(decoded[-1].inputs, prompts[-1][:, :-1])
        for ids in prompts:
            assert_like(fast(ids), model(ids))


def test_max_length(counted: Runs):
    model = language_model()
    fast, ids = compiled(model, max_length=9), random_ids(1, 5)
    with torch.inference_mode(), pytest.warns(FlashinfWarning, match="not decoded incrementally") as found:
        decode(fast, model, ids, 8)
    assert len(found) == 1


def test_two_threads():
    model = language_model()
    fast, failures = compiled(model), []
    with torch.inference_mode():  # tracing is for one thread: warm up
        ids = random_ids(1, 4)
        for _ in range(4):
            fast(ids)
            ids = extended(ids)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, VOCAB, (1, 4), generator=generator)
        try:
            with torch.inference_mode():
                for _ in range(25):
                    assert_like(fast(ids), model(ids))
                    ids = torch.cat([ids, torch.randint(0, VOCAB, (1, 1), generator=generator)], 1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -- what is left alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("trap", ["data_flip", "data_mean_over_time", "conv_filter_over_L", "data_times_L"])
@pytest.mark.parametrize("dynamic", [True, None])
def test_refused_models_run_as_given_with_one_warning(trap: str, dynamic: bool | None, counted: Runs):
    torch.manual_seed(0)
    factory, _ = TRAPS[trap]
    model = scale_weights(LanguageModel([factory(6, 128)], 6, VOCAB, l_max=128), 0).eval()
    fast, ids = compiled(model, dynamic=dynamic), random_ids(2, 5)
    with torch.inference_mode(), pytest.warns(FlashinfWarning, match="runs this model as given") as found:
        decode(fast, model, ids, 5)
    assert len(found) == 1
    report = fi_compile.last_report()
    assert report is not None
    assert report.verdict == "refused"
    assert report.refusals
    assert report.refusals[0].kind != "internal"
    assert counted.plain == 5


def test_gradients_are_the_models_and_a_growing_prefix_warns_once():
    model = language_model()
    fast, ids = compiled(model), random_ids(2, 4)
    for _ in range(3):  # training on unrelated batches says nothing
        batch = random_ids(2, 9)
        fast(batch).square().sum().backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(batch).square().sum().backward()
        for p, g in zip(model.parameters(), found, strict=True):
            assert torch.allclose(p.grad, g, rtol=1e-4, atol=1e-5)
        model.zero_grad()
    with pytest.warns(FlashinfWarning, match="inference_mode") as warned:
        decode(fast, model, ids, 5)
    assert len(warned) == 1


def test_training_mode_with_dropout():
    model = nn.Sequential(language_model(), nn.Dropout(0.5)).train()
    fast, ids = compiled(model), random_ids(2, 5)

    def seeded(run: Callable) -> Callable:
        def call(ids: Tensor) -> Tensor:
            torch.manual_seed(ids.shape[1])
            return run(ids)

        return call

    with torch.no_grad(), pytest.warns(FlashinfWarning, match="training mode") as found:
        decode(seeded(fast), seeded(model), ids, 3)
    assert len(found) == 1


class Broken(nn.Module):
    """A graph break between two halves."""

    def __init__(self):
        super().__init__()
        self.first, self.second = language_model(), nn.Linear(VOCAB, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.first(ids)
        torch._dynamo.graph_break()
        return self.second(hidden).softmax(-1)


def test_graph_breaks_leave_the_values_right():
    model = Broken().eval()
    fast, ids = compiled(model), random_ids(2, 4)
    with torch.inference_mode():
        for _ in range(8):
            assert_like(fast(ids), model(ids))
            ids = extended(ids)


class BrokenInside(nn.Module):
    """A graph break inside a convolution: neither half is causal."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 4)

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        spectrum = torch.fft.rfft(self.embed(ids), n=2 * n, dim=1)
        torch._dynamo.graph_break()
        return torch.fft.irfft(spectrum * spectrum, n=2 * n, dim=1)[:, :n]


def test_a_graph_break_is_named_with_what_it_leads_to():
    fast, ids = compiled(BrokenInside().eval()), random_ids(2, 4)
    with torch.inference_mode(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(4):
            fast(ids)
            ids = extended(ids)
    (text,) = [str(w.message) for w in told if "graph_break: " in str(w.message)]
    assert re.search(r"graph_break: Dynamo breaks the forward .*\n  source: .*test_backend.py:\d+", text)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = language_model()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids) * mask.unsqueeze(-1)


def test_other_inputs_that_cannot_be_described_are_named(counted: Runs):
    model = Masked().eval()
    fast, ids = compiled(model), random_ids(2, 4)

    def masked(run: Callable) -> Callable:
        return lambda ids: run(ids, torch.sin(ids))

    with torch.inference_mode(), pytest.warns(FlashinfWarning, match="mask is neither one value") as found:
        decode(masked(fast), masked(model), ids, 3)
    assert len(found) == 1
    assert counted.plain == 3


def test_autocast_is_refused():
    model = language_model()
    fast, ids = compiled(model), random_ids(1, 4)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(FlashinfWarning, match="autocast"),
    ):
        decode(fast, model, ids, 3)


def test_ids_out_of_range_raise_what_the_model_raises():
    model = language_model()
    fast, ids = compiled(model), random_ids(1, 4)
    with torch.inference_mode():
        fast(ids)
        fast(extended(ids))
        wrong = torch.cat([ids, torch.full((1, 2), VOCAB)], 1)
        with pytest.raises(IndexError, match="out of range"):
            fast(wrong)
        assert_like(fast(ids), model(ids))


def test_unknown_options_raise():
    fast = torch.compile(language_model(), backend="flashinf", options={"blok": 3})
    with torch.inference_mode(), pytest.raises(fi_compile.InputError, match="block"):
        fast(random_ids(1, 4))


def test_an_error_of_ours_becomes_a_refusal(monkeypatch: pytest.MonkeyPatch):
    model = language_model()
    fast, ids = compiled(model), random_ids(1, 4)

    def fail(*_):
        raise RuntimeError("a defect")

    with torch.inference_mode():
        for _ in range(3):
            fast(ids)
            ids = extended(ids)
        monkeypatch.setattr(fi_compile.Decoder, "_extend_unwatched", fail)
        with pytest.warns(FlashinfWarning, match="a defect"):
            assert_like(fast(ids), model(ids))
    report = fi_compile.last_report()
    assert report is not None
    assert [r.kind for r in report.refusals] == ["internal"]


def test_an_interrupt_drops_the_session(monkeypatch: pytest.MonkeyPatch):
    model = language_model()
    fast, ids = compiled(model), random_ids(1, 4)

    def interrupted(*_):
        raise KeyboardInterrupt

    with torch.inference_mode():
        for _ in range(3):
            fast(ids)
            ids = extended(ids)
        with monkeypatch.context() as patch:
            patch.setattr(Lane, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fast(ids)
        assert door_of(model).sessions == []
        for _ in range(4):
            assert_like(fast(ids), model(ids))
            ids = extended(ids)


def test_a_fresh_interpreter_finds_the_backend():
    code = """
import torch
from torch import nn
class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
    def forward(self, ids):
        return self.table(ids).cumsum(1)
model = Mean()
fast = torch.compile(model, backend="flashinf", dynamic=True, options={"step": "eager", "fallback": "eager"})
ids = torch.tensor([[1, 2]])
with torch.inference_mode():
    for token in (3, 4, 5, 6):
        assert torch.allclose(fast(ids), model(ids), atol=1e-6)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
import fi_compile
print(fi_compile.last_report().verdict)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "proved"
