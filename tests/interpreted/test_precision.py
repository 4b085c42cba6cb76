"""Products in TF32 and bfloat16: their errors in each kernel with products of matrices, and the option.

The interpreter multiplies float32 whatever a product is asked for, so there the kernels round operands themselves.
"""

import copy
import math

import pytest
import torch

import fi_compile
from corpus import SPELLINGS
from decoding import EAGER, features, module
from fi_compile.gpu_costs import GpuCosts
from fi_compile.kernels import tile_forms, transforms, tuning
from fi_compile.kernels.gpu import H100, PRECISIONS, ROUNDING, dot_precision
from fi_compile.kernels.long_conv import filter_gradient
from fi_compile.kernels.long_conv_fft import conv_gpu
from fi_compile.kernels.long_conv_gradient import filter_gradient_gpu
from fi_compile.kernels.long_conv_sparse import long_conv_sparse, sparsify_blocks
from fi_compile.kernels.monarch import tile_spectrum_gpu, tile_spectrum_stream
from fi_compile.kernels.tile_fft import add_tile_fft_gpu
from fi_compile.kernels.tile_kept import add_kept_gpu, distant_spectra, keep_spectra_gpu
from fi_compile.kernels.tile_stream import add_tile_stream_gpu
from fi_compile.mixers.stack import FilterBank
from fi_compile.mixers.triton_tiles import TritonTiles
from fi_compile.schedule import Schedule, Tile
from guarded import channels_last, rand

CPU = torch.device("cpu")
LOWER = [p for p in PRECISIONS if p != "float32"]


def by_matrix(inputs, rho, precision):
    outputs, _ = channels_last(torch.zeros_like(inputs))
    spectrum = tile_spectrum_gpu(rho, inputs.shape[-1])
    add_tile_fft_gpu(outputs, channels_last(inputs)[0], spectrum, precision=precision)
    return outputs


def by_stream(inputs, rho, precision):
    outputs, _ = channels_last(torch.zeros_like(inputs))
    spectrum = tile_spectrum_stream(rho, inputs.shape[-1])
    add_tile_stream_gpu(outputs, channels_last(inputs)[0], spectrum, precision=precision)
    return outputs


def by_kept(form):
    def run(inputs, rho, precision):
        side = inputs.shape[-1]
        outputs, _ = channels_last(torch.zeros_like(inputs))
        spectra = distant_spectra(form, rho, side, range(1, 2))
        ring = spectra.new_full((1, *inputs.shape[:2], *spectra.shape[2:]), torch.nan)
        keep_spectra_gpu(ring[0], channels_last(inputs)[0], precision)
        add_kept_gpu(outputs, ring, 0, 1, spectra, precision=precision)
        return outputs

    return run


def by_long_conv(inputs, rho, precision):
    side = inputs.shape[-1]
    padded = torch.nn.functional.pad(inputs, (0, side))
    return conv_gpu(padded, rho, precision=precision)[..., side:]


FORMS = {
    "matrix": (200, by_matrix),
    "matrix kept": (200, by_kept("matrix")),
    "stream": (4096, by_stream),
    "stream kept": (4096, by_kept("stream")),
    "long_conv": (600, by_long_conv),
}


@pytest.mark.parametrize(
    ("form", "data"), [*((form, "noise") for form in FORMS), ("matrix", "smooth"), ("long_conv", "smooth")]
)
def test_errors_are_as_stated(form, data):
    """Below ROUNDING · ‖u‖₂ · ‖k‖₁, for noise below ROUNDING · ‖u‖₂ · ‖k‖₂; and as large as such products make them."""
    side, run = FORMS[form]
    inputs, rho = rand(1, 2, side, dtype=torch.float32), rand(2, 2 * side, dtype=torch.float32, seed=1)
    if data == "smooth":
        inputs, rho = inputs.abs() + 1, (rho.abs() + 1) * torch.exp(-torch.arange(2 * side) * (4 / side))
    n = 4 * side
    spectra = torch.fft.rfft(inputs.double(), n=n) * torch.fft.rfft(rho.double(), n=n)
    expected = torch.fft.irfft(spectra, n=n)[..., side : 2 * side]
    size = inputs.double().norm(dim=-1) * rho.double().norm(p=2 if data == "noise" else 1, dim=-1)
    for precision in LOWER:
        error = float(((run(inputs, rho, precision) - expected).abs().amax(-1) / size).max())
        assert ROUNDING[precision] / 100 < error < ROUNDING[precision], precision


def test_the_filters_gradient_takes_it():
    x, grad = (rand(2, 2, 600, dtype=torch.float32, seed=s) for s in range(2))
    expected = filter_gradient(grad.double(), x.double(), 600)
    size = float(x.norm(dim=(0, 2)).max() * grad.norm(dim=(0, 2)).max())
    for precision in LOWER:
        error = float((filter_gradient_gpu(grad, x, 600, precision) - expected).abs().max()) / size
        assert ROUNDING[precision] / 100 < error < ROUNDING[precision]


def test_sparse_convolutions_take_it():
    u, k = rand(1, 2, 2500, dtype=torch.float32), rand(2, 2500, dtype=torch.float32, seed=1)
    spectra = sparsify_blocks(k, 2500)
    exact = long_conv_sparse(u, spectra)
    size = float(u.norm(dim=-1).max() * k.norm(dim=-1).max())
    error = float((long_conv_sparse(u, spectra, precision="bfloat16") - exact).abs().max()) / size
    assert ROUNDING["bfloat16"] / 100 < error < ROUNDING["bfloat16"]
    with pytest.raises(ValueError, match="precision 'tf32': expected one of float32, bfloat16"):
        long_conv_sparse(u, spectra, precision="tf32")


def test_operands_are_rounded_as_torch_and_the_units_do():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(p_x, p_y, p_z, N: tl.constexpr):
        o = tl.arange(0, N)
        x = tl.load(p_x + o)
        tl.store(p_y + o, transforms.in_bfloat16(x))
        tl.store(p_z + o, transforms.in_tf32(x))

    x = torch.cat([rand(1000, dtype=torch.float32), torch.tensor([0.0, -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8])])
    x = torch.cat([x, rand(20, dtype=torch.float32, seed=1) * 1e-30])
    y, z = torch.empty_like(x), torch.empty_like(x)
    kernel[(1,)](x, y, z, 1024)
    assert torch.equal(y, x.bfloat16().float())
    # Ten bits of fraction: what is left is exact.
    assert torch.equal(z, (z.view(torch.int32) & ~0x1FFF).view(torch.float32))
    assert ((z - x).abs() <= ROUNDING["tf32"] * x.abs()).all()
    assert ((z - x).abs() > 0.9 * ROUNDING["tf32"] * x.abs()).any()


def test_rates_and_choices_follow():
    assert H100.at("float32") == H100
    assert H100.at("tf32").matrix == pytest.approx(494.7e12)
    assert H100.at("bfloat16").matrix == pytest.approx(2 * 494.7e12)
    assert H100.at("tf32").at("float32").matrix == H100.at("tf32").matrix
    schedule = Schedule(32, 1 << 17)
    predicted = [GpuCosts(torch.float32, CPU, H100.at(p)) for p in PRECISIONS]
    seconds = [costs.seconds_per_token(schedule, 18 * 768, 32) for costs in predicted]
    # Bound by operations at float32's accuracy, by memory in both others.
    assert seconds[0] > seconds[1] == seconds[2]


def test_choices_follow(tmp_path, monkeypatch):
    """Each precision is tuned by itself, and predicted by its own rates."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tile_forms, "traffic", lambda form, *_: TRAFFIC[form])
    tile = Tile(range(32), range(32, 64))

    def form(precision):
        return TritonTiles(torch.zeros(2, 128), None, None, precision=precision).form(tile)

    assert [form(p) for p in PRECISIONS] == ["direct", "direct", "matrix"]
    tuning.save({("interpreted", "tf32", 2, 1, 32, 1): {"direct": 2e-5, "matrix": 1e-5, "fft": 3e-5}})
    assert [form(p) for p in PRECISIONS] == ["direct", "matrix", "matrix"]


NOTHING = {"reads": 0, "writes": 0}
TRAFFIC = {
    "direct": {**NOTHING, "flops": 67e12},
    "matrix": {**NOTHING, "flops": 800e12, "dots": 800e12},
    "fft": {**NOTHING, "flops": 134e12},
}


@pytest.mark.parametrize("radix", [2, 4])
def test_the_option_reaches_the_tiles(radix, monkeypatch, without_gradients):
    """Tiles differ by the rounding that was asked for; the step, and what is checked in float64, does not."""
    monkeypatch.setattr(tile_forms, "LARGEST", 4)
    monkeypatch.setattr(tile_forms, "torch_traffic", lambda *_: {"reads": math.inf, "writes": 0, "flops": 0})
    model = module(SPELLINGS["hyena_2"], 6, 256)
    sequence = features(1, 22, 6).float()
    exact = copy.deepcopy(model).double()(sequence.double())
    options = {**EAGER, "kernels": "triton", "block": 4, "radix": radix}
    errors = {}
    for precision in PRECISIONS:
        given = {**options, "precision": precision}
        dec = fi_compile.decoder(model, sequence[:, :9], max_length=22, options=given)
        dec.prefill(sequence[:, :4])
        found = torch.stack([dec.step(sequence[:, t]) for t in range(4, 22)], 1)
        errors[precision] = float((found - exact[:, 4:]).abs().max() / exact.abs().max())
        assert f"precision: {precision} on matrix units" in str(dec.report)
    assert errors["float32"] < 1e-5
    assert 1e-5 < errors["tf32"] < 20 * ROUNDING["tf32"]
    assert errors["tf32"] < errors["bfloat16"] < 20 * ROUNDING["bfloat16"]


def test_where_it_has_no_effect_it_is_refused(without_gradients):
    model, sequence = module(SPELLINGS["hyena_2"], 6, 64), features(1, 20, 6)
    by_torch = {**EAGER, "kernels": "torch", "precision": "tf32"}
    with pytest.raises(fi_compile.InputError, match=r"precision='tf32' is of matrix units.*found 'torch'"):
        fi_compile.decoder(model, sequence.float(), options=by_torch)
    by_triton = {**by_torch, "kernels": "triton"}
    with pytest.raises(fi_compile.InputError, match="a float64 model computes in float64 throughout"):
        fi_compile.decoder(model.double(), sequence, options=by_triton)
    with pytest.raises(fi_compile.InputError, match="expected one of float32, tf32, bfloat16"):
        fi_compile.decoder(model, sequence, options={"precision": "fp8"})
    with pytest.raises(ValueError, match="'torch' compute in the dtype of the filters"):
        FilterBank(torch.zeros(1, 8), channels_in=1, block=4, precision="tf32")
    with pytest.raises(ValueError, match="expected one of float32, tf32, bfloat16"):
        dot_precision("fp8")
