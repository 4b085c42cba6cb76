"""What is installed is what the repository holds, and torch.compile finds it."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import fi_compile

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"fi_compile": "fi_compile", "passes": "fi_compile.passes", "kernels": "fi_compile.kernels"}


def packages_on_disk() -> set[str]:
    """Every folder with an __init__.py, under the name it is imported by."""
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    return found


def test_every_package_is_listed():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert set(listed) == packages_on_disk()
    assert len(listed) == len(set(listed))


def test_no_module_lies_in_a_folder_that_is_no_package():
    for folder in FOLDERS:
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module


def test_package_dir_maps_the_folders_outside():
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    assert mapped == {p: f for f, p in FOLDERS.items() if f != "fi_compile"}


def test_torch_compile_finds_the_backend():
    (entry,) = entry_points(group="torch_dynamo_backends", name="flashinf")
    from fi_compile.backend import flashinf

    assert entry.value == PROJECT["project"]["entry-points"]["torch_dynamo_backends"]["flashinf"]
    assert entry.load() is flashinf


def test_version_is_one():
    assert fi_compile.__version__ == PROJECT["project"]["version"]
    assert re.search(rf"^## {re.escape(fi_compile.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_all_is_what_can_be_imported():
    assert sorted(set(fi_compile.__all__)) == sorted(fi_compile.__all__)
    for name in fi_compile.__all__:
        assert hasattr(fi_compile, name), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, with the setuptools at hand."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def check(wheel: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "check_wheel"), str(wheel)], capture_output=True, text=True
    )


def test_wheel_holds_every_module_and_no_other(wheel: Path):
    done = check(wheel)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("flaw", ["missing", "top-level"])
def test_wheel_check_sees_a_flaw(wheel: Path, tmp_path: Path, flaw: str):
    bad = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(bad, "w") as new:
        for name in old.namelist():
            if flaw == "missing" and name == "fi_compile/kernels/tile.py":
                continue
            new.writestr(name, old.read(name))
        if flaw == "top-level":
            new.writestr("kernels/__init__.py", "")
    done = check(bad)
    assert done.returncode == 1
    expected = {
        "missing": "missing: fi_compile/kernels/tile.py",
        "top-level": "importable at the top: ['kernels']",
    }
    assert expected[flaw] in done.stdout
