"""Hugging Face models: generate() through a compiled forward, and decoders of models with many arguments."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fi_compile
from fi_compile import backend
from fi_compile.doors import FlashinfWarning
from transparent import OPTIONS

transformers = pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[1] / "examples"))
hf_generate = __import__("hf_generate")

VOCAB, PROMPT, NEW = 13, 9, 14


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo):
    pass


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each run of a graph as given computed; all others came from sessions."""
    found: list[int] = []
    original = backend._Plain.__call__

    def call(this, *args):
        found.append(next(a.shape[1] for a in args if isinstance(a, Tensor) and a.dtype == torch.int64))
        return original(this, *args)

    monkeypatch.setattr(backend._Plain, "__call__", call)
    return found


def long_conv() -> Any:
    config = hf_generate.LongConvConfig(vocab_size=VOCAB, hidden_size=6, longest=128)
    return hf_generate.LongConvForCausalLM(config).double().eval()


def attention_model(name: str) -> Any:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    if name == "GPT2LMHeadModel":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=64, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=0
        )
    elif name == "GPTNeoXForCausalLM":
        config = transformers.GPTNeoXConfig(**sizes)
    elif name == "MistralForCausalLM":
        config = transformers.MistralConfig(**sizes, num_key_value_heads=1, sliding_window=7)
    else:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=1)
    config.use_cache = False
    return getattr(transformers, name)(config).double().eval()


def prompt_of(batch: int = 2) -> Tensor:
    return torch.randint(2, VOCAB, (batch, PROMPT))


def generated(model: Any, prompt: Tensor, **how: Any) -> Tensor:
    torch.manual_seed(3)
    how.setdefault("attention_mask", torch.ones_like(prompt))
    return model.generate(
        prompt, max_new_tokens=NEW, use_cache=False, pad_token_id=0, eos_token_id=None, **how
    )


def compile_forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="flashinf", dynamic=True, options=OPTIONS)


def compile_in_place(model: Any) -> None:
    model.compile(backend="flashinf", dynamic=True, options=OPTIONS)


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "one row": {},
}


@pytest.mark.parametrize("compile_model", [compile_forward, compile_in_place])
@pytest.mark.parametrize("way", WAYS)
def test_generate_computes_new_positions_only(compile_model: Callable, way: str, lengths: list[int]):
    model, prompt = long_conv(), prompt_of(1 if way == "one row" else 2)
    expected = (
        generated(model, prompt, do_sample=False)
        if way == "greedy"
        else generated(model, prompt, **WAYS[way])
    )
    compile_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlashinfWarning)
        assert torch.equal(generated(model, prompt, **WAYS[way]), expected)
    assert lengths == [PROMPT]


def test_a_mask_of_ones_that_generate_passes_on(lengths: list[int], monkeypatch: pytest.MonkeyPatch):
    model, prompt = long_conv(), prompt_of()
    expected = generated(model, prompt)

    def inputs(input_ids: Tensor, attention_mask: Any = None, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    monkeypatch.setattr(model, "prepare_inputs_for_generation", inputs)
    compile_forward(model)
    assert torch.equal(generated(model, prompt), expected)
    assert lengths == [PROMPT]


def test_a_padded_batch_runs_as_given_and_warns_once():
    model, prompt = long_conv(), prompt_of()
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    expected = generated(model, prompt, attention_mask=mask)
    compile_forward(model)
    with pytest.warns(FlashinfWarning, match=r"attention_mask leaves out positions \(row 0 of 2\)") as found:
        assert torch.equal(generated(model, prompt, attention_mask=mask), expected)
    assert len([w for w in found if issubclass(w.category, FlashinfWarning)]) == 1


def test_arguments_of_a_forward(lengths: list[int]):
    model = long_conv()
    fast = torch.compile(model, backend="flashinf", dynamic=True, options=OPTIONS)
    arguments: list[dict[str, Any]] = [
        {"labels": None, "use_cache": False, "return_dict": True},
        {"output_hidden_states": True},
        {"logits_to_keep": 1},
    ]
    for given in arguments:
        ids, lengths[:] = prompt_of(), []
        with torch.inference_mode():
            for _ in range(6):
                found = fast(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
                expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
                assert type(found) is type(expected)
                assert found.keys() == expected.keys()
                torch.testing.assert_close(found.to_tuple(), expected.to_tuple(), rtol=1e-10, atol=1e-10)
                ids = torch.cat([ids, found.logits[:, -1:].argmax(-1)], 1)
        assert len(lengths) <= 2, given


def test_several_of_the_last_positions(lengths: list[int]):
    model, ids = long_conv(), prompt_of()
    fast = torch.compile(model, backend="flashinf", dynamic=True, options=OPTIONS)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", FlashinfWarning)
        for _ in range(5):
            found, expected = (call(ids, logits_to_keep=3).logits for call in (fast, model))
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            ids = torch.cat([ids, found[:, -1:].argmax(-1)], 1)
    assert len(lengths) <= 2


def test_a_loss_is_the_models():
    model = long_conv()
    fast = torch.compile(model, backend="flashinf", dynamic=True, options=OPTIONS)
    ids = prompt_of()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FlashinfWarning)
        for _ in range(4):
            found, expected = fast(ids, labels=ids.clone()), model(ids, labels=ids.clone())
            torch.testing.assert_close(found.to_tuple(), expected.to_tuple(), rtol=1e-10, atol=1e-10)
            ids = torch.cat([ids, found.logits[:, -1:].argmax(-1)], 1)


@pytest.mark.parametrize(
    "name",
    [
        "GPT2LMHeadModel",
        pytest.param("GPTNeoXForCausalLM", marks=pytest.mark.slow),
        pytest.param("MistralForCausalLM", marks=pytest.mark.slow),
        pytest.param("LlamaForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_attention_models_of_the_library(name: str, lengths: list[int]):
    model, prompt = attention_model(name), prompt_of()
    expected = [generated(model, prompt, **WAYS[way]) for way in ("greedy", "beams")]
    compile_forward(model)
    for way, ids in zip(("greedy", "beams"), expected, strict=True):
        lengths.clear()
        assert torch.equal(generated(model, prompt, **WAYS[way]), ids)
        assert len(lengths) <= 1


def test_a_decoder_gives_the_models_own_output_type():
    model, ids = long_conv(), prompt_of()
    decoder = fi_compile.decoder(model, ids, max_length=64, options={"step": "eager"})
    with torch.inference_mode():
        expected = model(ids)
        prefilled = decoder.prefill(ids[:, :-2])
        stepped, extended = decoder.step(ids[:, -2]), decoder.extend(ids[:, -1:])
    for found in (prefilled, stepped, extended):
        assert type(found) is type(expected)
        assert list(found.keys()) == ["logits"]
    torch.testing.assert_close(stepped.logits, expected.logits[:, -2])
    torch.testing.assert_close(extended.logits, expected.logits[:, -1:])
    assert fi_compile.explain(model, ids, options={"step": "eager"}).verdict == "proved"


@pytest.mark.slow
def test_the_example_runs():
    assert hf_generate.main(["--new-tokens", "12", "--prompt", "20", "--step", "eager"]) == 0
