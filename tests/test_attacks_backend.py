"""Attacks on the transparent mode: what once gave wrong numbers or cost too much, and what withstood."""

import copy
import threading
import warnings
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import traceback as fx_traceback
from torch.utils import _pytree as pytree

from fi_compile import doors
from fi_compile.doors import FlashinfWarning
from fi_compile.sessions import tracing
from transparent import OPTIONS, compiled

VOCAB = 7


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo):
    pass


class Small(nn.Module):
    """Ids or features through a short convolution and a cumulative sum; ``finish`` is applied to the outputs."""

    def __init__(self, finish: Callable = lambda out, ids: out, features: bool = False):
        super().__init__()
        self.table = nn.Identity() if features else nn.Embedding(VOCAB, 4)
        self.filter = nn.Parameter(torch.randn(4, 1, 5))
        self.head = nn.Linear(4, VOCAB)
        self.finish = finish
        self.double().eval()

    def forward(self, ids: Tensor):
        x = self.table(ids).mT
        y = nn.functional.conv1d(nn.functional.pad(x, (4, 0)), self.filter, groups=4)
        return self.finish(self.head((y.cumsum(-1) * x).mT), ids)


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length))


def extended(ids: Tensor, more: int = 1) -> Tensor:
    return torch.cat([ids, random_ids(ids.shape[0], more)], 1)


def assert_like(found, expected) -> None:
    pairs = zip(*(pytree.tree_leaves(tree) for tree in (found, expected)), strict=True)
    for a, b in pairs:
        if not isinstance(b, Tensor):
            assert type(a) is type(b)
            assert a == b
            continue
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)


def decode(fast: Callable, model: Callable, ids: Tensor, calls: int) -> Tensor:
    for _ in range(calls):
        assert_like(fast(ids), model(ids))
        ids = extended(ids)
    return ids


@pytest.fixture
def analyses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a graph is analysed."""
    made: list[int] = []
    original = doors.build_engine

    def build(*args):
        made.append(1)
        return original(*args)

    monkeypatch.setattr(doors, "build_engine", build)
    return made


# -- once won ----------------------------------------------------------------------------------------------


def test_analysis_draws_none_of_the_callers_random_numbers():
    model = Small(lambda out, _: out + torch.randn_like(out))
    fast, ids = compiled(model), random_ids(2, 5)

    def seeded(run: Callable) -> Callable:
        return lambda ids: (torch.manual_seed(ids.shape[1]), run(ids))[1]

    with torch.no_grad(), pytest.warns(FlashinfWarning, match="as given"):
        decode(seeded(fast), seeded(model), ids, 3)


def test_weights_made_in_inference_mode_and_written_in_place():
    with torch.inference_mode():
        model = Small()
        fast, ids = compiled(model), random_ids(1, 5)
        ids = decode(fast, model, ids, 3)
        for p in model.parameters():
            p.mul_(1.5)
        decode(fast, model, ids, 3)


def test_a_fused_optimiser_between_generations_from_one_prompt():
    """It bumps no version; a call with no new position shows that a sequence begins again."""
    model = Small()
    fast, prompt, rest = compiled(model), random_ids(1, 5), random_ids(1, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        with torch.inference_mode():
            for n in range(5):
                ids = torch.cat([prompt, rest[:, :n]], 1)
                assert_like(fast(ids), model(ids))
        optimizer.zero_grad()
        model(prompt).square().mean().backward()
        optimizer.step()


def test_weights_written_unseen_leave_no_session_that_is_stale():
    model = Small()
    fast, ids = compiled(model), random_ids(1, 12)
    other = torch.cat([ids[:, :8], (ids[:, 8:] + 1) % VOCAB], 1)
    with torch.inference_mode():
        for n in range(6, 13):
            fast(ids[:, :n])
        for n in range(8, 13):
            fast(other[:, :n])
        model.filter.data.neg_()
        for n in range(6, 13):
            assert_like(fast(ids[:, :n]), model(ids[:, :n]))
        for n in range(8, 13):
            assert_like(fast(other[:, :n]), model(other[:, :n]))


def test_a_weight_transposed_where_it_lies():
    model = Small()
    model.head = nn.Linear(4, 4).double()
    fast, ids = compiled(model), random_ids(1, 5)
    with torch.inference_mode():
        ids = decode(fast, model, ids, 3)
        model.head.weight.data = model.head.weight.data.t()
        decode(fast, model, ids, 3)


def test_an_array_of_numpys_that_is_edited():
    class Scaled(Small):
        def forward(self, ids: Tensor):
            return super().forward(ids) * torch.as_tensor(self.gains)

    model = Scaled()
    model.gains = np.arange(1.0, 1 + VOCAB)
    fast, ids = compiled(model), random_ids(1, 5)
    with torch.no_grad():
        ids = decode(fast, model, ids, 3)
        model.gains[1] = -5
        decode(fast, model, ids, 3)


def test_another_default_dtype_is_another_graph():
    model = Small(lambda out, ids: out * (ids / 3).double().unsqueeze(-1))
    fast, ids = compiled(model), random_ids(1, 5)
    with torch.inference_mode():
        ids = decode(fast, model, ids, 3)
        try:
            torch.set_default_dtype(torch.float64)
            decode(fast, model, ids, 3)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("shown", "row"), [(Tensor.numpy, 0), (torch.from_dlpack, 0), (torch.from_dlpack, -1)]
)
def test_rows_written_through_numpy_or_dlpack(shown: Callable, row: int):
    """They bump no version; through DLPack they leave no trace on the memory either."""
    model = Small()
    fast, ids = compiled(model), random_ids(1, 5)
    with torch.inference_mode():
        for _ in range(8):
            found = fast(ids)
            assert_like(found, model(ids))
            shown(found)[:, row] = -1e9
            del found
            ids = extended(ids)


def test_the_storage_of_an_output_is_freed():
    model = Small()
    fast, ids = compiled(model), random_ids(1, 5)
    with torch.inference_mode():
        for n in range(8):
            found = fast(ids)
            assert_like(found, model(ids))
            if n == 3:
                found.untyped_storage().resize_(0)
            del found
            ids = extended(ids)


def test_a_tensor_replaced_before_every_call_is_not_analysed_for_ever(analyses: list[int]):
    model = Small(lambda out, _: out + model.shift)
    fast, ids = compiled(model), random_ids(1, 5)
    with torch.no_grad():
        for n in range(14):
            model.shift = torch.full((VOCAB,), float(n), dtype=torch.float64)
            ids = decode(fast, model, ids, 1)
        assert len(analyses) <= 8
        decode(fast, model, ids, 3)
        assert len(analyses) <= 9


def test_a_refused_graph_without_parameters_warns_once():
    def noisy(x: Tensor) -> Tensor:
        return nn.functional.dropout(x.cumsum(1), 0.5, training=True)

    fast, x = compiled(noisy), torch.ones(2, 5, 3)
    with torch.no_grad(), pytest.warns(FlashinfWarning) as found:
        [fast(x[:, :length].clone()) for length in (5, 6, 7)]
    assert len(found) == 1


def test_an_interrupt_while_matching_leaves_the_session_free(monkeypatch: pytest.MonkeyPatch):
    model = Small()
    fast, ids = compiled(model), random_ids(1, 5)

    def interrupted(*_):
        raise KeyboardInterrupt

    with torch.inference_mode():
        ids = decode(fast, model, ids, 3)
        with monkeypatch.context() as patch:
            patch.setattr(doors.Session, "match", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fast(ids)
        (door,) = doors.doors_of([p for p in model.parameters() if hasattr(p, "_flashinf_doors")]).values()
        assert not any(lock._is_owned() for lock in (door.lock, *(s.lock for s in door.sessions)))
        decode(fast, model, ids, 2)


def test_threads_that_call_while_another_traces():
    models = [Small(), Small()]
    fast = [compiled(model) for model in models]
    failures = []

    def work(place: int) -> None:
        generator = torch.Generator().manual_seed(place)
        ids = torch.randint(0, VOCAB, (1, 4), generator=generator)
        try:
            with torch.inference_mode():
                for _ in range(12):
                    assert_like(fast[place % 2](ids), models[place % 2](ids))
                    ids = torch.cat([ids, torch.randint(0, VOCAB, (1, 1), generator=generator)], 1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_calls_of_other_threads_leave_a_trace_alone():
    seen = []

    def call() -> None:
        torch._dynamo.disable(lambda: seen.append("custom" in fx_traceback.current_meta))()

    with tracing(), mock.patch.object(torch.compiler, "_is_exporting_flag", True):
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert seen == [True, False]


# -- withstood ---------------------------------------------------------------------------------------------


def test_random_use_of_several_prompts():
    model = Small()
    fast, kept = compiled(model), []
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> int:
        return int(torch.randint(0, n, (1,), generator=generator))

    pool = [random_ids(2, 4), random_ids(1, 7), random_ids(3, 5)]
    with torch.inference_mode():
        for _ in range(120):
            place = draw(3)
            ids, action = pool[place], draw(9)
            if action < 4:
                ids = extended(ids, 1 + draw(3) * draw(9))
            elif action == 4 and ids.shape[1] > 3:
                ids = ids[:, : ids.shape[1] - 1 - draw(ids.shape[1] - 2)]
            elif action == 5:
                ids = ids[torch.randint(0, ids.shape[0], (1 + draw(4),), generator=generator)]
            elif action == 6:
                ids = ids.clone()
                ids[draw(ids.shape[0]), draw(ids.shape[1])] = draw(VOCAB)
            elif action == 7 and draw(3) == 0:
                for p in model.parameters():
                    p.mul_(1.01)
            pool[place] = ids
            found, expected = fast(ids), model(ids)
            kept = [*kept[-5:], (found, expected)]
            for a, b in kept:
                assert_like(a, b)
            if draw(4) == 0:
                kept.pop()[0][:, :2].zero_()


def test_a_preallocated_buffer_that_is_edited():
    model, buffer = Small(), torch.zeros(3, 40, dtype=torch.int64)
    fast = compiled(model)
    with torch.inference_mode():
        for length in range(4, 30):
            buffer[:, length - 1] = torch.randint(0, VOCAB, (3,))
            assert_like(fast(buffer[:, :length]), model(buffer[:, :length]))
            if length % 5 == 0:
                buffer[:] = buffer[torch.tensor([2, 0, 0])]
                assert_like(fast(buffer[:, :length]), model(buffer[:, :length]))


def test_values_that_are_not_finite_leave_with_the_positions_that_had_them():
    model = Small(features=True)
    fast, x = compiled(model), torch.randn(2, 20, 4, dtype=torch.float64)
    with torch.no_grad():
        for length in range(8, 16):
            spoilt = x[:, :length].clone()
            spoilt[0, -1, 2] = (float("nan"), float("inf"))[length % 2]
            assert_like(fast(spoilt), model(spoilt))
            assert_like(fast(x[:, :length]), model(x[:, :length]))


def test_zero_has_a_sign():
    model = Small(lambda out, x: out.sum(-1, keepdim=True) + torch.ones_like(x).copysign(x), features=True)
    fast, x = compiled(model), torch.zeros(1, 9, 4, dtype=torch.float64)
    with torch.no_grad():
        for length in range(4, 9):
            assert_like(fast(x[:, :length]), model(x[:, :length]))
            x[:, length - 2] *= -1
            assert_like(fast(x[:, :length]), model(x[:, :length]))


def test_weights_that_begin_as_zero():
    model = Small()
    nn.init.zeros_(model.filter)
    fast, ids = compiled(model), random_ids(2, 5)
    with torch.no_grad():
        ids = decode(fast, model, ids, 4)
        model.filter.normal_()
        decode(fast, model, ids, 12)


def test_weights_that_are_nan_for_a_while():
    model = Small()
    fast, ids, good = compiled(model), random_ids(2, 5), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        ids = decode(fast, model, ids, 3)
        model.head.weight[0, 0] = float("nan")
        with pytest.warns(FlashinfWarning, match="infinite"):  # refused, and run as given
            ids = decode(fast, model, ids, 3)
        model.load_state_dict(good)
        decode(fast, model, ids, 3)


def test_training_between_generations():
    model = Small()
    twin = copy.deepcopy(model)
    fast, ids = compiled(model), random_ids(1, 5)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin)]
    for _ in range(3):
        batch = random_ids(3, 9)
        for run, optimizer in zip((fast, twin), optimizers, strict=True):
            optimizer.zero_grad()
            run(batch).square().mean().backward()
            optimizer.step()
        with torch.inference_mode():
            ids = decode(fast, twin, ids, 3)


def test_wrappers_that_share_weights_and_a_copy():
    model = Small()

    def doubled(ids: Tensor) -> Tensor:
        return model(ids) * 2

    fast, other, twice, ids = compiled(model), compiled(model, block=4), compiled(doubled), random_ids(1, 5)
    with torch.no_grad():
        for n in range(6):
            assert_like((fast(ids), other(ids), twice(ids)), (model(ids), model(ids), doubled(ids)))
            ids = extended(ids)
            if n == 3:
                model.head.weight.mul_(2)
        own = copy.deepcopy(model)
        own.head.weight.mul_(3)
        run = compiled(own)
        for _ in range(4):
            assert_like((run(ids), fast(ids)), (own(ids), model(ids)))
            ids = extended(ids)


def test_odd_outputs():
    def finish(out: Tensor, ids: Tensor):
        return {
            "input": ids,
            "sizes": (ids.shape[1] * 2 + 1, None, "a", 1.5),
            "weight": model.head.weight.mT,
            "positions": torch.arange(ids.shape[1]),
            "best": out[:, -1].topk(3),
            "swapped": out.transpose(0, 1),
            "again": (out, out > 0),
        }

    model = Small(finish)
    fast, ids, kept = compiled(model), random_ids(2, 5), []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is refused
        for _ in range(6):
            kept.append((fast(ids), model(ids)))
            ids = extended(ids)
    for found, expected in kept:
        assert_like(found, expected)


def test_a_forward_that_writes_to_its_input():
    model = Small(lambda out, x: out + x.add_(1).sum(-1, keepdim=True), features=True)
    fast, x = compiled(model), torch.randn(2, 5, 4, dtype=torch.float64)

    def written(run: Callable, length: int) -> tuple[Tensor, Tensor]:
        given = x[:, :length].clone()
        return run(given), given

    with torch.no_grad(), pytest.warns(FlashinfWarning, match="writes to"):
        found = [written(fast, length) for length in (3, 4, 5)]
    assert_like(found, [written(model, length) for length in (3, 4, 5)])


class Interrupting:
    """A lock after whose first acquisition an interrupt strikes."""

    def __init__(self, lock):
        self.lock, self.armed = lock, True

    def acquire(self, **how):
        taken = self.lock.acquire(**how)
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        return taken

    def release(self):
        self.lock.release()

    def _is_owned(self):
        return self.lock._is_owned()


@pytest.mark.parametrize("which", ["door", "session", "creating"])
def test_an_interrupt_just_after_a_lock_was_taken(which: str, monkeypatch: pytest.MonkeyPatch):
    model = Small()
    fast, ids = compiled(model), random_ids(1, 5)
    with torch.inference_mode():
        if which == "creating":
            monkeypatch.setattr(doors, "_creating", Interrupting(doors._creating))
        else:
            for _ in range(3):
                assert_like(fast(ids), model(ids))
                ids = extended(ids)
            (door,) = [d for p in model.parameters() for d in getattr(p, "_flashinf_doors", {}).values()]
            owner = door if which == "door" else door.sessions[0]
            owner.lock = Interrupting(owner.lock)
        with pytest.raises(KeyboardInterrupt):
            fast(ids)
        found = []

        def decode(ids: Tensor) -> None:
            with torch.inference_mode():
                for _ in range(4):
                    assert_like(fast(ids), model(ids))
                    ids = extended(ids)
                found.append(ids)

        thread = threading.Thread(target=decode, args=(ids,))  # whom a lock that is still held would keep out
        thread.start()
        thread.join()
    assert found
    (door,) = [d for p in model.parameters() for d in getattr(p, "_flashinf_doors", {}).values()]
    assert door.sessions[-1].decoder is not None
    assert int(door.sessions[-1].decoder.position.max()) == found[0].shape[1] - 1


@pytest.mark.parametrize("dynamic", [False, None])
def test_a_length_of_its_own_for_every_graph_warns(dynamic: bool | None):
    model = Small()
    fast = torch.compile(model, backend="flashinf", dynamic=dynamic, options=OPTIONS)
    ids = random_ids(2, 5)
    with torch.inference_mode(), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", FlashinfWarning)
        for _ in range(7):
            assert_like(fast(ids), model(ids))
            ids = extended(ids)
    told = [w for w in found if "dynamic=True" in str(w.message)]
    assert len(told) == (1 if dynamic is False else 0)
