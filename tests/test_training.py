"""Training through the backend: long convolutions as one operator, gradients as eager's."""

import copy

import pytest
import torch
from torch import nn
from torch.fft import irfft, rfft

import fi_compile
from corpus.convolutions import FFT
from fi_compile import training
from fi_compile.kernels.long_conv import long_conv

TAKEN = {
    "scale_on_filter", "scale_on_input", "scale_on_output", "scale_by_norm_forward", "scale_by_norm_ortho",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo):
    pass


@pytest.fixture
def found(monkeypatch) -> list[int]:
    """How many convolutions each graph had."""
    counts = []
    original = training.use_long_conv
    monkeypatch.setattr(
        training, "use_long_conv", lambda gm, *p: counts.append(original(gm, *p)) or counts[-1]
    )
    return counts


class Model(nn.Module):
    def __init__(self, convolve, width=4, longest=64):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.filter = nn.Parameter(torch.randn(width, longest) / 4)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, 11)
        self.convolve = convolve

    def forward(self, ids):
        x = self.embed(ids)
        u = x.transpose(1, 2)
        y = self.convolve(u, self.filter[:, : ids.shape[1]]).transpose(1, 2)
        return self.head(torch.tanh(y * self.mix(x)))


def gradients(model, run, ids):
    model.zero_grad()
    loss = nn.functional.cross_entropy(run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_same_training(model, found, expected, fallback="eager"):
    double = copy.deepcopy(model).double()
    ids = torch.randint(11, (3, 24))
    options = {"fallback": fallback}
    fast = torch.compile(model, backend="flashinf", dynamic=True, options=options)
    ours, exact = gradients(model, fast, ids), gradients(double, double, ids)
    plain = gradients(model, model, ids)
    for a, b, c in zip(ours, exact, plain, strict=True):
        own = float((c - b).abs().max())
        assert float((a - b).abs().max()) <= max(4 * own, 1e-6 * float(b.abs().max()))
    assert set(found) == {expected}  # of every graph that Dynamo made of it


SLOW = {"n_power_of_two"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FFT])
def test_every_spelling_trains_as_eager(name, found):
    if name in TAKEN:
        assert_same_training(Model(FFT[name]), found, 1)
    else:
        model, ids = Model(FFT[name]), torch.randint(11, (3, 24))
        fast = torch.compile(model, backend="flashinf", dynamic=True, options={"fallback": "eager"})
        for a, b in zip(gradients(model, fast, ids), gradients(model, model, ids), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_by_inductor(found):
    assert_same_training(Model(FFT["scale_on_filter"]), found, 1, "inductor")


def rewritten(function, *args, dynamic=True):
    """A function compiled with the rewrite, its value, and the convolutions that were found."""
    counts = []

    def backend(gm, _):
        counts.append(training.use_long_conv(gm))
        return gm

    value = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return value, sum(counts)


def test_layouts():
    u, k = torch.randn(2, 9, 5, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)

    def positions_first(u, k):
        n = 2 * u.shape[1]
        return irfft(rfft(k, n, 0)[:, None] * rfft(u, n, 1), n, 1)[:, : u.shape[1]]

    def unsqueezed(u, k):
        n = 2 * u.shape[1]
        return irfft(rfft(u, n=n, dim=1) * rfft(k[None, :, None], n=n, dim=1), n=n, dim=1)[:, : u.shape[1]]

    expected = positions_first(u, k)
    value, found = rewritten(unsqueezed, u, k)
    assert found == 1
    torch.testing.assert_close(value, expected)
    # The spectrum of the filter is reshaped: not seen, and left alone.
    value, found = rewritten(positions_first, u, k)
    assert found == 0
    torch.testing.assert_close(value, expected)


REFUSED = {
    "wraps around": lambda u, k, n: irfft(rfft(u, n=n) * rfft(k, n=n), n=n)[..., :n],
    "one position short": lambda u, k, n: irfft(rfft(u, n=2 * n - 2) * rfft(k, n=2 * n - 2), n=2 * n - 2)[
        ..., :n
    ],
    "reads the tail": lambda u, k, n: irfft(rfft(u, n=2 * n) * rfft(k, n=2 * n), n=2 * n)[..., : n + 1],
    "reads from the middle": lambda u, k, n: irfft(rfft(u, n=2 * n) * rfft(k, n=2 * n), n=2 * n)[
        ..., n : 2 * n
    ],
    "reads backwards": lambda u, k, n: irfft(rfft(u, n=2 * n) * rfft(k, n=2 * n), n=2 * n)[..., :-1],
    "two lengths": lambda u, k, n: irfft(rfft(u, n=2 * n) * rfft(k, n=2 * n), n=2 * n + 1)[..., :n],
    "a correlation": lambda u, k, n: irfft(rfft(u, n=2 * n) * rfft(k, n=2 * n).conj(), n=2 * n)[..., :n],
    "a square": lambda u, k, n: irfft(rfft(u, n=2 * n) ** 2, n=2 * n)[..., :n] + k,
    "used whole": lambda u, k, n: irfft(rfft(u, n=2 * n) * rfft(k, n=2 * n), n=2 * n).sum(-1) + k[:, 0],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_alone(name):
    u, k = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)

    def function(u, k):
        return REFUSED[name](u, k, u.shape[-1])

    value, found = rewritten(function, u, k)
    torch.testing.assert_close(value, function(u, k))
    assert found == 0


def test_other_axes_may_be_cut():
    u, k = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)

    def function(u, k):
        n = 2 * u.shape[-1]
        return irfft(rfft(u, n=n) * rfft(k, n=n), n=n)[..., 1:2, : u.shape[-1]]

    value, found = rewritten(function, u, k)
    torch.testing.assert_close(value, function(u, k))
    assert found == 1


def test_scales_of_all_kinds():
    u, k = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)

    def function(u, k):
        n = 2 * u.shape[-1] + 3
        spectrum = 3 * rfft(u, n=n, norm="ortho") / n * 0.5 * (rfft(k, n=n, norm="forward") / 7)
        return irfft(spectrum, n=n, norm="ortho")[..., : u.shape[-1]]

    value, found = rewritten(function, u, k)
    assert found == 1
    torch.testing.assert_close(value, function(u, k))


def test_a_filter_for_every_row():
    u, k = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(2, 1, 10, dtype=torch.float64)

    def function(u, k):
        n = 2 * u.shape[-1]
        return irfft(rfft(u, n=n) * rfft(k, n=n), n=n)[..., : u.shape[-1]]

    value, found = rewritten(function, u, k)
    assert found == 1
    torch.testing.assert_close(value, function(u, k))
    torch.testing.assert_close(value[1], long_conv(u[1:], k[1].expand(3, 10))[0])


def mutate(how):
    """A function that changes u, k or a spectrum between the transform and the product."""

    def function(u, k):
        n = 2 * u.shape[-1]
        u, k = u * 1, k * 1
        u_f, k_f = rfft(u, n=n), rfft(k, n=n)
        how(u, k, u_f, k_f)
        return irfft(u_f * k_f, n=n)[..., : u.shape[-1]]

    return function


def set_item(u, k, u_f, k_f):
    k[:, 0] = 5.0


MUTATIONS = {
    "method": lambda u, k, u_f, k_f: u.add_(1),
    "view": lambda u, k, u_f, k_f: u[..., 2:].mul_(3),
    "inplace argument": lambda u, k, u_f, k_f: torch.nn.functional.relu(k, inplace=True),
    "out argument": lambda u, k, u_f, k_f: torch.exp(u.detach(), out=u),
    "item": set_item,
    "spectrum": lambda u, k, u_f, k_f: u_f.mul_(2),
    "part of a spectrum": lambda u, k, u_f, k_f: k_f[..., 3:].zero_(),
}


@pytest.mark.parametrize("how", MUTATIONS)
def test_what_is_written_to_is_left_alone(how):
    u, k = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    value, found = rewritten(mutate(MUTATIONS[how]), u, k)
    torch.testing.assert_close(value, mutate(MUTATIONS[how])(u, k))
    assert found == 0


def test_without_a_write_it_is_taken():
    u, k = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    assert rewritten(mutate(lambda *_: None), u, k)[1] == 1


def test_a_result_may_be_written_to():
    u, k = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)

    def function(u, k):
        n = 2 * u.shape[-1]
        full = irfft(rfft(u, n=n) * rfft(k, n=n), n=n)
        first, second = full[..., : u.shape[-1]], full[..., : u.shape[-1] - 2]
        second.mul_(2)
        return first + 1

    value, found = rewritten(function, u, k)
    torch.testing.assert_close(value, function(u, k))
    assert found == 1


def test_what_is_written_elsewhere_stays():
    u, k = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)

    def function(u, k, count):
        n = 2 * u.shape[-1]
        count.add_(1)
        z = u + 1
        z[0] = 0
        y = irfft(rfft(u, n=n) * rfft(k, n=n), n=n)[..., : u.shape[-1]]
        y += z
        return y * count

    counts = torch.zeros(1), torch.zeros(1)
    value, found = rewritten(function, u, k, counts[0])
    torch.testing.assert_close(value, function(u, k, counts[1]))
    assert found == 1
    assert counts[0] == counts[1] == 1


def test_a_signal_with_itself():
    u = torch.randn(2, 3, 10, dtype=torch.float64)

    def function(u):
        n = 2 * u.shape[-1]
        u_f = rfft(u, n=n)
        return irfft(u_f * (u_f * 2), n=n)[..., : u.shape[-1]]

    value, found = rewritten(function, u)
    torch.testing.assert_close(value, function(u))
    assert found == 1


def test_a_precision_that_nothing_would_have(found):
    model, ids = Model(FFT["scale_on_filter"]), torch.randint(11, (3, 24))
    fast = torch.compile(model, backend="flashinf", options={"fallback": "eager", "precision": "tf32"})
    with pytest.raises(fi_compile.InputError, match="precision='tf32' is of matrix units"):
        fast(ids)
    assert not found


def test_the_precision_reaches_the_operator():
    graph = torch.fx.symbolic_trace(lambda u, k: irfft(rfft(u, n=32) * rfft(k, n=32), n=32)[..., :16])
    values = {"u": torch.zeros(2, 3, 16), "k": torch.zeros(3, 16)}
    for node in graph.graph.nodes:
        if node.op != "output":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: values[n.name])
            values[node.name] = (
                values.get(node.name) if node.op == "placeholder" else node.target(*args, **kwargs)
            )
            node.meta["example_value"] = values[node.name]
    assert training.use_long_conv(graph, "bfloat16") == 1
    with pytest.raises(
        ValueError, match="precision 'bfloat16' is of a GPU's matrix units; tensors are on a CPU"
    ):
        graph(values["u"], values["k"])
