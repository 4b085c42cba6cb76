"""Every Python block of the README and of docs/ runs, in order, each document in a namespace of its own."""

import ast
import linecache
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fi_compile

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language: the line each begins at, and its text."""
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return [(text[: m.start(1)].count("\n"), m.group(1)) for m in found]


def run(path: Path, text: str) -> dict:
    """Execute the blocks of a document; tracebacks and reports show the document's own lines."""
    module = ModuleType(f"document_{path.stem}")
    sys.modules[module.__name__] = module  # where torch.compile looks a function's globals up
    for line, code in blocks(text, "python"):
        padded = "\n" * line + code
        linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
        exec(compile(padded, str(path), "exec"), vars(module))
    return vars(module)


@pytest.fixture(autouse=True)
def _same_every_time():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def test_readme_runs_and_is_true():
    path = ROOT / "README.md"
    found = run(path, path.read_text())
    model, decoder, ids = found["model"], found["decoder"], found["ids"]
    with torch.inference_mode():
        logits = model(ids[:, :300])
        torch.testing.assert_close(found["logits"], logits[:, -1], rtol=1e-4, atol=1e-5)
        assert torch.equal(ids[:, 300:], model(ids[:, :-1])[:, -5:].argmax(-1))
    assert [m.lowering for m in decoder.report.mixers] == ["tiles"]


@pytest.mark.parametrize("path", DOCUMENTS[1:], ids=lambda p: p.name)
def test_document_runs(path: Path):
    run(path, path.read_text())


def test_usage_names_every_public_name_and_option():
    text = (ROOT / "docs" / "usage.md").read_text()
    for name in fi_compile.__all__:
        assert f"`{name}" in text or f"fi_compile.{name}" in text, name
    for option in fi_compile.Options.__dataclass_fields__:
        assert f"`{option}`" in text, option
    for method in vars(fi_compile.Decoder):
        assert method.startswith("_") or f"`{method}" in text or f".{method}" in text, method


def test_usage_states_the_defaults():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", (ROOT / "docs" / "usage.md").read_text(), re.M)
    stated = {name: eval(value) for name, value in rows if name in fi_compile.Options.__dataclass_fields__}
    defaults = {n: f.default for n, f in fi_compile.Options.__dataclass_fields__.items()}
    assert stated == defaults


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path):
    for target, _ in LINK.findall(path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_architecture_places_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for folder in ("fi_compile", "fi_compile/mixers", "passes", "kernels"):
        for file in (ROOT / folder).glob("*.py"):
            assert file.name == "__init__.py" or f"`{file.name}`" in text, f"{folder}/{file.name}"


def test_ci_runs_what_the_readme_says():
    text, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    install, job, tests = (code.strip() for _, code in blocks(text, "sh"))
    assert shlex.split(install.rpartition("&&")[2]) == ["pip", "install", "-e", ".[test]"]
    assert 'pip install --quiet -e ".[test]"' in ci
    assert tests in ci
    script = shlex.split(job)[1]
    assert (ROOT / script).exists()


def kinds_in_code() -> set[str]:
    """First arguments of every Refusal and Deny in the library."""
    found = set()
    for folder in ("fi_compile", "passes", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("Refusal", "Deny"):
                    kind = node.args[0]
                    found |= {kind.value} if isinstance(kind, ast.Constant) else set()
    return found


def test_analysis_explains_every_kind_of_refusal():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "analysis.md").read_text(), re.M)
    assert sorted(rows) == sorted(kinds_in_code())
