"""What sessions are made of: prefixes found row by row, outputs that are lent, memory that is bounded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_compile.growing import Growing
from fi_compile.sessions import Match, common_prefix


def prefix(known, sequence, independent=True) -> Match:
    return common_prefix(torch.tensor(known), torch.tensor(sequence), lambda: independent)


def test_common_prefix_in_order():
    known = [[1, 2, 3], [4, 5, 6]]
    assert prefix(known, [[1, 2, 3, 9], [4, 5, 6, 9]]) == Match(3)
    assert prefix(known, [[1, 2, 3, 9], [4, 5, 7, 9]]) == Match(2)
    assert prefix(known, [[1, 2], [4, 5]]) == Match(2)
    assert prefix(known, [[7, 2, 3], [4, 5, 6]]) == Match(0)


def test_common_prefix_in_other_rows():
    known = [[1, 2, 3], [4, 5, 6]]
    assert prefix(known, [[4, 5, 6, 9], [1, 2, 3, 9]]) == Match(3, (1, 0))
    assert prefix(known, [[4, 5, 6], [4, 5, 7], [1, 2, 3]]) == Match(2, (1, 1, 0))
    assert prefix([[1, 2, 3]], [[1, 2, 3], [1, 2, 4]]) == Match(2, (0, 0))
    assert prefix([[1, 2], [1, 2]], [[1, 2, 5], [1, 2, 6]]) == Match(2), "equal rows stay where they are"


def test_rows_that_depend_on_each_other_are_not_exchanged():
    known = [[1, 2, 3], [4, 5, 6]]
    assert prefix(known, [[4, 5, 6], [1, 2, 3]], independent=False) == Match(0)
    assert prefix(known, [[1, 2, 3], [4, 5, 7]], independent=False) == Match(2)
    assert prefix([[1, 2, 3]], [[1, 2, 3], [1, 2, 3]], independent=False) == Match(0)


def test_features_are_compared_bit_by_bit():
    known = torch.tensor([[[0.0, 1.0], [float("nan"), 2.0], [3.0, 3.0]]])
    assert common_prefix(known, known.clone(), lambda: True) == Match(3)
    other = known.clone()
    other[0, 0, 0] = -0.0
    assert common_prefix(known, other, lambda: True).common == 0


def contiguous(batch: int, width: int):
    return lambda n: ((batch, n, width), (n * width, width, 1))


def transposed(batch: int, width: int):
    return lambda n: ((batch, n, width), (width, batch * width, 1))


@pytest.mark.parametrize(
    ("layout", "shares"), [(contiguous(1, 3), True), (contiguous(2, 3), False), (transposed(2, 3), True)]
)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_growing_returns_every_row_whatever_callers_do(layout, shares: bool, data):
    """Grow, cut, hold, release and overwrite at random; compare with rows kept apart."""
    (batch, _, width), _ = layout(1)
    growing, truth = Growing(1, layout), torch.empty(batch, 0, width)
    assert growing.private is not shares
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(
            st.sampled_from(["append", "append", "append", "cut", "write", "release", "shorter"])
        )
        if action == "append" or truth.shape[1] == 0:
            rows = torch.randn(batch, data.draw(st.sampled_from([1, 1, 2, 70])), width)
            truth = torch.cat([truth, rows], 1)
            growing.append(rows)
        elif action == "cut":
            n = data.draw(st.integers(1, truth.shape[1]))
            truth = truth[:, :n]
            growing.truncate(n)
        elif action == "write" and held:
            tensor, copy = held[data.draw(st.integers(0, len(held) - 1))]
            tensor[:, data.draw(st.integers(0, tensor.shape[1] - 1))] += 1
            copy.copy_(tensor)
        elif action == "release":
            held.clear()
        n = data.draw(st.integers(1, truth.shape[1])) if action == "shorter" else truth.shape[1]
        found = growing.read(n)
        if found is None:  # the only rows were overwritten: the owner computes them again
            growing = Growing(1, layout, private=True)
            growing.append(truth.clone())
            found = growing.read(n)
        assert found is not None
        assert (tuple(found.shape), found.stride()) == layout(n)
        assert torch.equal(found, truth[:, :n])
        held.append((found, found.clone()))
        for tensor, copy in held:
            assert torch.equal(tensor, copy)


def test_growing_lends_without_copying_once_two_buffers_exist():
    growing, found = Growing(1, contiguous(1, 4)), None
    pointers = []
    for _ in range(40):
        growing.append(torch.randn(1, 1, 4))
        found = growing.read(growing.length)
        assert found is not None
        pointers.append(found.data_ptr())
    assert len(set(pointers)) == 2, (
        "the caller holds one result while the next is written to the other buffer"
    )


def test_growing_notices_writes_that_bump_no_version():
    growing = Growing(1, contiguous(1, 4))
    growing.append(torch.ones(1, 3, 4))
    found = growing.read(3)
    assert found is not None
    found.data.mul_(2)
    del found
    assert growing.read(3) is None


def test_growing_reorders_rows():
    growing, rows = Growing(1, contiguous(2, 3)), torch.randn(2, 5, 3)
    growing.append(rows)
    other = growing.reorder(torch.tensor([1, 1, 0]), 0, contiguous(3, 3))
    assert other is not None
    found = other.read(5)
    assert found is not None
    assert torch.equal(found, rows[[1, 1, 0]])


def test_growing_keeps_expanded_strides():
    growing = Growing(1, lambda n: ((2, n, 3), (0, 3, 1)))
    rows = torch.randn(1, 4, 3)
    growing.append(rows.expand(2, 4, 3))
    found = growing.read(4)
    assert found is not None
    assert found.stride() == (0, 3, 1)
    assert torch.equal(found, rows.expand(2, 4, 3))
