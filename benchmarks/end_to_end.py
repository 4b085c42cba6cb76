"""A whole model, end to end: flashinf's decoder, the time to read its weights, and every other decoder.

The mean over all positions of flashinf includes every tile. The others' steps are timed at sampled positions and
integrated; the naive loop's forwards at sampled lengths.
"""

from __future__ import annotations

import gc

import numpy as np
import torch
from torch import Tensor

from examples.hyena import HyenaLM
from fi_compile import Decoder

from . import gate, models
from .decoding import Steps, decode, reading, seconds_at, where_time_goes
from .measure import once
from .peers import striped_hyena
from .peers.base import quadrature, spread
from .peers.gpt import GPT, GPTDecoder
from .peers.lazy_decoder import BLOCK, LazyState, filters_of, make_lazy, random_past
from .peers.naive import with_known_filters
from .setup import Bench

CHECKED = 256  # positions at which other decoders are compared with their model


def run(bench: Bench) -> None:
    """Each length of the run; then decoders of other models, which have the same step at every position."""
    sizes = bench.sizes
    for length in sizes.decoded:
        measure(bench, length)
        gc.collect()
    _gpt(bench)
    striped_hyena.measure(bench)


def measure(bench: Bench, length: int) -> None:
    """flashinf, the lazy decoder on the same step, and the naive loop."""
    sizes, section, at = bench.sizes, bench.section, f"L={length}"
    model = models.hyena(sizes.width, sizes.layers, length)
    bench.say(f"{at}: analysis and compilation")
    decoder = bench.decoder(model, length)
    bench.say(f"{at}: {length} steps")
    nbytes = models.weights_in_step(model, decoder.report)
    steps = decode(decoder.step, models.random_ids(1, length), reading(nbytes))
    bench.say(f"{at}: the forward in float64")
    subject = f"decoder {at}"
    section.check(subject, *models.check_logits(model, steps.logits))
    section.figure(
        f"{at} mean step", 1e6 * steps.mean, "µs", subject, note="over all positions, tiles included"
    )
    read = _reading(bench, at, nbytes, steps)
    where_time_goes(section, at, subject, steps, decoder)
    filters = filters_of(decoder).clone()
    del decoder
    x, y = steps.by_position()
    section.curve("end_to_end", f"flashinf, to {at}", x, [1e6 * v for v in y], subject)
    lazy = _lazy(bench, at, model, filters, length)
    of = (subject, f"lazy decoder {at}")
    target = {1 << 16: 12, 1 << 17: 24}.get(length)
    section.figure(
        f"{at} lazy decoder / flashinf",
        lazy / steps.mean,
        "×",
        of,
        bench.target("≥", target) if target else None,
        note=f"at most {lazy / read:.1f}× if a step only read its weights",
    )
    naive = _naive(bench, at, model, length)
    section.figure(f"{at} naive loop / flashinf", naive / steps.mean, "×", (subject, f"naive loop {at}"))


def _reading(bench: Bench, at: str, nbytes: int, steps: Steps) -> float:
    """The mean time to read the weights once, with the same threads, while the sequence was decoded."""
    read, subject = float(np.mean(steps.beside)), f"decoder {at}"
    bench.section.figure(
        f"{at} reading the weights",
        1e6 * read,
        "µs",
        subject,
        note=f"{nbytes / 1e6:.1f} MB, {torch.get_num_threads()} threads; mean, between steps",
    )
    bench.section.figure(
        f"{at} mean step / reading the weights", steps.mean / read, "×", subject, bench.target("≤", 1.4)
    )
    return read


def _lazy(bench: Bench, at: str, model: HyenaLM, filters: Tensor, length: int) -> float:
    """Mean seconds of the lazy decoder over all positions."""
    bench.say(f"{at}: lazy decoder on the same step")
    room = min(1024, length)
    decoder = bench.decoder(model, room, block=BLOCK)
    state = make_lazy(decoder, filters)
    steps = decode(decoder.step, models.random_ids(1, CHECKED))
    subject = f"lazy decoder {at}"
    bench.section.check(subject, *models.check_logits(model, steps.logits))
    random_past(state)
    found = [(t, weight, _lazy_at(decoder, state, t)) for t, weight in quadrature(spread(length))]
    last = length - 1 - (length - 1) % BLOCK
    some = sorted({0, filters.shape[0] - 1})
    exact = gate.direct(filters[some], state.history[some], [last], range(last))
    error = gate.units(state.sum(last)[some].unsqueeze(1), exact, filters[some], state.history[some])
    bench.section.check(f"{subject} mixing", error, gate.BOUND, "direct sums in float64")
    mean = sum(w * s for _, w, s in found) / length
    of = (subject, f"{subject} mixing")
    bench.section.figure(
        f"{at} lazy decoder", 1e6 * mean, "µs", of, note="steps timed at sampled positions, integrated"
    )
    bench.section.curve(
        "end_to_end",
        f"lazy decoder, to {at}",
        [t + 1 for t, _, _ in found],
        [1e6 * s for _, _, s in found],
        of,
    )
    return mean


def _lazy_at(decoder: Decoder, state: LazyState, t: int) -> float:
    token = models.random_ids(1, 1)[:, 0]

    def step() -> None:
        state.position = min(t, state.history.shape[1] - 2)
        decoder.step(token)

    return seconds_at(step)


def _naive(bench: Bench, at: str, model: HyenaLM, length: int) -> float:
    """Mean seconds of a token in the naive loop, filters computed once; and as people write it."""
    known = with_known_filters(model)
    ids = models.random_ids(1, length)
    places = [(n, w) for n, w in quadrature([0, *(length // d for d in (64, 16, 4, 2)), length]) if n]
    means = {}
    for name, forward in (("naive loop", known), ("naive loop, filters computed", model)):
        bench.say(f"{at}: {name}")
        subject = f"{name} {at}"
        with torch.inference_mode():
            bench.section.check(subject, *models.check_logits(model, forward(ids[:, :CHECKED])))
            forward(ids[:, : length // 4])
            cost = {n: once(lambda n=n, f=forward: f(ids[:, :n])) for n, _ in places}
        means[name] = sum(w * cost[n] for n, w in places) / length
        bench.section.figure(
            f"{at} {name}",
            1e3 * means[name],
            "ms",
            subject,
            note="forwards timed at sampled lengths, integrated",
        )
        bench.section.curve(
            "end_to_end", f"{name}, to {at}", list(cost), [1e6 * s for s in cost.values()], subject
        )
    return means["naive loop"]


def _gpt(bench: Bench) -> None:
    """A transformer of the same width and depth."""
    sizes, subject = bench.sizes, "GPT with a KV cache"
    bench.say(subject)
    torch.manual_seed(0)
    model = GPT(models.VOCAB, sizes.width, sizes.layers, max(sizes.decoded)).eval()
    decoder = GPTDecoder(model)
    steps = decode(lambda token: decoder.step(token)[None], models.random_ids(1, CHECKED))
    bench.section.check(subject, *models.check_logits(model, steps.logits))
    decoder.keys.normal_()
    decoder.values.normal_()
    token, cost = models.random_ids(1, 1)[:, 0], {}
    for t in sorted({t for n in sizes.decoded for t in spread(n)}):

        def step(t: int = t) -> None:
            decoder.position = t
            decoder.step(token)

        cost[t] = seconds_at(step)
    for n in sizes.decoded:
        mean = sum(w * cost[t] for t, w in quadrature(spread(n))) / n
        bench.section.figure(
            f"L={n} {subject}", 1e6 * mean, "µs", subject, note="steps timed at sampled positions, integrated"
        )
    bench.section.curve(
        "end_to_end", subject, [t + 1 for t in cost], [1e6 * s for s in cost.values()], subject
    )
