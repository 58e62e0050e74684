"""Selection against a brute-force sort, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sera_min.select import ensemble_margin, length_free, select_top


@given(st.lists(st.integers(-3, 3), max_size=12), st.data())
def test_the_k_largest_ties_by_index(values, draw):
    k = draw.draw(st.integers(0, len(values)))
    want = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert select_top(torch.tensor(values, dtype=torch.float32), k).tolist() == want


def test_permuting_the_pairs_permutes_the_choice():
    margins, order = torch.randn(50), torch.randperm(50)
    assert {*order[select_top(margins[order], 20)].tolist()} == {*select_top(margins, 20).tolist()}


@pytest.mark.parametrize("k", [-1, 4, 0.7])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match="0 to 3"):
        select_top(torch.zeros(3), k)


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


def test_length_free_is_the_least_squares_line_within_prompts():
    """Against float64 lstsq with a dummy variable a prompt, absent samples left out."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 30, (20, 4))
    rewards = 0.7 * lengths + 3 * torch.randn(20, 1) + torch.randn(20, 4)
    absent = torch.rand(20, 4) < 0.2
    rewards[absent] = float("nan")
    got = length_free(rewards, lengths)
    design = torch.cat([lengths.reshape(-1, 1), torch.eye(20).repeat_interleave(4, 0)], 1).double()  # (80, 1 + 20)
    there = ~absent.flatten()
    slope = torch.linalg.lstsq(design[there], rewards.flatten()[there].double()[:, None], driver="gelsd").solution[0, 0]
    assert slope == pytest.approx(0.7, abs=0.1)
    torch.testing.assert_close(got.double(), (rewards - slope * lengths).double(), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert length_free(torch.tensor([[1.0, 2.0]]), torch.tensor([[5, 5]])).tolist() == [[1.0, 2.0]]  # no slope to be had


def test_ties_of_many_pairs_are_broken_by_index():
    """A sort that is not stable shows only in a long list."""
    assert select_top(torch.zeros(5000), 3000).tolist() == list(range(3000))


def test_lengths_that_hardly_differ_have_their_slope_all_the_same():
    got = length_free(torch.tensor([[1.0, 3.0]]), torch.tensor([[5, 6]]))  # 2 nats a token
    assert got.tolist() == [[pytest.approx(-9.0), pytest.approx(-9.0)]]
