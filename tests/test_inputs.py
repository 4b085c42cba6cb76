"""What a model reads beside its sequence: described at every call, exactly, or the model runs as given."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transparent
from fi_compile.doors import FlashinfWarning
from fi_compile.inputs import Causal, Counted, Extra, Filled, Fixed, Same, describe
from transparent import Runs, compiled

VOCAB, WIDTH = 7, 3


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo):
    pass


class Mixed(nn.Module):
    """Ids through a long convolution; ``join(x, argument, model)`` puts another argument into its input."""

    def __init__(self, join: Callable[..., Tensor]):
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Embedding(80, WIDTH)
        self.filter = nn.Parameter(torch.randn(64, WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.join = join
        self.double().eval()

    def forward(self, ids: Tensor, beside: Any = None, more: Any = None) -> Tensor:
        x = self.join(self.table(ids), beside, self)
        if more is not None:
            x = x * more.unsqueeze(-1)
        n = ids.shape[1]
        y = torch.fft.irfft(
            torch.fft.rfft(x, 2 * n, dim=1) * torch.fft.rfft(self.filter[:n], 2 * n, dim=0), 2 * n, dim=1
        )
        return self.head(y[:, :n] * x)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length))


def extended(ids: Tensor) -> Tensor:
    return torch.cat([ids, random_ids(ids.shape[0], 1)], 1)


assert_like = partial(transparent.assert_like, tolerance=1e-10)


def decode(
    fast: Callable, model: Callable, ids: Tensor, calls: int, beside: Callable[[Tensor], Any], **more: Any
) -> Tensor:
    """Call both on a growing prefix and compare; the prefix of the next call."""
    with torch.inference_mode():
        for _ in range(calls):
            given = beside(ids)
            assert_like(fast(ids, given, **more), model(ids, given, **more))
            ids = extended(ids)
    return ids


def by_mask(x: Tensor, mask: Tensor, model: Mixed) -> Tensor:
    return x * mask.unsqueeze(-1)


def by_place(x: Tensor, places: Tensor, model: Mixed) -> Tensor:
    return x + model.places(places)


def by_scores(x: Tensor, mask: Tensor, model: Mixed) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask)[:, 0]


def by_pairs(x: Tensor, mask: Tensor, model: Mixed) -> Tensor:
    return x * mask[:, -1, -1, :, None]


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand(ids.shape)


def causal(ids: Tensor) -> Tensor:
    n = ids.shape[1]
    above = torch.ones(n, n, dtype=torch.bool).triu(1)
    return torch.zeros(ids.shape[0], 1, n, n, dtype=torch.float64).masked_fill(above, float("-inf"))


FUNCTIONS_OF_THE_SHAPE = {
    "ones": (by_mask, torch.ones_like),
    "true": (by_mask, lambda ids: torch.ones_like(ids, dtype=torch.bool)),
    "half": (by_mask, lambda ids: torch.full(ids.shape, 0.5)),
    "one row": (by_mask, lambda ids: torch.ones(1, ids.shape[1])),
    "flat": (by_mask, lambda ids: torch.ones(ids.shape[1])),
    "segments": (by_place, torch.zeros_like),
    "positions": (by_place, positions),
    "positions in memory": (by_place, lambda ids: positions(ids).contiguous()),
    "positions of all rows": (by_place, lambda ids: torch.arange(ids.shape[1])),
    "positions from three": (by_place, lambda ids: positions(ids) + 3),
    "times": (by_mask, lambda ids: positions(ids).float() + 1),
    "causal": (by_scores, causal),
    "causal, true and false": (by_scores, lambda ids: causal(ids) == 0),
}


@pytest.mark.parametrize("name", FUNCTIONS_OF_THE_SHAPE)
@pytest.mark.parametrize("batch", [1, 2])
def test_functions_of_the_shape_are_decoded(name: str, batch: int, runs: Runs):
    join, beside = FUNCTIONS_OF_THE_SHAPE[name]
    model = Mixed(join)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlashinfWarning)
        decode(compiled(model), model, random_ids(batch, 9), 12, beside)
    assert runs.plain == 1


def test_labels_equal_to_the_ids(runs: Runs):
    model = Mixed(lambda x, labels, model: x + model.table(labels + 0))
    decode(compiled(model), model, random_ids(2, 9), 8, torch.clone)
    assert runs.plain == 1


def test_flags_and_numbers_are_part_of_what_is_decoded(runs: Runs):
    model = Mixed(lambda x, flag, model: x * 2 if flag else x)
    fast, ids = compiled(model), random_ids(2, 9)
    for flag in (True, False, None):
        decode(fast, model, ids, 5, lambda _, flag=flag: flag)
    assert runs.plain == 2, "one call with the flag, one without"
    model = Mixed(lambda x, number, model: x * number)
    fast = compiled(model)
    runs.plain = 0
    for number in (0.5, -1.5, 3, 4):
        decode(fast, model, ids, 6, lambda _, number=number: number)
    assert runs.plain <= 8


def test_numbers_that_differ_in_sign_only():
    model = Mixed(lambda x, number, model: x * torch.where(1 / torch.full_like(x, number) > 0, 2, 3))
    fast, ids = compiled(model), random_ids(2, 9)
    for number in (0.0, -0.0):
        decode(fast, model, ids, 6, lambda _, number=number: number)


def test_the_sequence_is_found_wherever_it_is_passed(runs: Runs):
    inner = Mixed(by_mask)

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, attention_mask: Tensor, *, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids, attention_mask)

    model = Late()
    fast, ids = compiled(model), torch.ones(2, 9, dtype=torch.int64)  # as like a mask as can be
    with torch.inference_mode():
        for _ in range(10):
            mask = torch.ones_like(ids)
            found = fast(mask, input_ids=ids)
            assert_like(found, model(mask, input_ids=ids))
            ids = extended(ids)
    assert runs.plain == 1


def test_embeddings_instead_of_ids(runs: Runs):
    model = Mixed(by_place)
    model.table = nn.Identity()
    fast, x = compiled(model), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    with torch.inference_mode():
        for _ in range(10):
            places = torch.arange(x.shape[1]).expand(x.shape[:2])
            assert_like(fast(x, places), model(x, places))
            x = torch.cat([x, torch.randn(2, 1, WIDTH, dtype=torch.float64)], 1)
    assert runs.plain == 1


# -- conditions --------------------------------------------------------------------------------------------


def by_condition(x: Tensor, condition: Tensor, model: Mixed) -> Tensor:
    return x * condition.unsqueeze(1)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_condition_belongs_to_its_sequence(batch: int, runs: Runs):
    model = Mixed(by_condition)
    fast = compiled(model)
    conditions = [torch.randn(batch, WIDTH, dtype=torch.float64) for _ in range(3)]
    prompts = [random_ids(batch, 9)] * 3  # of equal ids: only the condition tells them apart
    for _ in range(2):
        for i, condition in enumerate(conditions):
            prompts[i] = decode(fast, model, prompts[i], 5, lambda _, condition=condition: condition)
    assert runs.plain <= 6, "a further condition is analysed when it comes a second time"


def test_a_condition_edited_in_place(runs: Runs):
    model = Mixed(by_condition)
    fast, condition = compiled(model), torch.randn(2, WIDTH, dtype=torch.float64)
    ids = decode(fast, model, random_ids(2, 9), 4, lambda _: condition)
    condition[1, 2] += 1
    ids = decode(fast, model, ids, 4, lambda _: condition)
    condition[1, 2] -= 1
    decode(fast, model, ids, 4, lambda _: condition)
    assert runs.plain <= 4


def test_a_condition_that_changes_at_every_call_warns(runs: Runs):
    model = Mixed(by_condition)
    with pytest.warns(FlashinfWarning, match="changes from call to call") as found:
        decode(
            compiled(model),
            model,
            random_ids(2, 9),
            12,
            lambda ids: torch.full((2, WIDTH), float(len(ids[0]))),
        )
    assert len(found) == 1
    assert runs.plain == 12


def test_rows_with_conditions_of_their_own_are_not_exchanged():
    model = Mixed(by_condition)
    fast, condition, ids = compiled(model), torch.randn(3, WIDTH, dtype=torch.float64), random_ids(3, 9)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*none continues", category=FlashinfWarning)
        for _ in range(10):
            assert_like(fast(ids, condition), model(ids, condition))
            ids = extended(ids[torch.randint(0, 3, (3,))])


# -- what is no function of the shape ----------------------------------------------------------------------


def test_a_padded_batch_runs_as_given_and_warns_once(runs: Runs):
    model = Mixed(by_mask)

    def padded(ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        return mask

    with pytest.warns(FlashinfWarning, match=r"beside leaves out positions \(row 1 of 2\)") as found:
        ids = decode(compiled(model), model, random_ids(2, 9), 6, padded)
    assert len(found) == 1
    assert runs.plain == 6
    decode(compiled(model), model, ids, 4, torch.ones_like)
    assert runs.plain == 7


def test_a_mask_that_becomes_padded_and_whole_again(runs: Runs):
    model = Mixed(by_mask)
    fast, ids = compiled(model), random_ids(2, 9)
    ids = decode(fast, model, ids, 5, torch.ones_like)

    def odd(ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        return mask

    with pytest.warns(FlashinfWarning, match="row 0 of 2"):
        ids = decode(fast, model, ids, 3, odd)
    assert runs.plain == 4
    decode(fast, model, ids, 5, torch.ones_like)
    assert runs.plain == 4


def test_a_mask_edited_in_place():
    model = Mixed(by_mask)
    fast, ids, buffer = compiled(model), random_ids(2, 40), torch.ones(2, 40)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FlashinfWarning)
        for n in range(9, 40):
            buffer.fill_(1)
            if n % 4 == 0:
                buffer[1, n - 3] = 0
            assert_like(fast(ids[:, :n], buffer[:, :n]), model(ids[:, :n], buffer[:, :n]))


@pytest.mark.parametrize("second", ["other start", "repeated", "one row later", "two steps"])
def test_positions_that_are_others_later(second: str):
    model = Mixed(by_place)
    others: dict[str, Callable[[Tensor], Tensor]] = {
        "other start": lambda ids: positions(ids) + 1,
        "repeated": lambda ids: positions(ids).clamp(max=9),
        "one row later": lambda ids: positions(ids) + torch.arange(2).unsqueeze(1),
        "two steps": lambda ids: positions(ids) * 2,
    }
    fast = compiled(model)
    ids = decode(fast, model, random_ids(2, 9), 5, positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlashinfWarning)
        ids = decode(fast, model, ids, 4, others[second])
    decode(fast, model, ids, 4, positions)


def test_labels_that_are_other_ids_later():
    model = Mixed(lambda x, labels, model: x + model.table(labels + 0))
    fast = compiled(model)
    ids = decode(fast, model, random_ids(2, 9), 5, torch.clone)

    def shifted(ids: Tensor) -> Tensor:
        return torch.where(torch.arange(ids.shape[1]) == 2, (ids + 1) % VOCAB, ids)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlashinfWarning)
        decode(fast, model, ids, 4, shifted)


def test_an_argument_that_is_a_view_of_the_ids(runs: Runs):
    model = Mixed(lambda x, last, model: x * last.unsqueeze(-1))
    fast, ids = compiled(model), random_ids(2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlashinfWarning)
        decode(fast, model, ids, 6, lambda ids: ids[:, :1])
        decode(fast, model, ids, 6, lambda ids: ids.view_as(ids))


def test_beams_follow_with_a_mask(runs: Runs):
    model = Mixed(by_mask)
    fast, ids = compiled(model), random_ids(3, 9)
    with torch.inference_mode():
        for _ in range(10):
            mask, times = torch.ones_like(ids), positions(ids) + 1
            assert_like(fast(ids, mask, times), model(ids, mask, times))
            ids = extended(ids[torch.randint(0, 3, (3,))])
    assert runs.plain == 1


def test_a_mask_the_forward_writes_to_is_refused(runs: Runs):
    def written(x: Tensor, mask: Tensor, model: Mixed) -> Tensor:
        mask.view(-1)[1:].mul_(2)
        return x * mask.unsqueeze(-1)

    model = Mixed(written)
    fast, ids = compiled(model), random_ids(2, 9)

    def decode_and_compare(ids: Tensor) -> None:
        for _ in range(4):
            one, other = torch.ones(ids.shape), torch.ones(ids.shape)
            assert_like(fast(ids, one), model(ids, other))
            assert torch.equal(one, other)
            ids = extended(ids)

    with torch.inference_mode(), pytest.warns(FlashinfWarning, match="writes to its argument beside"):
        decode_and_compare(ids)
    assert runs.plain == 4


def test_several_at_once(runs: Runs):
    model = Mixed(by_place)
    fast, ids = compiled(model), random_ids(2, 9)
    with torch.inference_mode():
        for _ in range(8):
            found = fast(ids, beside=positions(ids), more=torch.ones(ids.shape))
            assert_like(found, model(ids, beside=positions(ids), more=torch.ones(ids.shape)))
            ids = extended(ids)
    assert runs.plain == 1


# -- descriptions ------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def described(value: Tensor, *shape: str | int | None):
    return describe(value, IDS, Extra(0, "x", shape, value.dtype))


def test_descriptions():
    ones, count = torch.ones(2, 4), torch.arange(4)
    assert described(ones, "batch", "length") == Filled((1.0).hex())
    assert described(ones * -0.0, "batch", "length") != described(ones * 0.0, "batch", "length")
    assert described(ones * float("nan"), "batch", "length") == Filled("nan")
    assert described(count.expand(2, 4), "batch", "length") == Counted(0)
    assert described(count, "length") == Counted(0)
    assert described(count + 5, "length") == Counted(5)
    assert described(count.view(1, 4, 1).expand(2, 4, 3), "batch", "length", 3) == Counted(0)
    assert described(torch.ones(4, 4).tril(), "length", "length") == Causal((1.0).hex(), (0.0).hex())
    assert described(IDS.clone(), "batch", "length") == Same()
    assert isinstance(described(ones, 2, 4), Fixed)
    assert described(torch.ones(1), "length") == Filled((1.0).hex())


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(4).expand(2, 4) * 2,
        torch.arange(4).flip(0).expand(2, 4),
        torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]]),
        torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]]),
        torch.tensor([[0.0, 1.0, 2.0, 3.0], [-0.0, 1.0, 2.0, 3.0]]),
        IDS.float(),
    ],
)
def test_what_has_no_description(value: Tensor):
    assert described(value, "batch", "length") is None


def test_a_mask_that_is_not_quite_causal_has_no_description():
    mask = torch.ones(2, 1, 4, 4).tril()
    assert isinstance(described(mask, "batch", 1, "length", "length"), Causal)
    for place in ((1, 0, 3, 0), (1, 0, 0, 3), (0, 0, 2, 2)):
        other = mask.clone()
        other[place] = 1 - other[place]
        assert described(other, "batch", 1, "length", "length") is None


def test_sizes_that_follow_something_else_have_no_description():
    assert described(torch.ones(2, 5), "batch", None) is None
    assert described(torch.ones(4, 7), "length", "own") is None
