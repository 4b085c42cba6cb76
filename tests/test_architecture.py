"""The rules of the house that a reader relies on: what may name what, and how long a file may be."""

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PASSES = sorted((ROOT / "passes").glob("*.py"))
LIBRARY = sorted(p for d in ("fi_compile", "passes", "kernels") for p in (ROOT / d).rglob("*.py"))
TEXT = sorted(
    p
    for d in ("fi_compile", "passes", "kernels", "tests", "examples", "benchmarks", "docs", ".ci", ".")
    for p in ((ROOT / d).glob("*") if d in (".", ".ci") else (ROOT / d).rglob("*"))
    if p.is_file() and (p.suffix in {".py", ".md", ".toml", ".sh"} or d == ".ci")
)
MIXERS = {
    "long_conv", "short_conv", "scan", "attention", "linear_attention", "kv_cache", "tiles", "conv1d",
    "convolution", "softmax", "cumsum", "embedding",
}  # fmt: skip
# Operators whose names are one word that means nothing else.
PLAIN = {
    "mul", "div", "matmul", "bmm", "mm", "addmm", "einsum", "conv1d", "convolution", "linear",
    "embedding", "exp", "sin", "cos", "tanh", "sigmoid", "relu", "gelu", "silu", "softmax", "cumsum",
    "cumprod", "tril", "triu", "roll", "flip", "permute", "transpose", "unsqueeze", "squeeze", "gather",
    "rsqrt", "sqrt", "pow", "conj",
}  # fmt: skip
LONGEST = 400
# Longer files, and why they stay whole.
LONG_FILES = {
    "fi_compile/decoder.py": "one public class",
    "fi_compile/engine.py": "one pipeline",
    "fi_compile/rules/pointwise.py": "a table, one line an operator",
    "fi_compile/facts.py": "one algebra",
    "passes/prove_prefix.py": "one walker",
}


def literal_words(path: Path) -> set[str]:
    """Words of the code that could name an operator: string literals outside docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    }


def names(path: Path) -> set[str]:
    """Identifiers and attributes of the code."""
    tree = ast.parse(path.read_text())
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return found | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


def operators_named(path: Path) -> set[str]:
    """ATen operators that a file names: through torch.ops, or as a string that is an operator's name."""
    aten = {name for name in dir(torch.ops.aten) if not name.startswith("__")}
    aten |= {n.rpartition("::")[2].partition(".")[0] for n in torch._C._dispatch_get_all_op_names()}
    through_ops = names(path) & {"aten", "ops", "prims"}
    return through_ops | (literal_words(path) & ({name for name in aten if "_" in name} | PLAIN))


@pytest.mark.parametrize("path", PASSES, ids=lambda p: p.name)
def test_passes_name_no_operator_and_no_mixer(path: Path):
    assert not operators_named(path)
    assert not (literal_words(path) | names(path)) & MIXERS


def test_operator_search_would_see_one(tmp_path: Path):
    guilty = tmp_path / "guilty.py"
    guilty.write_text('"""fft_rfft in a docstring is fine."""\nif name == "fft_rfft":\n    pass\n')
    assert operators_named(guilty) == {"fft_rfft"}
    guilty.write_text("import torch\ntarget = torch.ops.aten.mul.Tensor\n")
    assert operators_named(guilty) == {"aten", "ops"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_know_nothing_of_the_compiler(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            outside = module.startswith("fi_compile") and not module.startswith("fi_compile.kernels")
            assert not outside, f"{path.name} imports {module}"
            assert "fx" not in module.split("."), f"{path.name} imports {module}"


def test_a_pass_is_a_function_of_its_file_name():
    for path in PASSES:
        functions = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
        assert path.stem == "__init__" or path.stem in functions, path.name


def test_files_stay_short():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in LIBRARY}
    too_long = {name: n for name, n in lengths.items() if n > LONGEST and name not in LONG_FILES}
    assert not too_long
    assert set(LONG_FILES) <= set(lengths), "an exception for a file that is gone"
    assert all(n <= 1.5 * LONGEST for n in lengths.values()), lengths


def test_files_speak_of_the_project_alone():
    local = re.compile(r"(?<![\w.])/(?:home|root|work|opt|mnt|Users)/\w|\bissue #\d|\bTODO\b|\bFIXME\b")
    for path in TEXT:
        if path != Path(__file__):
            found = local.search(path.read_text())
            assert not found, f"{path.relative_to(ROOT)}: {found and found.group()}"


def test_modules_say_what_they_are_for():
    for path in LIBRARY:
        assert ast.get_docstring(ast.parse(path.read_text())), path.relative_to(ROOT)
