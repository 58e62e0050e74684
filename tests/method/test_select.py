"""Selection against a brute-force sort, and what it refuses."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sera_min.select import ensemble_margin, select_top


@given(st.lists(st.integers(-3, 3), max_size=12), st.data())
def test_the_k_largest_ties_by_index(values, draw):
    k = draw.draw(st.integers(0, len(values)))
    want = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert select_top(torch.tensor(values, dtype=torch.float32), k).tolist() == want


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match="0 to 3"):
        select_top(torch.zeros(3), k)


@pytest.mark.parametrize("k", [0.7, 2.0, "2", None])
def test_k_is_a_count_and_no_share(k):
    with pytest.raises(TypeError, match="integer"):
        select_top(torch.zeros(3), k)


def test_k_may_be_any_kind_of_integer():
    assert (
        select_top(torch.zeros(3), numpy.int64(2)).tolist()
        == select_top(torch.zeros(3), torch.tensor(2)).tolist()
        == [0, 1]
    )


def test_nan_and_shape():
    naive = torch.tensor([0.0, float("nan"), 1.0]).argsort(descending=True)[0]
    assert naive == 1  # what would happen: the broken pair is the best of all
    with pytest.raises(ValueError, match="pair 1 is NaN"):
        select_top(torch.tensor([0.0, float("nan"), 1.0]), 1)
    with pytest.raises(ValueError, match=r"\(N,\)"):
        select_top(torch.zeros(2, 2), 1)


def test_ensemble():
    newest, previous = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert ensemble_margin(newest) is newest
    assert ensemble_margin(newest, previous, 0.25).tolist() == [1.5, 1.0]
    assert ensemble_margin(newest, previous, 0.0).tolist() == newest.tolist()
    assert ensemble_margin(newest, previous, 1.0).tolist() == previous.tolist()


def test_margins_of_two_shapes_are_no_ensemble():
    column, row = torch.zeros(3, 1), torch.zeros(3)
    assert (column + row).shape == (3, 3)  # what would happen
    with pytest.raises(ValueError, match=r"\(3, 1\) and \(3,\)"):
        ensemble_margin(column, row)


def test_ties_of_many_pairs_are_broken_by_index():
    """A sort that is not stable shows only in a long list."""
    assert select_top(torch.zeros(5000), 3000).tolist() == list(range(3000))
