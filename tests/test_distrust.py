"""How well margins find wrong labels: what experiments/distrust.py measures is what it says."""

import sys
from pathlib import Path

import pytest
import torch

from sera_min import playground

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import distrust


def test_the_figures_are_those_of_a_count_by_hand(monkeypatch):
    monkeypatch.setattr(distrust, "SHARES", (0.2, 0.6))
    margins, flipped = torch.tensor([2.0, -3.0, 1.0, -2.0, 3.0]), torch.tensor([False, True, True, False, False])
    found = distrust.figures_of(margins, flipped)  # −3 is below three right ones, 1 below two of them
    assert found == pytest.approx({"auc": 5 / 6, "20%": 1.0, "60%": 2 / 3})
    assert distrust.figures_of(torch.zeros(5), flipped)["auc"] == 0.5


def test_each_half_is_judged_by_the_policy_of_the_other():
    rows = playground.preferences(2000, "train", seed=3, label_noise=0.3, length_bias=0)
    for half in (0, 1):
        parts = [distrust.one_half(half, 0.3, 512, part, seed=3, label_noise=0, length_bias=0) for part in ("train", "test")]
        assert parts == [rows[half::2], rows[1 - half :: 2]]
