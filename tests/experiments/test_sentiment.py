"""The parts of experiments/sentiment.py that need no package: the judge's fit, beginnings, and what a review found."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "experiments"))
import sentiment


def test_the_judge_is_the_minimum_of_the_ridge_loss():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(30, generator=generator, dtype=torch.float64)
    w = sentiment.fit(x, y, ridge=0.5).requires_grad_()
    loss = ((x @ w - y) ** 2).sum() + 0.5 * (w**2).sum()
    loss.backward()
    assert w.grad.abs().max() < 1e-10


def test_a_beginning_leaves_a_token_to_write():
    rng = random.Random(0)
    cuts = {sentiment.beginning(list(range(20)), rng) for _ in range(200)}
    assert cuts == set(range(2, 9))
    assert {sentiment.beginning([1, 2, 3, 4], rng) for _ in range(50)} == {2, 3}


def test_no_sentence_serves_twice(monkeypatch):
    rows = [(float(i), f"sentence {i}") for i in range(20_000)]
    monkeypatch.setattr(sentiment, "sentences", lambda place: rows)
    parts = [sentiment.part(Path("somewhere"), name) for name in ("judge", "test", "look", "sft")]
    assert [len(one) for one in parts] == [3000, 500, 500, 6500]
    assert len({text for one in parts for _, text in one}) == 10_500
    with pytest.raises(KeyError):
        sentiment.part(Path("somewhere"), "pairs")


def test_what_a_review_found(tmp_path):
    """Rows 1 and 3 are flipped; 0, 2 and 3 are kept. Of the four pairs of a right and a flipped margin 3 are in order."""
    (tmp_path / "flipped.json").write_text(json.dumps([False, True, False, True]))
    kept = [{"row": 0, "margin": 3.0}, {"row": 2, "margin": 1.0}, {"row": 3, "margin": 2.0}]
    own = [{"row": 1, "margin": 9.0, "source": "bootstrap"}]
    lines = [json.dumps({"source": "offline"} | row) for row in [*kept, *own]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    (tmp_path / "dropped.jsonl").write_text(json.dumps({"row": 1, "margin": -1.0, "source": "offline"}))
    found = sentiment.review_of(tmp_path, tmp_path / "flipped.json", 2)
    assert found == {"auc 2": 0.75, "right 2": pytest.approx(2 / 3)}
