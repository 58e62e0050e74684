"""The parts of experiments/sentiment.py that need no package: the judge's fit, beginnings, and what a review found."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "experiments"))
import sentiment
import study
from shared import bpe_tokenizer


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


def test_what_a_review_found(tmp_path, monkeypatch):
    """Rows 1 and 3 are flipped; 0, 2 and 3 are kept. Of the four pairs of a right and a flipped margin 3 are in order."""
    monkeypatch.setattr(
        sentiment, "judge", lambda place, texts: torch.tensor([float("good" in text) for text in texts])
    )
    (tmp_path / "flipped-7.json").write_text(json.dumps([False, True, False, True]))
    kept = [{"row": 0, "margin": 3.0}, {"row": 2, "margin": 1.0}, {"row": 3, "margin": 2.0}]
    own = [{"row": 1, "margin": 9.0, "source": "bootstrap", "prompt": "it is", "chosen": " good", "rejected": " bad"},
           {"row": 1, "margin": 9.0, "source": "bootstrap", "prompt": "it is", "chosen": " bad", "rejected": " good"}]  # fmt: skip
    lines = [json.dumps({"source": "offline"} | row) for row in [*kept, *own]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    of_first = sentiment.review_of(tmp_path, tmp_path, 7)
    assert "auc" not in of_first and of_first["right"] == pytest.approx(2 / 3)
    (tmp_path / "dropped.jsonl").write_text(json.dumps({"row": 1, "margin": -1.0, "source": "offline"}))
    found = sentiment.review_of(tmp_path, tmp_path, 7)
    assert (found["auc"], found["bootstrapped"], found["bootstrapped right"]) == (0.75, 2, 0.5)


def test_agreement_with_the_judge_about_pairs_not_trained_on(tmp_path):
    """Rows 1 and 2 are flipped. The reward prefers " good", so it agrees with the judge about rows 0 and 2 of three."""
    tokenizer = bpe_tokenizer()
    rows = []
    for chosen, rejected in ((" good", " bad"), (" good", " bad"), (" bad", " good")):
        rows.append(json.dumps({"prompt": "it is", "chosen": chosen, "rejected": rejected}))
    (tmp_path / f"pairs-{sentiment.UNSEEN}.jsonl").write_text("\n".join(rows))
    (tmp_path / f"flipped-{sentiment.UNSEEN}.json").write_text(json.dumps([False, True, True]))

    def log_prob(i, rows):
        if i == 0:  # the policy has them equal: only the reference tells them apart
            return torch.tensor([-3.0 if "good" in tokenizer.decode(y) else -1.0 for y in rows.responses])
        return torch.full((len(rows.responses),), -1.0)

    policies = SimpleNamespace(tokenizer=tokenizer, eos_ids=[tokenizer.eos_token_id], log_prob=log_prob)
    config = SimpleNamespace(max_length=40, max_prompt_length=16)
    assert sentiment.agreement(tmp_path, 3, policies, config) == pytest.approx(2 / 3)


def made_up(monkeypatch, tmp_path):
    """At β = 0.5 SeRA is 1.0, 1.1 and 1.2 above plain DPO, at 0.1 less; selection only is above it with seed 1 alone."""
    monkeypatch.setattr(sentiment, "SEEDS", [0, 1, 2])
    (tmp_path / "judge.json").write_text(json.dumps({"correlation": 0.7}))
    results = {}
    for seed in (0, 1, 2, sentiment.LOOK):
        for beta in sentiment.BETAS:
            for method in sentiment.METHODS:
                reward = seed / 10
                if method == "SeRA":
                    reward += 2 * beta + seed / 10
                if method == "selection only" and seed == 1:
                    reward += 0.3
                measured = {"reward": reward, "lexicon": reward, "error": 0.05, "kl": 2.0, "words": 9.0, "cut": 0.1}
                result = {"3": {**measured, "right": 0.7, "agrees": 0.6 + seed / 10}, "seconds": 1.0, "machine": "here", "made_from": "a1"}
                if method == "plain DPO":
                    result["0"] = {**measured, "reward": -1.0, "kl": 0.0}
                flags = {"beta": beta, "seed": seed, "learning_rate": sentiment.RATES[1]}
                results[sentiment.name_of("cpu", method, flags)] = result
    kls = dict(zip(sentiment.RATES, (0.5, 2.0, 7.0, 9.0)))
    del kls[sentiment.RATES[1]]  # made above
    for rate, kl in kls.items():
        flags = sentiment.first_look(sentiment.BETAS[0], rate)
        results[sentiment.name_of("cpu", "plain DPO", flags)] = {"3": {"kl": kl}, "made_from": "a1"}
    return results


def test_the_table_of_made_up_runs(monkeypatch, tmp_path):
    written = sentiment.tables(tmp_path, "cpu", made_up(monkeypatch, tmp_path))
    assert "|SeRA|0.5|3|1.200 ± 0.200|1.200 ± 0.200|2.0 ± 0.0|9.0 ± 0.0|0.100 ± 0.000|0.700 ± 0.000|–|–|0.700 ± 0.100|" in written
    assert "|the SFT model|–|0|-1.000 ± 0.000|" in written
    for ours, theirs, differences in (
        ("SeRA", "plain DPO", [1.0, 1.1, 1.2]),
        ("selection only", "plain DPO", [0.0, 0.3, 0.0]),
        ("SeRA", "selection only", [1.0, 0.8, 1.2]),
    ):
        expected = study.in_brackets(*study.interval(differences, 3))
        assert f"|{ours} less {theirs}|{expected}|{expected}|" in written
    gained = study.in_brackets(*study.interval([1.0, 1.1, 1.2], 3))
    above_chance = study.in_brackets(*study.interval([0.1, 0.2, 0.3], 3))
    assert f"|plain DPO|{gained}|–|–|{above_chance}|–|–|" in written
    assert "|SeRA|20.200, 2.0|21.000, 2.0|" in written and "|plain DPO, β = 0.1|0.5|2.0|7.0|" in written
    sentiment.draw(made_up(monkeypatch, tmp_path), "cpu", tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 5000


def test_the_first_look_chooses_the_rate_and_then_each_method_its_beta():
    def ends(kl, reward):  # after the last of three iterations; before, both are far larger
        return {"1": {"kl": 99.0, "reward": 99.0}, "3": {"kl": kl, "reward": reward}, "machine": "here"}

    results = {}
    for rate, kl in zip(sentiment.RATES, (1.9, 2.0, 9.0, 9.5)):
        flags = sentiment.first_look(sentiment.BETAS[0], rate)
        results[sentiment.name_of("cpu", "plain DPO", flags)] = ends(kl, 1.0)
    assert sentiment.best_rate(results, "cpu") == sentiment.RATES[1] == 3e-4
    for beta, reward in zip(sentiment.BETAS, (0.5, 0.7)):
        results[sentiment.name_of("cpu", "SeRA", sentiment.first_look(beta, 3e-4))] = ends(1.0, reward)
    assert sentiment.best_beta(results, "cpu", "SeRA") == sentiment.BETAS[1]
    for name in results:
        results[name]["3"]["kl"] = 1.0  # none goes far enough
    assert sentiment.best_rate(results, "cpu") == sentiment.RATES[-1]


def test_results_of_another_sft_model_end_the_study(monkeypatch, tmp_path):
    results = made_up(monkeypatch, tmp_path)
    sentiment.check_origin(results, "cpu", "a1")
    [other] = [name for name in results if name.endswith("seed 2") and "plain DPO | β = 0.1," in name]
    results[other]["made_from"] = "b2"
    with pytest.raises(SystemExit, match="seed 2 was made from another SFT model"):
        sentiment.check_origin(results, "cpu", "a1")
    sentiment.check_origin(results, "cuda", "c3")  # of which there are none
