"""Layers found in a step graph, compiled once each, called once a layer, and kept on disk."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fi_compile
from decoding import decoded, decoder, features, gap, ids, lanes, language_model
from fi_compile import lower, native
from fi_compile.errors import FlashinfWarning
from fi_compile.layers import Layers, split_layers
from fi_compile.lower import CompiledStep

MOST = 64
LAYER = "fft_scale_on_filter"


@pytest.fixture(autouse=True)
def _quiet(without_gradients):
    pass


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory):
    """One cache for the tests that only need something compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHINF_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is handed to the compiler during a test."""
    seen: list[str] = []
    compile_part = native._compile

    def counting(part, example, folder):
        seen.append(part.code)
        return compile_part(part, example, folder)

    monkeypatch.setattr(native, "_compile", counting)
    return seen


def layers_of(*mixers: str, **style) -> Layers:
    """How the step of a model of these mixers is divided."""
    dec = decoder(language_model(*mixers, width=4, l_max=MOST, **style), ids(1, 9), capacity=32, block=8)
    return split_layers(dec.engine.step_graph().graph_module.graph)


def calls(layers: Layers) -> list[int]:
    return sorted(Counter(call.part for call in layers.calls).values())


# What repeats


@pytest.mark.parametrize("mixer", [LAYER, "series_gated", "short_conv1d_4", "attention_tril_mask"])
def test_one_part_whatever_the_depth(mixer):
    layers = layers_of(*4 * [mixer])
    assert len(layers.parts) <= 3
    assert calls(layers)[-1] == 4


def test_layers_of_two_kinds_in_turn_repeat_together():
    layers = layers_of(*3 * (LAYER, "short_conv1d_4"))
    assert len(layers.parts) <= 3
    assert calls(layers)[-1] == 3


@pytest.mark.slow
def test_two_stacks_of_different_layers_are_two_parts():
    layers = layers_of(*3 * [LAYER], *3 * ["attention_tril_mask"])
    assert calls(layers)[-2:] in ([3, 3], [2, 3])


def test_a_model_of_one_layer_is_one_part():
    assert len(layers_of(LAYER).parts) == 1


def block(x: Tensor, w: Tensor, state: Tensor, t: Tensor) -> Tensor:
    """Enough operators for a part of their own; reads a row of its state, then writes it."""
    past = state.index_select(0, t)[0]
    y = torch.tanh(x * w + past).exp().sin().cos().sigmoid().relu() + x.square().sum(-1, keepdim=True).sqrt()
    y = y / (1 + y.abs().amax(-1, keepdim=True))
    state.index_copy_(0, t, y.unsqueeze(0))
    return x + y


def traced(function, inputs: dict[str, Tensor]):
    graph = make_fx(lambda *a: function(**dict(zip(inputs, a, strict=True))), tracing_mode="fake")(
        *inputs.values()
    )
    return graph, split_layers(graph.graph)


def stack_inputs(depth: int, width: int = 5) -> dict[str, Tensor]:
    given = {"x": torch.randn(1, width), "t": torch.zeros(1, dtype=torch.int64)}
    for i in range(depth):
        given |= {f"w{i}": torch.randn(width), f"s{i}": torch.randn(4, 1, width)}
    return given


def assert_same_function(graph, layers: Layers, inputs: dict[str, Tensor]) -> None:
    """Outputs and every tensor written agree, over some steps."""
    one, two = ([v.clone() for v in inputs.values()] for _ in range(2))
    run = layers.bind([lambda args, p=p: p(*args) for p in layers.parts], two)
    for _ in range(3):
        for a, b in zip(graph(*one), run(), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_a_first_layer_that_others_read_stays_apart():
    def step(x, t, **given):
        first = x = block(x, given["w0"], given["s0"], t)
        for i in range(1, 5):
            x = block(x, given[f"w{i}"], given[f"s{i}"], t) + 0.5 * first
        t.add_(1)
        return [x.clone()]

    inputs = stack_inputs(5)
    graph, layers = traced(step, inputs)
    assert calls(layers)[-1] == 4
    assert_same_function(graph, layers, inputs)


def test_every_layer_may_be_returned():
    def step(x, t, **given):
        seen = [x := block(x, given[f"w{i}"], given[f"s{i}"], t) for i in range(4)]
        return [v.clone() for v in seen]

    inputs = stack_inputs(4)
    graph, layers = traced(step, inputs)
    assert calls(layers)[-1] == 4
    assert_same_function(graph, layers, inputs)


def test_a_weight_that_layers_share_in_two_roles():
    def step(x, t, **given):
        for i in range(4):
            x = block(x, given[f"w{i // 2}"], given[f"s{i}"], t) * given[f"w{i}"].sigmoid()
        return [x.clone()]

    inputs = stack_inputs(4)
    graph, layers = traced(step, inputs)
    assert calls(layers)[-1] == 4
    assert_same_function(graph, layers, inputs)


def test_state_that_one_layer_reads_twice_is_not_taken_for_two():
    """A compiled body knows nothing of two inputs that are one tensor which it writes."""

    def step(x, t, **given):
        for i in range(4):
            x = block(x, given[f"w{i}"], given[f"s{i}"], t)
            x = x + given[f"s{i // 2}"].sum(0)  # in layer 0 its own state, in layer 2 that of layer 1
        return [x.clone()]

    inputs = stack_inputs(4)
    graph, layers = traced(step, inputs)
    for call in layers.calls:
        assert len(set(call.inputs)) == len(call.inputs)
    assert_same_function(graph, layers, inputs)


def test_a_view_of_state_is_not_handed_on():
    def step(x, t, **given):
        views = [given[f"s{i}"][0] for i in range(4)]
        for i in range(4):
            x = block(x, given[f"w{i}"], given[f"s{i}"], t) + views[i]  # sees what the layer wrote
        return [x.clone()]

    inputs = stack_inputs(4)
    graph, layers = traced(step, inputs)
    assert len(layers.parts) == 1
    assert_same_function(graph, layers, inputs)


def test_layers_of_other_widths_or_constants_are_other_parts():
    def step(x, t, **given):
        for i in range(4):
            x = block(x, given[f"w{i}"], given[f"s{i}"], t) * (1.5 if i % 2 else 2.5)
        return [x.clone()]

    inputs = stack_inputs(4)
    graph, layers = traced(step, inputs)
    assert calls(layers)[-1] == 2
    assert_same_function(graph, layers, inputs)


# What is compiled


def test_a_compiled_generation_is_exact_and_compiles_once(shared_cache, compilations):
    model = language_model(*4 * [LAYER], width=4, l_max=MOST)
    dec = decoder(model, ids(1, 9), max_length=MOST, block=8, step="aot")
    sequence = ids(1, 50)
    expected = model(sequence)
    assert gap(decoded(dec, sequence, 7), expected[:, 6:]) < 1e-10
    before = len(compilations)
    assert before <= 3  # what comes before the layers, a layer, what comes after
    dec.rewind(20)
    other = dec.fork()
    for t in range(20, 30):
        assert gap(dec.step(sequence[:, t]), expected[:, t]) < 1e-10
    assert gap(other.extend(sequence[:, 20:40]), expected[:, 20:40]) < 1e-10
    assert len(compilations) == before == len(dict.fromkeys(compilations))


def test_other_weights_compile_nothing(shared_cache, compilations):
    for seed in (0, 1):
        model = language_model(*4 * [LAYER], width=4, l_max=MOST, seed=seed)
        dec = decoder(model, ids(1, 9), max_length=MOST, block=8, step="aot")
        sequence = ids(1, 20)
        assert gap(decoded(dec, sequence, 7), model(sequence)[:, 6:]) < 1e-10
        if seed == 0:
            compilations.clear()
    assert not compilations


@pytest.mark.parametrize("how", ["aot", "inductor"])
def test_states_are_those_of_the_graph_over_many_steps(shared_cache, how):
    mixers = (LAYER, "short_conv1d_4", "cumsum", "attention_tril_mask")
    dec = decoder(language_model(*mixers, width=4, l_max=MOST), ids(2, 9), max_length=MOST, block=8)
    dec.prefill(ids(2, 9))
    one, two = lanes(dec)[0], lanes(dec.fork())[0].moved(lanes(dec)[0].derived)
    eager, compiled = (
        CompiledStep(lane.derived.step, lane.tensors, h, 8).on(lane.tensors)
        for lane, h in ((one, "eager"), (two, how))
    )
    for t in range(40):
        row = ids(2, 1, seed=t)
        for a, b in zip(one.step(row, eager), two.step(row, compiled), strict=True):
            assert gap(b, a) < 1e-12
        for name, tensor in one.tensors.items():
            assert gap(two.tensors[name].double(), tensor.double()) < 1e-12, name


def test_a_part_that_forgets_its_state_runs_uncompiled(monkeypatch):
    def forgetful(part, example):
        return lambda args: part(*[a.clone() for a in args])

    monkeypatch.setattr(lower, "compile_native", forgetful)
    model, sequence = language_model(*3 * [LAYER], width=4, l_max=MOST), ids(1, 30)
    dec = decoder(model, ids(1, 9), max_length=MOST, block=8, step="aot")
    dec.prefill(sequence[:, :7])
    with pytest.warns(FlashinfWarning, match="disagrees with its own graph"):
        dec.step(sequence[:, 7])
    assert gap(dec.extend(sequence[:, 8:]), model(sequence)[:, 8:]) < 1e-10


class Fading(nn.Module):
    """A filter that is a sum of exponentials: a recurrence, whose state is float64 beside float32 rows."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(48, 48)  # in float32, which a compiler sums in another order
        self.rate, self.scale = nn.Parameter(torch.rand(48, 4)), nn.Parameter(torch.randn(48, 4))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        k = (self.scale * torch.exp(-self.rate * torch.arange(n)[:, None, None])).sum(-1)
        y = self.inner(x.sin())
        k = torch.fft.rfft(k, 2 * n, dim=0)
        return x + torch.fft.irfft(torch.fft.rfft(y, 2 * n, dim=1) * k, 2 * n, dim=1)[:, :n]


def test_wide_state_of_narrow_rows_runs_compiled():
    model, x = Fading(), features(1, 30, 48).float()
    dec = decoder(model, x[:, :9], max_length=MOST, step="aot")
    assert gap(decoded(dec, x, 7), model(x)[:, 6:]) < 1e-5
    (step,) = dec.engine._steps.values()
    assert {t.dtype for t in dec._lanes[0][0].tensors.values()} >= {torch.float32, torch.float64}
    assert all(isinstance(run, native.Native) for run in step.runs)


def test_without_a_compiler_the_step_runs_uncompiled(monkeypatch):
    def missing(*_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(lower, "compile_native", missing)
    monkeypatch.setattr(lower, "_inductor", missing)
    model, sequence = language_model(LAYER, width=4, l_max=MOST), ids(1, 20)
    dec = decoder(model, ids(1, 9), max_length=MOST, block=8, step="auto")
    dec.prefill(sequence[:, :7])
    with pytest.warns(FlashinfWarning, match="no C\\+\\+ compiler"):
        dec.step(sequence[:, 7])
    assert gap(dec.extend(sequence[:, 8:]), model(sequence)[:, 8:]) < 1e-10


# What is kept


class Small(nn.Module):
    """One long filter and nothing else: little to compile."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(MOST, 3) / 4)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        k = torch.fft.rfft(self.filter[:n], 2 * n, dim=0)
        return x + torch.fft.irfft(torch.fft.rfft(x, 2 * n, dim=1) * k, 2 * n, dim=1)[:, :n]


def small_is_exact() -> None:
    torch.manual_seed(0)
    model, x = Small().double(), features(1, 20, 3)
    dec = fi_compile.decoder(model, x[:, :9], max_length=32, options={"step": "aot", "block": 4})
    assert gap(decoded(dec, x, 7), model(x)[:, 6:]) < 1e-10


def test_the_cache(tmp_path: Path, monkeypatch, compilations):
    """Found again; damaged in each way, replaced with a warning."""
    monkeypatch.setenv("FLASHINF_CACHE_DIR", str(tmp_path))
    small_is_exact()
    small_is_exact()
    assert len(compilations) == 1
    (library,), (note,) = tmp_path.rglob("*.so"), tmp_path.rglob("*.json")

    good = library.read_bytes()
    damages = {
        "truncated": lambda: library.write_bytes(good[: len(good) // 2]),
        "another": lambda: library.write_bytes(good[:-1] + b"?"),
        "gone": library.unlink,
        "no json": lambda: note.write_text("{"),
        "no digest": lambda: note.write_text(json.dumps({"torch": "2"})),
    }
    # Written anew from what the compiler made before: what counts is that a damaged file is not loaded.
    kept = tmp_path / "kept"
    kept.write_bytes(good)
    monkeypatch.setattr(native, "_compile", lambda *_: compilations.append("") or kept)
    for count, damage in enumerate(damages.values(), 2):
        library.unlink()  # in use: a damaged file is another file
        library.write_bytes(good)
        damage()
        with pytest.warns(FlashinfWarning, match="compiled anew"):
            small_is_exact()
        assert len(compilations) == count
    small_is_exact()
    assert len(compilations) == count


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch, compilations):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FLASHINF_CACHE_DIR", str(blocked))
    small_is_exact()
    assert len(compilations) == 1
    assert blocked.read_text() == ""


def test_other_strides_options_and_threads_are_other_libraries(monkeypatch):
    def key(weight: Tensor) -> str:
        graph = make_fx(lambda x, w: [(x * w).exp()], tracing_mode="fake")(torch.zeros(3, 3), weight)
        return native._key(split_layers(graph.graph).parts[0])

    found = {key(torch.zeros(3, 3)), key(torch.zeros(3, 3).t()), key(torch.zeros(3, 3).double())}
    with monkeypatch.context() as patch:
        patch.setitem(native.INDUCTOR, "size_asserts", True)
        found.add(key(torch.zeros(3, 3)))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        found.add(key(torch.zeros(3, 3)))
    assert len(found) == 5
    assert key(torch.ones(3, 3)) in found
