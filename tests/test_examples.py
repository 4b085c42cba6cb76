"""The examples run, and the checks inside them can fail."""

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fi_compile

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import check  # noqa: E402
import custom_architecture  # noqa: E402
import generate_text  # noqa: E402
import hyena  # noqa: E402
import refused_model  # noqa: E402
import train_hyena  # noqa: E402

needs_compiler = pytest.mark.skipif(
    not hasattr(fi_compile, "explain") or find_spec("fi_compile.backend") is None,
    reason="explain() and the backend are not there yet",
)
TINY = hyena.HyenaConfig(width=16, layers=2, l_max=64, filter_width=8, filter_bands=4)


@pytest.fixture(scope="module")
def trained() -> hyena.HyenaLM:
    return hyena.load()


def direct_conv(u: Tensor, k: Tensor, skip: Tensor) -> Tensor:
    y = u * skip[:, None]
    for t in range(u.shape[-1]):
        for j in range(t + 1):
            y[..., t] += u[..., j] * k[:, t - j]
    return y


def test_fft_conv_is_the_causal_convolution():
    torch.manual_seed(0)
    u, k, skip = torch.randn(2, 3, 9), torch.randn(3, 9), torch.randn(3)
    torch.testing.assert_close(hyena.fft_conv(u, k, skip), direct_conv(u.clone(), k, skip))


def test_hyena_is_causal_at_every_length():
    torch.manual_seed(0)
    model = hyena.HyenaLM(TINY)
    ids = torch.randint(0, 256, (2, 40))
    with torch.inference_mode():
        whole = model(ids)
        for length in (1, 2, 17, 39):
            torch.testing.assert_close(model(ids[:, :length]), whole[:, :length])


def test_saving_keeps_model_and_configuration(tmp_path: Path):
    torch.manual_seed(0)
    model = hyena.HyenaLM(TINY).half().float()  # what float16 can hold
    hyena.save(model, tmp_path / "model.safetensors")
    again = hyena.load(tmp_path / "model.safetensors")
    assert again.cfg == TINY
    ids = torch.randint(0, 256, (1, 30))
    # The position tables are not saved but built: in full precision.
    fresh = hyena.HyenaLM(TINY)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(ids), fresh(ids), rtol=0, atol=0)


def test_text_survives_encoding():
    text = "1:1 In the beginning, ὁ λόγος\n"
    assert hyena.decode(hyena.encode(text)[0]) == text


class Bytes(torch.nn.Module):
    """The same logits [256] at every position."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits.expand(*ids.shape, 256)


def test_bits_per_byte():
    text = torch.tensor([65] * 100)
    assert train_hyena.bits_per_byte(Bytes(torch.zeros(256)), text, 16) == pytest.approx(8)
    quarter = torch.full((256,), -torch.inf)
    quarter[65:69] = 0
    assert train_hyena.bits_per_byte(Bytes(quarter), text, 99) == pytest.approx(2)
    with pytest.raises(ValueError, match="no window"):
        train_hyena.bits_per_byte(Bytes(quarter), text, 100)


class Successor(torch.nn.Module):
    """Certain that byte i + 1 follows byte i."""

    def forward(self, ids: Tensor) -> Tensor:
        return 100.0 * torch.nn.functional.one_hot((ids + 1) % 256, 256)


def test_bits_per_byte_compares_with_the_next_byte():
    text = torch.arange(1000) % 256
    assert train_hyena.bits_per_byte(Successor(), text, 32) == pytest.approx(0, abs=1e-6)


def test_training_and_held_out_text_do_not_overlap():
    text, held_out = train_hyena.corpus()
    assert hyena.decode(torch.cat([text, held_out])) == train_hyena.DATA.read_text()
    assert len(held_out) == pytest.approx(0.05 * (len(text) + len(held_out)), rel=0.01)


def test_training_learns_a_simple_text():
    torch.manual_seed(0)
    model = hyena.HyenaLM(TINY)
    text = hyena.encode("abcd" * 50)[0]
    before = train_hyena.bits_per_byte(model, text, 32)
    after = train_hyena.train(model, text, steps=60, batch=4, context=32, lr=1e-2)
    assert after < 0.5 < 3 < before


def test_training_script_writes_a_model(tmp_path: Path, monkeypatch, capsys):
    text, held_out = train_hyena.corpus()
    monkeypatch.setattr(train_hyena, "corpus", lambda: (text[:2000], held_out[:500]))
    monkeypatch.setattr(train_hyena, "HyenaConfig", lambda: TINY)
    out = tmp_path / "weights" / "model.safetensors"
    assert train_hyena.main(["--steps", "2", "--context", "16", "--out", str(out)]) == 0
    assert hyena.load(out).cfg == TINY
    assert "windows of 64:" in capsys.readouterr().out


def test_the_trained_model_is_small_and_knows_its_text(trained: hyena.HyenaLM):
    files = [p for folder in ("data", "weights") for p in (EXAMPLES / folder).iterdir()]
    assert sum(p.stat().st_size for p in files) < 5_000_000
    _, held_out = train_hyena.corpus()
    bits = train_hyena.bits_per_byte(trained, held_out, 2048, limit=8192)
    assert bits < 1.9
    # The long filters matter: the model without them is much worse.
    crippled = hyena.load()
    for block in crippled.blocks:
        torch.nn.init.zeros_(block.mixer.filter.gain)  # type: ignore[union-attr]
    assert train_hyena.bits_per_byte(crippled, held_out, 2048, limit=8192) > bits + 0.3


def written(model: hyena.HyenaLM, **how) -> generate_text.Run:
    with torch.inference_mode():
        return generate_text.prefix_loop(model, hyena.encode("4:1 And "), 30, **how)


HOW = {"temperature": 0.7, "top_k": 20, "seed": 3}


def test_generated_text_passes_its_check(trained: hyena.HyenaLM):
    run = written(trained, **HOW)
    assert run.ids.shape == (1, 38)
    assert run.logits.shape == (30, 256)
    assert "30 of 30" in generate_text.verify(trained, run, **HOW)


def test_the_check_finds_a_wrong_logit_a_wrong_byte_and_a_wrong_seed(trained: hyena.HyenaLM):
    run = written(trained, **HOW)
    logits = run.logits.clone()
    logits[11, 5] += 1e-3
    with pytest.raises(AssertionError, match="rounding"):
        generate_text.verify(trained, run._replace(logits=logits), **HOW)
    ids = run.ids.clone()
    ids[0, -1] += 1  # the last byte is no input: only drawing it again can tell
    with pytest.raises(AssertionError, match="29 of 30"):
        generate_text.verify(trained, run._replace(ids=ids), **HOW)
    with pytest.raises(AssertionError, match="bytes are"):
        generate_text.verify(trained, run, **(HOW | {"seed": 4}))


def test_error_ratio_is_in_units_of_rounding():
    torch.manual_seed(0)
    model = custom_architecture.WaveLM().eval()
    ids = torch.randint(0, 61, (2, 50))
    with torch.inference_mode():
        plain = model(ids)
    assert check.error_ratio(model, ids, plain[:, 7:]) <= 1
    assert check.error_ratio(model, ids, plain[:, 7:] + 1e-3) > 100
    with pytest.raises(AssertionError, match="rounding"):
        check.assert_same(model, ids, plain[:, :-7])
    with pytest.raises(AssertionError, match="rounding"):
        check.assert_same(model, ids, torch.full_like(plain, math.nan))


def test_the_custom_architecture_depends_on_its_filters():
    torch.manual_seed(0)
    model = custom_architecture.WaveLM().eval()
    ids = torch.randint(0, 61, (1, 80))
    with torch.inference_mode():
        whole = model(ids)
        torch.testing.assert_close(model(ids[:, :33]), whole[:, :33])
        for mixer in model.mixers:
            mixer.amplitude[:, 0] = 0  # type: ignore[index]
        assert (model(ids) - whole).abs().max() > 0.1


@pytest.mark.parametrize("name", ["Wraps", "Normalised"])
def test_refused_models_are_wrong_and_mended_ones_right(name: str):
    torch.manual_seed(0)
    ids = torch.randint(0, 31, (2, 120))
    wrong = refused_model.Model(getattr(refused_model, name)).eval()
    right = refused_model.Model(getattr(refused_model, name + "Mended")).eval()
    assert refused_model.disagreement(wrong, ids) > 1e-3
    assert refused_model.disagreement(right, ids) < 1e-5


@needs_compiler
@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_generate_text(temperature: str, capsys):
    arguments = ["--tokens", "40", "--prompt", "1:1 And ", "--temperature", temperature]
    assert generate_text.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("40 of 40 bytes reproduced") == 2
    assert "1:1 And " in out


@needs_compiler
def test_custom_architecture(capsys):
    assert custom_architecture.main(["--tokens", "60", "--prompt", "9"]) == 0
    assert "60 steps after a prompt of 9" in capsys.readouterr().out


@needs_compiler
def test_refused_model(capsys):
    assert refused_model.main(["--length", "60"]) == 0
    out = capsys.readouterr().out
    assert out.count("raises Unsupported") == out.count("  decoded; error") == 2


def test_text_that_does_not_fit_is_refused(capsys):
    with pytest.raises(SystemExit):
        generate_text.main(["--tokens", "16384"])
    assert "16384 in all" in capsys.readouterr().err
