"""The static gate: what Triton kernels compile to for GPUs that are not here."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.compiler import ASTSource
from triton.runtime.jit import KernelInterface

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import kernels as gate  # noqa: E402
from benchmarks.offline import ARCHITECTURES, Compiled, compile_variant  # noqa: E402
from fi_compile.kernels import long_conv_fft, long_conv_gradient, tile_direct, tile_kept  # noqa: E402
from fi_compile.kernels.gpu import PRECISIONS  # noqa: E402

BY_NAME = {a.name: a for a in ARCHITECTURES}


def variant(name: str):
    return next(v for v in gate.variants() if v.name == name)


def test_table_is_of_these_kernels():
    text = gate.DOCUMENT.read_text()
    assert f"`{gate.digest()}`" in text, "run python -m benchmarks.kernels --write"
    for architecture in ARCHITECTURES:
        for v in gate.variants():
            assert text.count(f"| {v.name} |") == len(v.architectures), v.name
        assert f"## {architecture.name}\n" in text
    assert gate.prediction() in text


QUICK = "sm_90", "float32"


# The others take as long each; the digest says that they were compiled.
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(*place, marks=() if place == QUICK else pytest.mark.slow)
        for place in itertools.product(BY_NAME, PRECISIONS)
    ],
)
def test_every_variant_passes(name, precision):
    compiled = gate.compiled_for(BY_NAME[name], precision=precision)
    assert not {c.variant.name: c.flaws for c in compiled if c.flaws}
    section = gate.DOCUMENT.read_text().partition(f"## {name}\n")[2].partition("\n## ")[0]
    assert "\n".join(gate.table(compiled)[2:]) in section


def test_a_variant_that_spills_is_seen():
    v = variant("tile_fft U=2048")
    found = compile_variant(replace(v, constants={**v.constants, "BC": 4}), BY_NAME["sm_90"])
    assert found.spilled > 0
    assert found.flaws[0] == f"spills {found.spilled} bytes"


@pytest.mark.parametrize("kernel", sorted({v.kernel.fn.__name__ for v in gate.variants()}))
def test_sizes_of_one_compile(kernel):
    """The launcher makes every integer that is 1 a constant, which the interpreter does not."""
    v = next(v for v in gate.variants() if v.kernel.fn.__name__ == kernel)
    ones = {name: 1 for name, kind in v.types.items() if not kind.startswith("*")}
    v = replace(v, constants={**ones, **v.constants}, aligned=())
    assert compile_variant(v, BY_NAME["sm_90"]).registers


def test_grids_are_as_large_as_gpus_admit(monkeypatch):
    """Of a grid's second and third axes: what is many lies along the first."""
    grids = []
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda _, grid: lambda *a, **k: grids.append(grid))
    channels = 100_000
    outputs = torch.empty(4096, 1, channels, device="meta").permute(1, 2, 0)
    for side, form in ((2048, "matrix"), (4096, "stream")):
        one = tile_kept.distant_spectra(form, torch.empty(1, 2 * side), side, range(1, 2))
        spectra = torch.empty(channels, *one.shape[1:], device="meta")
        ring = spectra.view(1, 1, channels, *one.shape[2:])
        tile_kept.keep_spectra_gpu(ring[0], outputs[..., :side])
        tile_kept.add_kept_gpu(outputs[..., :side], ring, 0, 1, spectra)
    tile_direct.add_tile_direct_gpu(outputs[..., :8], outputs[..., :8], outputs[0, :, :16].t())
    # One filter for all channels of a batch: training.
    u = torch.empty(channels, 1, 3000, device="meta")
    long_conv_fft.conv_gpu(u, torch.empty(1, 3000, device="meta"))
    long_conv_gradient.filter_gradient_gpu(*[torch.empty(1, 400_000, 600, device="meta")] * 2, 600)
    assert len(grids) > 7
    assert all(max(grid[1:]) < 1 << 16 for grid in grids)


def test_flaws():
    v = variant("tile_fft U=512")
    good = Compiled(v, BY_NAME["sm_80"], 255, 0, 166_912, 10, frozenset({"tf32"}), {128: 9, 32: 1})
    assert not good.flaws
    assert good.wide == 0.9
    for change, flaw in (
        ({"shared": 166_913}, "needs 166913 bytes of shared memory of 166912"),
        ({"matrix": 0}, "has 0 matrix instructions"),
        ({"operands": frozenset({"bf16"})}, "multiplies bf16 on matrix units, tf32 is meant"),
        ({"loads": {32: 9, 128: 1}}, "10% of its loads are wide, 40% are expected"),
        ({"spilled": 8}, "spills 8 bytes"),
    ):
        assert replace(good, **change).flaws == [flaw]


@pytest.mark.parametrize("name", BY_NAME)
def test_precisions_multiply_what_they_say(name):
    """Three products of TF32 keep float32 accuracy, one is TF32; bfloat16 takes half as many."""
    full, tf32, bfloat16 = (
        compile_variant(variant(f"keep U=512{p}"), BY_NAME[name]) for p in ("", " tf32", " bfloat16")
    )
    assert full.matrix == (2 if name == "gfx942" else 3) * tf32.matrix
    assert tf32.matrix == 2 * bfloat16.matrix
    assert [sorted(c.operands) for c in (full, tf32, bfloat16)] == (
        [["f32"], ["xf32"], ["bf16"]] if name == "gfx942" else [["tf32"], ["tf32"], ["bf16"]]
    )
    assert full.predicted >= tf32.predicted >= bfloat16.predicted
    assert not [*full.flaws, *tf32.flaws, *bfloat16.flaws]


def test_bfloat16_is_summed_in_float32_and_rounded():
    """The interpreter cannot show it: it truncates."""
    import triton

    v = variant("tile_direct U=256 bf16")
    signature = {n: "constexpr" if n in v.constants else v.types[n] for n in v.kernel.arg_names}
    source = ASTSource(v.kernel, signature, constexprs=v.constants)
    made = triton.compile(source, target=BY_NAME["sm_90"].target, options={"num_warps": v.warps})
    ptx = made.asm["ptx"]
    assert "fma.rn.f32" in ptx
    assert "cvt.rn.bf16" in ptx
    assert "fma.rn.bf16" not in ptx
