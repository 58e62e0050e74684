"""How well margins find wrong labels: what experiments/distrust.py measures is what it says."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from sera_min import playground
from sera_min.machinery.config import Config

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "experiments"))
import distrust


def test_the_figures_are_those_of_a_count_by_hand(monkeypatch):
    monkeypatch.setattr(distrust, "SHARES", (0.2, 0.6))
    margins, flipped = torch.tensor([2.0, -3.0, 1.0, -2.0, 3.0]), torch.tensor([False, True, True, False, False])
    found = distrust.figures_of(margins, flipped)  # −3 is below three right ones, 1 below two of them
    assert found == pytest.approx({"auc": 5 / 6, "20%": 1.0, "60%": 2 / 3})
    assert distrust.figures_of(torch.zeros(5), flipped)["auc"] == 0.5


def test_each_half_is_judged_by_the_policy_of_the_other():
    rows = playground.preferences(2000, "train", seed=3, label_noise=0.3)
    for half in (0, 1):
        parts = [distrust.one_half(half, 0.3, 512, part, seed=3, label_noise=0) for part in ("train", "test")]
        assert parts == [rows[half::2], rows[1 - half :: 2]]


def test_the_margins_of_a_run_are_those_that_it_reviews(model_dir, tmp_path):
    """Of D first, as a run of train.py with the same flags writes them, and then of the evaluation pairs."""
    rows = [
        {"prompt": f"Tell {i}", "chosen": "It is the fox. " * (i % 3 + 1), "rejected": f"A cave {i}"} for i in range(12)
    ]
    for name, part in (("d", rows[:9]), ("e", rows[9:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    flags = Config(
        model_name_or_path=str(model_dir), dataset_name=str(tmp_path / "d.json"), max_length=96, max_new_tokens=8,
        eval_dataset_name=str(tmp_path / "e.json"), learning_rate=1e-3, bootstrap=0.0, iterations=2, device="cpu",
        output_dir=str(tmp_path / "watched"),
    )  # fmt: skip
    margins = distrust.margins_by_iteration(flags, train.SERA)
    assert [len(of_t) for of_t in margins] == [12, 12] and not torch.equal(*margins)
    train.main(replace(flags, output_dir=str(tmp_path / "run")), replace(train.SERA, report=False))
    written = {}
    for name in ("pairs", "dropped"):
        for line in map(json.loads, (tmp_path / f"run/iteration-2/{name}.jsonl").read_text().splitlines()):
            written[line["row"]] = line["margin"]
    assert [written[row] for row in range(9)] == pytest.approx(margins[0][:9].tolist(), abs=1e-5)


def test_the_tables_are_those_of_the_results():
    text = (distrust.RESULTS / "distrust.md").read_text()
    shown = distrust.tables(json.loads((distrust.RESULTS / "distrust.json").read_text()))
    of_model = {"distrust: model", "distrust: accuracy", "distrust: accuracy, 30 %", "distrust: kept"}
    assert shown.keys() == {"distrust", *of_model}
    for name, block in shown.items():
        assert f"<!-- {name} -->\n{block}\n<!-- end -->" in text
    assert distrust.filled(text, shown) == text


def test_pairs_of_one_s_own_are_flipped_as_many_as_said_and_crossed(tmp_path):
    rows = [{"instruction": f"Say {i}", "input": "", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(300)]
    (tmp_path / "d.json").write_text(
        json.dumps([*rows, rows[0], {**rows[1], "instruction": "same", "rejected": "yes 1"}])
    )
    offline, test, flipped = distrust.rows_for_model(str(tmp_path / "d.json"), 0, 0.2)
    assert (
        len(offline) == distrust.PAIRS == len(flipped)
        and flipped.sum() == 0.2 * distrust.PAIRS
        and len(test) == distrust.CLEAN
    )
    assert [row["chosen"].startswith("no") for row in offline] == flipped.tolist()
    assert all(row["chosen"].startswith("yes") for row in test)
    prompts = [row["instruction"] for row in [*offline, *test]]
    assert len({*prompts}) == len(prompts)
    # trained on rows 0, 2, 4 it judges 1, 3, and the other way round; what stands before is of the pairs trained on
    halves = [[torch.tensor([0.0, 0, 0, 1, 3])], [torch.tensor([0.0, 0, 10, 12, 14])]]
    assert distrust.crossed(halves, 5)[0].tolist() == [10, 1, 12, 3, 14]


def test_what_a_review_keeps_is_counted_as_by_hand():
    flipped = torch.tensor([False] * 7 + [True] * 3)
    first = torch.tensor([9.0, 8, 7, 6, 5, -1, -2, 4, 3, -3])  # its 7 largest: 2 of the flipped ones
    second = torch.tensor([0.0, 0, 0, 0, 0, 9, 9, -9, -9, 9])  # their mean: those two go, and the third comes
    assert distrust.right_among_kept([first, second], flipped) == pytest.approx([5 / 7, 6 / 7])
    results = {
        f"0.3 {seed} {run}": {"accuracy": [0.5, 0.25 * seed], "margins": [first.tolist()] * 2}
        for seed in (0, 1)
        for run in distrust.runs_for_model(0.3)
    }
    shown = distrust.kept_table(results, {"0.3 0": flipped.tolist(), "0.3 1": [False] * 10}, 0.3)
    assert "|selection only|0.714 / 1.000|0.714 / 1.000|" in shown and "(all pairs)|0.700 / 0.700|" in shown
    assert "|SeRA|0.500 / 0.500|0.000 / 0.250|" in distrust.accuracy_table(results, 0.3)


def test_all_runs_on_a_model_of_one_s_own_take_as_many_iterations():
    for noise, iterations in ((0.2, set()), (0.3, {2})):
        runs = distrust.runs_for_model(noise).values()
        assert {flags["iterations"] for flags, _ in runs if "iterations" in flags} == iterations
        assert {flags["label_smoothing"] for flags, _ in runs if flags.get("loss_type") == "robust"} == {noise}
